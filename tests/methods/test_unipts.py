"""UniPTS' training: the falling base is a scale, masks move and stay exact, and nothing of it is lost in the file."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import allot
from allot.errors import UsageError
from allot.methods import METHODS
from allot.methods.distill import Distill
from allot.methods.training.distillation import Training
from allot.methods.training.losses import compared
from allot.methods.training.schedule import Schedule
from allot.methods.training.selection import Selection
from allot.methods.unipts import Unipts, exchanged, scale
from allot.run.driver import drive
from allot.run.patterns import NM, select
from allot.run.problem import Candidate, Problem, finished
from contract.cases import CASES, bits, convolutions, problem_of, same

PLAIN = Schedule(every=1, freeze_at=1.0)


def started(problem: Problem) -> Candidate:
    return drive(Selection(), problem, drive(METHODS["uniform"], problem, Candidate.dense(problem)))


def states(method: Unipts, problem: Problem) -> list[dict[str, Any]]:
    """The state after every step."""
    candidate = started(problem)
    state, found = method.init(problem, candidate), []
    while not finished(state):
        method.step(problem, candidate, state)
        masks = {name: mask.clone() for name, mask in state["masks"].items()}
        tensors = {name: value.clone() for name, value in state["training"]["tensors"].items()}
        found.append({"masks": masks, "tensors": tensors})
    return found


# the objective


@pytest.mark.parametrize("t", [0, 1, 50, 99])
def test_a_falling_base_of_the_logarithm_is_a_scale_on_the_gradient(t: int):
    torch.manual_seed(0)
    y, z = 3 * torch.randn(16, 10, dtype=torch.float64), torch.randn(16, 10, dtype=torch.float64, requires_grad=True)
    base = 8 * 0.99**t  # ln b_t of the authors' code, over 100 epochs
    Z = (y / 4).softmax(1)
    in_that_base = 16 * (Z * (Z.log() - z.log_softmax(1) / base)).sum(1).mean()
    (theirs,) = torch.autograd.grad(in_that_base, z)
    (ours,) = torch.autograd.grad(compared([z], [y], "kl", 4.0, 1.0), z)
    assert torch.allclose(theirs, ours * scale(t, 100, 0.99**100) / 8, rtol=1e-9, atol=1e-15)


def test_under_sgd_the_scale_is_on_the_gradient_itself():
    problem = problem_of("linear chain")
    tensors = []
    for s, factor in ((2.5, 1.0), (1.0, 2.5)):
        training = Training(learning_rate=0.1, optimizer="sgd", loss="mse")
        state = training.begin(problem, Candidate.dense(problem))
        training.update(state, {"0.weight": factor * torch.ones(8, 6)}, scale=s)
        tensors.append(state["tensors"]["0.weight"])
        assert torch.allclose(problem.dense["0.weight"] - tensors[-1], torch.tensor(0.1 * 0.1 * 2.5), rtol=1e-4)
    assert torch.allclose(*tensors)


def test_the_value_that_is_reported_is_the_divergence_itself():
    problem = problem_of("without batch norm", "sparsity=0.5")
    metrics: list[dict[str, Any]] = []
    for base_decay in (1.0, 0.1):
        told: list[Any] = []
        method = Unipts(Training(steps=3, learning_rate=0.0), PLAIN, base_decay=base_decay)
        drive(method, problem, started(problem), on_step=told.append)
        metrics.append([progress.metrics["loss"] for progress in told])
    assert metrics[0] == metrics[1] and min(metrics[0]) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_of_its_own_temperature_loses_confidence_and_one_of_the_teachers_does_not(temperature: float):
    y = 5 * torch.randn(8, 6, dtype=torch.float64)
    for student_temperature, best in ((None, y), (1.0, y / temperature)):
        T_s = temperature if student_temperature is None else student_temperature
        z = best.clone().requires_grad_()
        loss = compared([z], [y], "kl", temperature, T_s)
        assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
        assert torch.allclose(torch.autograd.grad(loss, z)[0], torch.zeros_like(z), atol=1e-12)


# dynamic masks


def test_with_everything_off_it_is_distillation():
    problem = problem_of("with batch norm")
    training = Training(steps=9)
    ours, theirs = (drive(kind(training, PLAIN), problem, started(problem)) for kind in (Unipts, Distill))
    assert same(ours, theirs)


@pytest.mark.parametrize("growth", ["score", "gradient", "saliency"])
@pytest.mark.parametrize("ramp", [1.0, 6.0])
def test_counts_are_exact_in_every_step(growth: str, ramp: float):
    problem = problem_of("without batch norm", "sparsity=0.8")
    schedule = Schedule(every=1, freeze_at=0.8, ramp=ramp)
    method = Unipts(Training(steps=20), schedule, growth=growth, decay=0.1, base_decay=0.5)
    moved = set()
    for t, state in enumerate(states(method, problem)):
        allowed = schedule.budget(problem.budget, t, 20)
        kept = {name: int(mask.sum()) for name, mask in state["masks"].items()}
        assert kept == allowed.counts(started(problem).allocation) and allowed.meets(kept)
        moved.add(tuple(bits(mask) for mask in state["masks"].values()))
    assert len(moved) > 3
    assert kept == started(problem).allocation.kept


def test_masks_rest_in_the_tail():
    steps = states(Unipts(Training(steps=20), Schedule(every=1, freeze_at=0.5)), problem_of("without batch norm"))
    frozen = [[bits(mask) for mask in state["masks"].values()] for state in steps[10:]]
    assert all(masks == frozen[0] for masks in frozen)
    assert [bits(mask) for mask in steps[3]["masks"].values()] != frozen[0]


def test_pruned_weights_shrink_and_kept_ones_do_not():
    problem = problem_of("linear chain")
    still = Schedule(freeze_at=0.0)
    quiet, decaying = (states(Unipts(Training(steps=3), still, decay=decay), problem) for decay in (0.0, 2.0))
    for name, mask in quiet[0]["masks"].items():
        without, found = quiet[0]["tensors"][name], decaying[0]["tensors"][name]
        assert torch.equal(found[mask], without[mask])
        # the first step of ten of warm-up
        assert torch.allclose(found[~mask], without[~mask] * (1 - 2.0 * 0.05 * 0.1))


@pytest.mark.parametrize("f", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kept", [1, 6, 10])
def test_an_exchange_keeps_the_best_and_grows_by_the_criterion(f: float, kept: int):
    torch.manual_seed(kept)
    score, growth = torch.randperm(20).float(), torch.randperm(20).float()
    before = select(torch.rand(20), 8)
    mask = select(exchanged(score, growth, before, f, kept), kept)
    stay = max(min(8, kept) - math.floor(f * kept), 0)
    old = sorted((i for i in range(20) if before[i]), key=lambda i: -score[i])[:stay]
    others = sorted(set(range(20)) - set(old), key=lambda i: -growth[i])[: kept - stay]
    assert set(mask.nonzero().flatten().tolist()) == {*old, *others}


def test_growth_keeps_to_the_pattern():
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    options = {"unipts": {"steps": 8, "every": 1, "growth": "gradient", "ramp": 1}}
    result = allot.prune(
        model, inputs, "sparsity=0.5", allocate="uniform", pattern="2:4", repair="unipts", options=options
    )
    for name, mask in result.masks.items():
        assert bool((result.problem.scope[name].matrix(mask).unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert isinstance(result.problem.pattern, NM)


def test_channels_last_changes_nothing():
    inputs = CASES["without batch norm"].inputs()
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = convolutions(norm=False).to(memory_format=memory_format)
        given = inputs.contiguous(memory_format=memory_format)
        options = {"unipts": {"steps": 12, "every": 1, "optimizer": "sgd", "learning_rate": 0.01}}
        found.append(allot.prune(model, given, "sparsity=0.7", allocate="erk", repair="unipts", options=options))
    one, other = found
    assert one.allocation.kept == other.allocation.kept
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-4), name


def test_it_trains_under_autocast():
    inputs = CASES["with batch norm"].inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result = allot.prune(
            convolutions(), inputs, "sparsity=0.7", method="unipts", options={"unipts": {"steps": 6, "every": 1}}
        )
    assert all(value.dtype == torch.float32 for value in result.state_dict().values() if value.is_floating_point())
    assert sum(int(mask.sum()) for mask in result.masks.values()) == round(0.3 * result.problem.budget.total)


def test_a_file_opened_by_plain_pytorch_answers_bit_for_bit_alike(tmp_path):
    inputs = CASES["with batch norm"].inputs()
    options = {"unipts": {"steps": 6, "every": 1}}
    result = allot.prune(
        convolutions(), inputs, "sparsity=0.7", method="unipts", options=options, batch_size=8, save_to=tmp_path / "run"
    )
    plain = convolutions()
    plain.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(plain.eval()(inputs), result.model().eval()(inputs))


@pytest.mark.parametrize(
    "wrong", [{"base_decay": 0}, {"base_decay": 1.5}, {"decay": -1}, {"growth": "size"}, {"exchange": 2}]
)
def test_a_value_out_of_its_range_is_refused(wrong: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        replace(Unipts(), **wrong)


def test_any_allocator_goes_with_any_repair_and_a_recipe_lends_its_allocator():
    inputs = CASES["without batch norm"].inputs()
    short = {"steps": 3}
    for allocate, repair in (("fcpts", "unipts"), ("unipts", "layerwise"), ("pot", "distill"), ("knapsack", "unipts")):
        name = {"unipts": "unipts-search", "pot": "global-normalised"}.get(allocate, allocate)
        options = {repair: short} | ({"fcpts": short} if allocate == "fcpts" else {})
        result = allot.prune(
            CASES["without batch norm"].make(),
            inputs,
            "sparsity=0.6",
            allocate=allocate,
            repair=repair,
            options=options,
        )
        assert result.report()["kept"] == round(0.4 * result.problem.budget.total), name


def test_a_step_under_sgd_is_the_hand_written_one():
    problem = problem_of("linear chain", "sparsity=0.5")
    training = Training(steps=4, learning_rate=0.1, optimizer="sgd", loss="mse")
    plain, falling = (states(Unipts(training, PLAIN, base_decay=decay), problem) for decay in (1.0, 0.25))
    dense, name = problem.dense, "0.weight"
    # the first step is of scale 1, the second of 0.25 ** (-1/4), on the same momentum
    assert torch.equal(plain[0]["tensors"][name], falling[0]["tensors"][name])
    moved = [state[1]["tensors"][name] - state[0]["tensors"][name] for state in (plain, falling)]
    assert torch.allclose(moved[1], moved[0] * 0.25**-0.25, rtol=1e-3, atol=1e-7)
    assert not torch.equal(plain[0]["tensors"][name], dense[name])


@pytest.mark.parametrize("growth", ["gradient", "saliency"])
@pytest.mark.parametrize(("step", "share"), [(0, 0.4), (10, 0.2), (20, 0.0)])
def test_what_grows_is_what_the_criterion_says_and_less_and_less_of_it(growth: str, step: int, share: float):
    problem = problem_of("linear chain", "sparsity=0.5")
    method = Unipts(Training(steps=20), PLAIN, growth=growth, exchange=0.4)
    layer, w = problem.scope["2.weight"], problem.dense["2.weight"]
    G = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    before = select(torch.rand(w.shape, generator=torch.Generator().manual_seed(2)), 30)
    training = {"tensors": {layer.name: w}, "mean": {layer.name: G}}
    state = {"training": training, "masks": {layer.name: before}, "step": step, "steps": 21}
    evidence: Any = None
    mask = method._mask(problem, state, layer, evidence, 30)
    criterion = G.abs() if growth == "gradient" else (G * w).abs()
    assert torch.equal(mask, select(exchanged(w.abs(), criterion, before, share, 30), 30))


def test_models_of_other_outputs_go_through_the_whole_recipe():
    class Both(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, classes))

        def forward(self, x):
            return {"answer": self.inside(x)}

    inputs = torch.randn(24, 6)
    for classes, loss in ((4, "kl"), (1, "mse")):
        told = {"outputs": lambda output: output["answer"], "loss": loss, "learning_rate": 0.05}
        options = {"unipts": {"steps": 3, **told}, "fcpts": {"steps": 3, **told}}
        result = allot.prune(Both(classes), inputs, "sparsity=0.5", method="unipts", options=options)
        assert result.log.backward == 2 * 3 * 21
        given = {"unipts-search": {"starts": ["erk", "lamp"], "steps": 2, **told}, "unipts": {"steps": 3, **told}}
        result = allot.prune(Both(classes), inputs, "sparsity=0.5", method="unipts", options=given)
        assert {row["name"] for row in result.report()["diagnostics"]["search"]["tried"]} <= {"erk", "lamp"}
