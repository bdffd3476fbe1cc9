"""Repairs block by block give what they give on the whole net, and go on where they were stopped."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot import METHODS, Budget, Calibration, Rules, Unstructured, UsageError, prune
from allot.errors import Stopped
from allot.methods.layerwise.streamed import Streamed
from allot.methods.training.selection import Selection
from allot.network.call import call
from allot.pruning.setup import make_problem
from allot.run.driver import Progress, drive
from allot.run.problem import Candidate, Method, Problem, finished
from cli.command import MLP, SAMPLES, run
from contract.cases import same
from methods.layerwise.nets import NETS, TRANSFORMERS, Case, Encoder, words

REPAIRS: dict[str, Method] = {
    "bn": METHODS["bn"],
    "bias": METHODS["bias"],
    "variance": METHODS["variance"],
    "layerwise": replace(METHODS["layerwise"], steps=4),
    "lstsq": replace(METHODS["lstsq"], iterations=2),
    "admm": replace(METHODS["admm"], iterations=6, refinement=5),
}
CPU = torch.device("cpu")


def posed(case: Case, *, pattern: Any = None, batch_size: int = 4, **rules: Any) -> tuple[Problem, Candidate]:
    inputs = Calibration.of(case.inputs(), batch_size=batch_size)
    problem = make_problem(
        case.model(), Budget(sparsity=0.5), pattern or Unstructured(), calibration=inputs, rules=Rules(**rules)
    )
    return problem, drive(Selection(), problem, drive(METHODS["uniform"], problem, Candidate.dense(problem)))


def agree(found: Candidate, wanted: Candidate, problem: Problem, *, nothing: bool = False) -> None:
    """To a thousandth of what the repair changed; it changed something, or `nothing`."""
    assert bool(wanted.tensors) is not nothing
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, value in wanted.tensors.items():
        width = 1e-3 * float((value - problem.dense[name]).abs().max()) + 1e-7
        torch.testing.assert_close(found.tensors[name], value, rtol=1e-4, atol=width)


# as on the whole net


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("net", NETS)
def test_a_streamed_repair_is_that_of_the_whole_net(net: str, repair: str):
    problem, candidate = posed(NETS[net])
    whole = drive(REPAIRS[repair], problem, candidate)
    nothing = (net, repair) == ("encoder", "bn")
    agree(drive(Streamed(REPAIRS[repair], CPU), problem, candidate), whole, problem, nothing=nothing)


SLOW = ("bert with padding", "gemma 3, two kinds of masks", "vit")


@pytest.mark.parametrize(
    "net", [pytest.param(net, marks=pytest.mark.slow) if net in SLOW else net for net in TRANSFORMERS]
)
def test_blocks_of_transformers_are_repaired_as_in_the_whole_net(net: str):
    problem, candidate = posed(TRANSFORMERS[net])
    for repair in ("layerwise",) if net == "llama" else ("variance", "layerwise"):
        whole = drive(REPAIRS[repair], problem, candidate)
        agree(drive(Streamed(REPAIRS[repair], CPU), problem, candidate), whole, problem)
        assert len(whole.tensors) >= 3 * 6


def test_one_repair_after_another_goes_by_what_the_first_one_left():
    problem, candidate = posed(NETS["stages"])
    whole = found = candidate
    for repair in ("variance", "lstsq", "bn", "bias"):
        whole = drive(REPAIRS[repair], problem, whole)
        found = drive(Streamed(REPAIRS[repair], CPU), problem, found)
    agree(found, whole, problem)


def test_channels_are_repaired_block_by_block_too():
    problem, candidate = posed(NETS["stages"], pattern=allot.Channels())
    whole = drive(REPAIRS["lstsq"], problem, candidate)
    agree(drive(Streamed(REPAIRS["lstsq"], CPU), problem, candidate), whole, problem)


def test_on_sparse_inputs_a_block_sees_finished_ones_and_answers_as_well():
    problem, candidate = posed(NETS["row"])
    method = replace(METHODS["layerwise"], steps=30, inputs="sparse")
    inputs = problem.inputs().pick(range(10))
    dense = call(problem.model, {}, inputs)

    def off(found: Candidate) -> float:
        return float((call(problem.model, found.effective(problem), inputs) - dense).square().mean().detach())

    whole, streamed = drive(method, problem, candidate), drive(Streamed(method, CPU), problem, candidate)
    assert off(streamed) < 1.05 * off(whole) < 0.7 * off(candidate)


def test_layers_before_between_and_behind_may_be_left_out():
    problem, candidate = posed(NETS["encoder"], exclude=("into", "layers.1.*", "head"))
    for repair in ("variance", "lstsq"):
        whole = drive(REPAIRS[repair], problem, candidate)
        agree(drive(Streamed(REPAIRS[repair], CPU), problem, candidate), whole, problem)
    assert not [name for name in whole.tensors if name.startswith(("into", "layers.1.", "head"))]


def test_of_one_sample_too():
    case = Case(NETS["encoder"].make, lambda: words()[:1])
    problem, candidate = posed(case)
    whole = drive(REPAIRS["lstsq"], problem, candidate)
    agree(drive(Streamed(REPAIRS["lstsq"], CPU), problem, candidate), whole, problem)


# steps, stopping, going on


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("repair", ["bn", "bias", "lstsq"])
def test_a_state_that_is_loaded_goes_on_to_the_same_bits(repair: str):
    problem, candidate = posed(NETS["stages"])
    method = Streamed(REPAIRS[repair], CPU)
    state = method.init(problem, candidate)
    for stop in (1, 5, 8):
        while state["step"] < stop and not finished(state):
            method.step(problem, candidate, state)
        method, state = Streamed(REPAIRS[repair], CPU), reloaded(state)
    while not finished(state):
        method.step(problem, candidate, state)
    whole = drive(Streamed(REPAIRS[repair], CPU), problem, candidate)
    assert same(method.finish(problem, candidate, state), whole)


def test_a_run_that_was_stopped_goes_on_with_the_same_call(tmp_path: Path):
    case = NETS["encoder"]
    told: list[Progress] = []
    few = {"layerwise": {"steps": 4}}

    def once(**more: Any) -> allot.Result:
        return prune(
            case.model(), case.inputs(), "sparsity=0.5", repair="variance,layerwise", options=few, stream="cpu", **more
        )

    done = once(on_step=told.append)
    steps = [step for step in told if step.stage == "repair-2-layerwise"]
    assert len(steps) == steps[0].steps == steps[-1].steps  # known from the first one on
    many = iter(range(10**6))
    with pytest.raises(Stopped):
        once(save_to=tmp_path / "run", should_stop=lambda: next(many) > len(told) - 4)
    result = once(save_to=tmp_path / "run")
    assert same(result.candidate, done.candidate) or all(
        torch.equal(value, done.candidate.effective(done.problem)[name])
        for name, value in result.candidate.effective(result.problem).items()
    )
    with pytest.raises(UsageError, match="stream was cpu"):
        prune(
            case.model(),
            case.inputs(),
            "sparsity=0.5",
            repair="variance,layerwise",
            options=few,
            save_to=tmp_path / "run",
        )


def test_samples_are_read_once_and_passes_counted_as_of_the_whole_net():
    class Read:
        def __init__(self) -> None:
            self.data, self.read = words(), 0

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Tensor:
            self.read += 1
            return self.data[index]

    data = Read()
    problem, candidate = posed(NETS["encoder"], exclude=("into", "head"), batch_size=10)
    problem = replace(problem, calibration=Calibration.of(data, batch_size=10))
    log = allot.run.store.Log()
    drive(Streamed(replace(REPAIRS["layerwise"], steps=10), CPU), problem, candidate, log=log)
    assert data.read < 5 * len(data)  # to find blocks, and before the first one
    assert 0.8 * 100 <= log.forward <= 13 * 10  # as on the whole net, and once to make inputs


def test_the_model_is_left_alone():
    problem, candidate = posed(NETS["encoder"])
    before = copy.deepcopy(problem.model.state_dict())
    modules = list(problem.model.named_modules())
    drive(Streamed(REPAIRS["layerwise"], CPU), problem, candidate)
    after = problem.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(problem.model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in problem.model.modules())


# what cannot be


class Skip(Encoder):
    """What the first layer gives is used again behind the last one."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.into(self.words(words))
        mask = torch.zeros(words.shape[1], words.shape[1], dtype=torch.bool)
        kept = []
        for layer in self.layers:
            x = layer(x, mask, factor=torch.ones(()))[0]
            kept.append(x)
        return self.head(self.norm(x + kept[0]))


class Moody(Encoder):
    """The mask comes with some samples only."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.into(self.words(words))
        mask = None if bool((words[:, 0] < 15).all()) else torch.zeros(words.shape[1], words.shape[1]).bool()
        for layer in self.layers:
            x = layer(x, mask, factor=torch.ones(()))[0]
        return self.head(self.norm(x))


def moody_words() -> Tensor:
    found = words()
    found[:, 0] = 0
    found[7, 0] = 19
    return found


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case(Skip, words), "do not give what the model gives"),
        (Case(Moody, moody_words), "other arguments for some samples"),
        (Case(lambda: nn.Sequential(nn.Linear(3, 3)), lambda: torch.randn(4, 3)), "no blocks"),
    ],
)
def test_what_does_not_hold_for_blocks_is_an_error(case: Case, said: str):
    problem, candidate = posed(case)
    with pytest.raises(UsageError, match=said):
        drive(Streamed(REPAIRS["layerwise"], CPU), problem, candidate)


def whole_net() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"method": "fcpts"}, "fcpts needs the whole net.*uniform, erk, lamp"
    yield {"method": "unipts"}, "unipts-search needs the whole net"
    yield {"allocate": "knapsack"}, "knapsack needs the whole net"
    yield (
        {"method": "uniform", "score": "taylor", "pattern": "channels"},
        "score taylor needs the whole net; magnitude does not",
    )
    yield (
        {"repair": "bn,distill"},
        "distill needs the whole net.*bn, bias, variance, layerwise, lstsq, blocks, weight-moments",
    )
    yield {"stream": "nonsense"}, "no such device"
    if not torch.cuda.is_available():
        yield {"stream": "cuda"}, "no such device"


@pytest.mark.parametrize(("arguments", "said"), list(whole_net()))
def test_what_needs_the_whole_net_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], said: str
):
    case = NETS["encoder"]
    with pytest.raises(UsageError, match=said):
        prune(case.model(), case.inputs(), "sparsity=0.5", save_to=tmp_path / "run", **{"stream": "cpu"} | arguments)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="Distill needs the whole net"):
        Streamed(METHODS["distill"], CPU)


@pytest.mark.parametrize("method", ["pot", "global"])
def test_recipes_without_passes_of_the_whole_net_stream(method: str):
    case = NETS["stages"]
    options = {"layerwise": {"steps": 5}} if method == "pot" else {}
    make: Callable[..., allot.Result] = lambda **more: prune(  # noqa: E731
        case.model(),
        case.inputs(),
        "sparsity=0.6",
        method=method,
        batch_size=3,
        options=options,
        batch_norm="batch",
        **more,
    )
    agree(make(stream="cpu").candidate, (whole := make()).candidate, whole.problem)


def test_minutes_and_the_command_line_take_it(tmp_path: Path):
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair variance --samples 16"
    said = run(f"{line} --stream cpu --max-minutes 5 --out {tmp_path / 'run'}")
    assert said.code == 0, said.err
    assert "stream: cpu" in (tmp_path / "run" / "recipe.yaml").read_text()
    said = run(f"{line} --allocate knapsack --set stream=cpu --out {tmp_path / 'other'}")
    assert said.code == 2 and "knapsack needs the whole net" in said.err
