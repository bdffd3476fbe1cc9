"""What every method owes, whatever it is: runs over each entry of `METHODS` by itself."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allot
from allot.budget.allocation import Allocation
from allot.errors import Stopped
from allot.methods.layerwise.streamed import Streamed
from allot.methods.training.distillation import Training
from allot.methods.training.selection import Selection
from allot.methods.training.trial import Trial
from allot.pruning.assemble import assemble
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.run.driver import drive
from allot.run.problem import Candidate, Method, Problem, finished
from allot.run.store import Log, State
from contract.cases import (
    CASES,
    METHODS,
    ON_CHANNELS,
    Watched,
    before,
    bits,
    budget_of,
    convolutions,
    convolutions_in_blocks,
    finished_run,
    fitting,
    needs_blocks,
    nothing_more_fits,
    parts,
    pattern_of,
    problem_of,
    run,
    same,
    shared_problem,
    short,
    without_data,
)

each_method = pytest.mark.parametrize("name", METHODS)
each_case = pytest.mark.parametrize("case", CASES)


@each_method
def test_a_method_is_a_frozen_value_with_a_role(name: str):
    method = METHODS[name]
    assert is_dataclass(method) and method.role in ("allocate", "repair") and isinstance(method.needs_data, bool)
    for option in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, option.name, None)


# the budget


@each_method
@pytest.mark.parametrize("sparsity", [0.013, 0.5, 0.8, 0.95, 0.98])
def test_sparsity_is_met_to_the_last_weight(name: str, sparsity: float):
    if name.endswith(ON_CHANNELS) and sparsity > 0.9:
        pytest.skip("one channel a group is more than that")
    problem = shared_problem("without batch norm", f"sparsity={sparsity}", name=name)
    candidate = run(name, problem)
    total = sum(layer.total for layer in problem.scope)
    wanted = round((1 - sparsity) * total)
    held = sum(int(candidate.masks[layer.name].sum()) for layer in problem.scope)
    if name.endswith(ON_CHANNELS):
        holds_what_it_says(problem, candidate)
    else:
        assert sum(candidate.allocation.kept.values()) == held == wanted
    assert held <= wanted
    effective = candidate.effective(problem)
    assert sum(int(effective[layer.name].count_nonzero()) for layer in problem.scope) <= wanted


@each_method
@pytest.mark.parametrize(
    ("case", "budget"),
    [
        ("with batch norm", "macs=40%"),
        ("with batch norm", "bytes=75%"),
        ("with batch norm", "macs=50%,params=35%,bytes=70%"),
        ("attention", "params=30%"),
        ("attention", "macs=33%"),
        ("tied weights", "params=31"),
        ("tied weights", "macs=40%,sparsity=0.5"),
    ],
)
def test_other_budgets_are_met_and_not_one_more_weight_fits(name: str, case: str, budget: str):
    fitting(name, case)
    problem = shared_problem(case, budget, name=name)
    holds_what_it_says(problem, run(name, problem))


def holds_what_it_says(problem: Problem, candidate: Candidate) -> None:
    """Masks keep what was allocated, every limit holds, and one more weight, or channel, would break a limit."""
    kept = candidate.allocation.kept
    held = {layer.name: int(candidate.masks[layer.name].sum()) for layer in problem.scope}
    assert problem.budget.sizes(kept) == held
    assert {name: len(some) for name, some in candidate.channels.items()} == (kept if problem.scope.groups else {})
    nothing_more_fits(problem, kept)


@each_method
@each_case
def test_hostile_models_give_whole_results(name: str, case: str):
    fitting(name, case)
    problem, candidate = finished_run(name, case).problem, finished_run(name, case).candidate
    assert all(0 <= density <= 1 for density in candidate.allocation.values())
    assert all(kept >= 1 for kept in candidate.allocation.kept.values())  # the floor
    holds_what_it_says(problem, candidate)
    assert all(bool(torch.isfinite(value).all()) for value in candidate.tensors.values())
    assert not candidate.tensors.keys() - problem.dense.keys()
    result = Result(problem, candidate, Log(), assemble("erk").names, "erk", "case")
    assert bool(torch.isfinite(result.model()(CASES[case].inputs())).all())


@each_method
def test_an_allocation_survives_json_and_replays_to_the_same_counts(name: str, tmp_path: Path):
    finished = finished_run(name, "without batch norm")
    problem, allocation = finished.problem, finished.candidate.allocation
    allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == dict(allocation)
    replayed = {"allocate": str(tmp_path / "allocation.json"), "repair": "none", "pattern": pattern_of(name)}
    again = prune(problem.model, None, "sparsity=0.7", example=problem.inputs().example(), **replayed)
    assert again.allocation.kept == allocation.kept


# the user's model and the user's process


@each_method
@pytest.mark.parametrize("case", ["with batch norm", "attention", "tied weights"])
def test_the_users_model_is_left_bit_for_bit_as_it_was(name: str, case: str):
    fitting(name, case)
    model = CASES[case].model(name)
    for i, (module, parameter) in enumerate(zip(model.modules(), model.parameters(), strict=False)):
        module.training = bool(i % 2)
        parameter.requires_grad_(bool(i % 3) or parameter.dim() > 1)  # a weight frozen beside others is out of scope
        parameter.grad = torch.full_like(parameter, float(i))
    model.register_forward_hook(lambda *_: None)
    found = _everything(model)
    random = torch.random.get_rng_state()
    prune(model, CASES[case].inputs(), budget_of(name, case), batch_size=8, **parts(name)).model()
    assert _everything(model) == found
    assert torch.equal(torch.random.get_rng_state(), random), "the global random stream was used"


def _everything(model: nn.Module) -> dict[str, Any]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    found: dict[str, Any] = {"names": list(model.state_dict())}
    for key, value in tensors.items():
        grad = value.grad if value.requires_grad or value.is_leaf else None
        found[key] = (id(value), value._version, bits(value), value.requires_grad, grad is not None and bits(grad))
    for key, module in model.named_modules():
        hooks = [len(held) for attribute, held in vars(module).items() if attribute.endswith("_hooks")]
        found["module " + key] = (id(module), type(module), module.training, hooks)
    return found


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_data])
def test_a_method_that_needs_no_data_does_without(name: str):
    assert same(finished_run(name).candidate, run(name, without_data(problem_of(name=name))))


# the same again


@each_method
@pytest.mark.parametrize("case", ["with batch norm", "attention"])
def test_the_same_seed_gives_the_same_result(name: str, case: str):
    first = finished_run(name, case).candidate
    torch.manual_seed(2)
    assert same(first, run(name, problem_of(case, name=name)))


@each_method
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_the_order_of_layers_is_irrelevant(name: str, norm: bool):
    one = finished_run(name, "with batch norm" if norm else "without batch norm")
    other = (convolutions_in_blocks if needs_blocks(name) else convolutions)(norm=norm, reverse=True)
    other.load_state_dict(one.problem.model.state_dict())
    assert list(one.problem.model.state_dict()) != list(other.state_dict())
    assert same(one.candidate, run(name, problem_of(model=other, name=name)))


@each_method
@pytest.mark.parametrize(
    ("case", "stride"),
    [("with batch norm", 3), ("attention", 2), pytest.param("with batch norm", 1, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name: str, case: str, stride: int, tmp_path: Path):
    asked = {"calibration": CASES[case].inputs(), "budget": budget_of(name, case), "batch_size": 8, **parts(name)}
    model = CASES[case].model(name)
    whole = prune(model, **asked, save_to=tmp_path / "whole")
    lines = _lines(tmp_path / "whole")
    small = "model.slim.safetensors" if name.endswith(ON_CHANNELS) else "model.bitmask.safetensors"
    run = tmp_path / "parts"
    stride += 5 if needs_blocks(name) else 0  # the inputs of a block are made again first, a part a step
    starts, result = in_parts(stride, lambda stop: prune(model, **asked, save_to=run, should_stop=stop), run)
    assert starts == max(-(-len(_lines(run)) // stride), 1)
    assert same(result.candidate, whole.candidate)
    files = ["model.safetensors", small, "allocation.json"]
    if needs_blocks(name):
        assert starts > 1
        assert [{**line, "forward": 0} for line in _lines(run) if "again" not in line] == [
            {**line, "forward": 0} for line in lines
        ]
        assert result.log.backward == whole.log.backward and result.log.forward > whole.log.forward
    else:
        files.append("steps.jsonl")
        assert (result.log.forward, result.log.backward) == (whole.log.forward, whole.log.backward)
    for file in files:
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not list(run.glob("state-*"))


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def in_parts(stride: int, start: Callable[[Callable[[], bool]], Result], run: Path) -> tuple[int, Result]:
    """How often a run was started that stops after `stride` steps each time, and what came of it."""
    for starts in range(1, 200):
        asked = iter([False] * stride)
        try:
            return starts, start(lambda asked=asked: next(asked, True))
        except Stopped:
            assert json.loads((run / "run.json").read_text())["state"] == "stopped"
            torch.load(next(run.glob("state-*.pt")), weights_only=True)
    raise AssertionError("it makes no headway")


@each_method
def test_a_state_is_tensors_numbers_and_words_at_every_step(name: str):
    whole, method = finished_run(name, "attention"), METHODS[name]
    problem, candidate = whole.problem, whole.given
    state = method.init(problem, candidate)
    for count in itertools.count(1):
        assert 0 <= state["step"] <= state["steps"]
        loaded = _through_a_file(state)
        if not needs_blocks(name) or count % 6 == 0:  # the inputs of a block are made again first, a part a step
            state = loaded
        if finished(state):
            break
        method.step(problem, candidate, state)
    assert same(method.finish(problem, candidate, state), whole.result)


def _through_a_file(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@each_method
def test_a_docstring_names_every_key_of_a_state_at_every_step(name: str):
    for case in ("attention", "with batch norm"):
        _names_every_key(METHODS[name], finished_run(name, case).states)


@pytest.mark.parametrize("method", [Selection(), Streamed(allot.METHODS["variance"], torch.device("cpu"))])
def test_so_do_the_methods_that_have_no_name(method: Method):
    problem = problem_of("linear chain")
    watched = Watched(method)
    drive(watched, problem, before("uniform" if isinstance(method, Selection) else "variance", problem))
    _names_every_key(method, watched.states)


def _names_every_key(method: Method, states: list[State]) -> None:
    assert states
    for state in states:
        assert state.keys() <= keys_named_by(type(method)), type(method)
        for key, kind in (("training", Training), ("trial", Trial)):
            assert state.get(key, {}).keys() <= keys_named_by(kind), kind


def keys_named_by(kind: type) -> set[str]:
    """What the section `State:` of a class names, and `step` and `steps`."""
    section = re.search(r"^State:\n((?:    .*\n?)+)", inspect.cleandoc(kind.__doc__ or ""), flags=re.MULTILINE)
    assert section, f"{kind.__name__} has no section State:"
    entries = re.findall(r"^    (\w+(?:, \w+)*): ", section[1], flags=re.MULTILINE)
    return {"step", "steps"}.union(*(entry.split(", ") for entry in entries))


@each_method
def test_it_stops_within_a_step(name: str):
    problem = shared_problem(name=name)
    candidate = before(name, problem)
    available = METHODS[name].init(problem, candidate)["steps"]
    for steps in range(min(3, available)):
        taken: list[int] = []
        with pytest.raises(Stopped, match=f"after step {steps} of {available}"):
            drive(
                METHODS[name],
                problem,
                candidate,
                on_step=lambda progress, taken=taken: taken.append(progress.step),
                should_stop=lambda steps=steps, taken=taken: len(taken) == steps,
            )
        assert taken == list(range(1, steps + 1))


# what it tells


@each_method
@pytest.mark.parametrize("case", ["with batch norm", "attention"])
def test_metrics_are_finite_and_count_every_sample_pushed_through_the_model(name: str, case: str):
    seen = finished_run(name, case)
    numbers = [value for metrics in seen.metrics for value in metrics.values()]
    assert all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    assert {key: sum(metrics[key] for metrics in seen.metrics) for key in seen.pushed} == seen.pushed
    assert (seen.log.forward, seen.log.backward) == (seen.pushed["forward"], seen.pushed["backward"])


@each_method
def test_a_method_leaves_its_candidate_as_it_was(name: str):
    seen = finished_run(name)
    assert same(seen.given, seen.given_before)
    effective = seen.given.effective(seen.problem)
    assert {key: bits(value) for key, value in effective.items()} == seen.effective_before


@pytest.mark.parametrize("name", allot.RECIPES)
def test_a_recipe_is_made_of_known_parts_and_runs(name: str, monkeypatch: pytest.MonkeyPatch):
    for part, method in allot.METHODS.items():
        monkeypatch.setitem(allot.METHODS, part, short(method))
    result = prune(convolutions(), CASES["with batch norm"].inputs(), "sparsity=0.7", method=name, batch_size=8)
    assert result.report()["method"] == name
    exact = round(0.3 * result.report()["total"])
    assert result.report()["kept"] == exact or (result.problem.scope.groups and result.report()["kept"] < exact)
