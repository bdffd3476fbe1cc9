"""FCPTS: budgets in every step, updates that keep the cost, a known optimum; the paper's thresholds and bridge."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import allot
from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import UsageError
from allot.methods import METHODS
from allot.methods.fcpts import Fcpts, FcptsPaper, bridge, keep, moved, pruned
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.methods.training.trial import Trial
from allot.network.layers import Rules
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import Progress, drive
from allot.run.patterns import NM, Unstructured
from allot.run.problem import Candidate, Problem
from allot.run.scores import wanda
from allot.sources import zoo
from contract.cases import CASES, problem_of

UNIFORM, ERK = METHODS["uniform"], METHODS["erk"]
FORMS: dict[str, Any] = {
    "fcpts": Fcpts(ERK, Training(steps=12)),
    "fcpts-paper": FcptsPaper(ERK, Training(steps=12, learning_rate=0.01, temperature=4.0)),
}


def told(method: Any, problem: Problem) -> tuple[Candidate, list[Progress]]:
    steps: list[Progress] = []
    return drive(method, problem, Candidate.dense(problem), on_step=steps.append), steps


# the budget


@pytest.mark.parametrize("sparsity", [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55])
@pytest.mark.parametrize("more", [0, 0.44])
@pytest.mark.parametrize("form", FORMS)
def test_the_target_is_met_to_the_last_weight(form: str, sparsity: float, more: float):
    problem = problem_of("without batch norm", f"sparsity={min(sparsity + more, 0.99)}")
    short = replace(FORMS[form], training=replace(FORMS[form].training, steps=3))
    candidate, _ = told(short, problem)
    wanted = round((1 - min(sparsity + more, 0.99)) * problem.budget.total)
    assert sum(candidate.allocation.kept.values()) == wanted
    assert sum(int(mask.sum()) for mask in candidate.masks.values()) == wanted


@pytest.mark.parametrize(
    ("case", "budget"),
    [
        ("with batch norm", "sparsity=0.9"),
        ("with batch norm", "macs=30%"),
        ("with batch norm", "bytes=75%"),
        ("attention", "params=21%"),
        ("attention", "macs=40%,sparsity=0.7"),
        ("tied weights", "macs=30%"),
    ],
)
def test_the_budget_of_every_step_is_met_and_not_one_more_weight_fits(case: str, budget: str):
    problem = problem_of(case, budget)
    method = Fcpts(UNIFORM, Training(steps=24), Schedule(every=2, ramp=4.0), distance=3.0)
    _, steps = told(method, problem)
    totals = {layer.name: layer.total for layer in problem.scope}
    scheduled = []
    for t, progress in enumerate(steps[1:]):  # the first is the start's
        budget_t = method.schedule.budget(problem.budget, t, 24)
        if t % 2 == 0 and t <= method.schedule.last(24):
            kept = {name: round(progress.metrics[f"density.{name}"] * total) for name, total in totals.items()}
            assert budget_t.meets(kept)
            for term in budget_t.terms:
                more = kept | {term.name: kept[term.name] + 1}
                assert kept[term.name] == term.upper or not budget_t.fits(more)
            scheduled.append(progress.metrics)
        for limit in budget_t.limits:
            assert progress.metrics[f"limit.{limit.kind}"] == limit.ceiling
            assert progress.metrics[f"cost.{limit.kind}"] == budget_t.cost(limit.kind, kept) <= limit.ceiling
    first, last = scheduled[0], scheduled[-1]
    for limit in problem.budget.limits:
        assert first[f"limit.{limit.kind}"] > last[f"limit.{limit.kind}"] == limit.ceiling


@settings(deadline=None, max_examples=60)
@given(
    data=some.data(),
    sparsity=some.floats(0.05, 0.97),
    eta=some.floats(0, 2),
    kind=some.sampled_from(["params", "macs"]),
)
def test_an_update_keeps_the_cost_and_the_bounds(data: Any, sparsity: float, eta: float, kind: str):
    sizes = data.draw(some.lists(some.integers(1, 3000), min_size=2, max_size=8))
    terms = tuple(
        Term(f"{i}", n, lower=1, upper=max(1, n - n // 9), macs=n * data.draw(some.integers(1, 50)))
        for i, n in enumerate(sizes)
    )
    budget = Budget.parse(f"{kind}={100 * (1 - sparsity):.3f}%")
    try:
        budget = budget.on(terms)
    except allot.BudgetError:
        return  # the floors alone cost more
    b = data.draw(some.lists(some.floats(0, 1e3), min_size=len(sizes), max_size=len(sizes)))
    before = budget.project({term.name: 1.0 for term in terms})
    after = moved(budget, before, dict(zip(before, b, strict=True)), eta)

    def cost(density: Any) -> float:
        return sum(density[t.name] * (t.total if kind == "params" else t.macs) for t in terms)

    assert cost(after) - cost(before) == pytest.approx(0, abs=1e-6 * cost(dict.fromkeys(before, 1.0)))
    for term in terms:
        assert term.lower / term.total - 1e-12 <= after[term.name] <= term.upper / term.total + 1e-12


def test_equal_signals_move_nothing_and_the_dearer_layer_needs_the_larger_one():
    terms = (Term("a", 100, macs=100), Term("b", 100, macs=400))
    params, macs = Budget(params="50%").on(terms), Budget(macs="50%").on(terms)
    half, same = {"a": 0.5, "b": 0.5}, {"a": 2.0, "b": 2.0}
    assert moved(params, half, same, 0.3) == pytest.approx(half)
    per_mac = {"a": 1.0, "b": 4.0}
    assert moved(macs, half, per_mac, 0.3) == pytest.approx(half)
    after = moved(macs, half, same, 0.3)  # the same signal for four times the price
    assert after["a"] > 0.5 > after["b"]


# what is learned


class TwoLayers(nn.Module):
    """Both layers read the same input; the outputs stand side by side."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.small, self.large = nn.Linear(40, 50, bias=False), nn.Linear(40, 50, bias=False)
        with torch.no_grad():
            self.small.weight.copy_(torch.rand(50, 40, generator=generator))
            self.large.weight.copy_(2 * torch.rand(50, 40, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.small(x), self.large(x)], 1)


def test_a_quadratic_with_a_known_optimum_ends_at_equal_marginal_cost():
    # inputs with x^T x = 1: the error is the sum of the squares of what is pruned, so that the best allocation is the
    # global ranking by magnitude; weights stay as they are
    model, inputs = TwoLayers(), torch.eye(40) * math.sqrt(40)
    calibration = Calibration.of(inputs, batch_size=40)
    problem = make_problem(model, Budget(sparsity=0.6), Unstructured(), calibration=calibration)
    method = Fcpts(
        UNIFORM,
        Training(steps=200, loss="mse", learning_rate=0.0),
        Schedule(every=1, ramp=1.0, freeze_at=1.0),
        learn_from=0.0,
        distance=6.0,
        window=0.02,
    )
    candidate, _ = told(method, problem)
    best = drive(METHODS["global"], problem, Candidate.dense(problem)).allocation
    start = drive(UNIFORM, problem, Candidate.dense(problem)).allocation
    assert abs(best["small.weight"] - start["small.weight"]) > 0.15
    assert dict(candidate.allocation) == pytest.approx(dict(best), abs=0.01)
    gain = candidate.diagnostics["fcpts"]["gain"]
    assert gain["small.weight"] == pytest.approx(gain["large.weight"], rel=0.1)


def test_without_distance_the_start_is_kept():
    problem = problem_of()
    candidate, _ = told(Fcpts(ERK, Training(steps=12), distance=0.0), problem)
    assert candidate.allocation.kept == drive(ERK, problem, Candidate.dense(problem)).allocation.kept


@pytest.mark.parametrize("start", ["uniform", "lamp", "auto"])
def test_it_starts_from_any_allocator(start: str):
    method: Any = METHODS[start]
    if start == "auto":
        method = replace(method, trial=Trial(Training(steps=3)))
    problem = problem_of()
    candidate, steps = told(Fcpts(method, Training(steps=6), Schedule(ramp=1.0)), problem)
    started = drive(method, problem, Candidate.dense(problem))
    assert candidate.diagnostics["fcpts"]["trajectory"][0]["kept"] == started.allocation.kept
    assert ("auto" in candidate.diagnostics) == (start == "auto")
    assert [progress.step for progress in steps] == list(range(1, steps[-1].steps + 1))


def test_it_starts_from_an_allocation_file(tmp_path: Path):
    model, inputs = CASES["linear chain"].make(), CASES["linear chain"].inputs()
    wished = {"0.weight": 0.9, "1.weight": 0.1, "2.weight": 0.4}
    (tmp_path / "wish.json").write_text(json.dumps(wished))
    options = {"fcpts": {"start": str(tmp_path / "wish.json"), "steps": 6, "ramp": 1.0}}
    result = allot.prune(model, inputs, "params=61", method="fcpts", options=options)
    given = allot.prune(model, inputs, "params=61", allocate=wished, repair="none").allocation
    assert result.report()["diagnostics"]["fcpts"]["trajectory"][0]["kept"] == given.kept


def test_caps_floors_and_another_score_hold_while_densities_move():
    model, inputs = CASES["attention"].make(), CASES["attention"].inputs()
    rules = Rules(min_density={"out": 0.5}, max_density={"attention": 0.2})
    options = {"fcpts": {"start": "uniform", "steps": 20, "every": 1, "distance": 5.0}}
    result = allot.prune(
        model, inputs, "sparsity=0.8", method="fcpts", score=wanda, rules=rules, options=options, batch_size=8
    )
    trajectory = result.report()["diagnostics"]["fcpts"]["trajectory"]
    total = result.allocation.total
    assert all(row["kept"]["out.weight"] >= 0.5 * total["out.weight"] for row in trajectory)
    assert all(row["kept"]["attention.in_proj_weight"] <= 0.2 * total["attention.in_proj_weight"] for row in trajectory)
    assert result.log.forward > 20 * 20 // 8  # the score looked at the inputs as well


def test_it_chooses_n_for_every_layer_of_an_n_to_m_pattern():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    problem = make_problem(model, Budget(sparsity=0.6), NM(None, 8), calibration=Calibration.of(torch.randn(32, 8)))
    candidate, _ = told(Fcpts(ERK, Training(steps=30), Schedule(every=1, ramp=1.5), distance=3.0), problem)
    chosen = {}
    for layer in problem.scope:
        per_group = layer.matrix(candidate.masks[layer.name]).unflatten(1, (-1, 8)).sum(-1)
        assert per_group.min() == per_group.max()
        chosen[layer.name] = int(per_group.min())
    assert len(set(chosen.values())) > 1
    assert problem.budget.meets(candidate.allocation.kept)


def test_the_path_is_in_the_report_and_the_steps(tmp_path: Path):
    model, inputs = CASES["with batch norm"].make(), CASES["with batch norm"].inputs()
    arguments: dict[str, Any] = {"options": {"fcpts": {"steps": 20}}, "batch_size": 8, "save_to": tmp_path / "run"}
    result = allot.prune(model, inputs, "sparsity=0.9", method="fcpts", **arguments)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    learned = report["diagnostics"]["fcpts"]
    assert [row["step"] for row in learned["trajectory"]] == [0, 5, 10, 15, 16]
    assert learned["trajectory"][-1]["kept"] == result.allocation.kept
    assert learned["trajectory"][-1]["limit"] == {"sparsity": report["kept"]}
    assert all(sum(row["kept"].values()) == row["limit"]["sparsity"] for row in learned["trajectory"])
    assert learned["gain"].keys() == learned["sensitivity"].keys() == result.allocation.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "allocate" and "limit.sparsity" in line]
    assert len(steps) == 20 and all(line["limit.sparsity"] == line["cost.sparsity"] for line in steps)
    again = allot.prune(model, inputs, "sparsity=0.9", method="fcpts", **arguments)
    assert again.report()["diagnostics"] == report["diagnostics"]


@pytest.mark.parametrize("option", [{"distance": -1}, {"window": "wide"}, {"learn_from": 1.5}, {"momentum": 2}])
def test_an_option_out_of_its_range_is_refused(option: dict[str, Any]):
    name = "fcpts-paper" if "momentum" in option else "fcpts"
    with pytest.raises(UsageError, match=next(iter(option))):
        allot.prune(CASES["linear chain"].make(), None, "sparsity=0.5", method=name, options={name: option})


@pytest.mark.slow
def test_from_a_uniform_start_it_finds_the_layers_that_need_more():
    net, test = zoo.model("digits-resnet20"), zoo.data("digits", "test")
    short: dict[str, Any] = {"steps": 60}
    control = {"allocate": "uniform", "repair": "distill,bn", "options": {"distill": short}}
    learned = {"method": "fcpts", "options": {"fcpts": {"start": "uniform", **short}}}
    data = zoo.data("digits", "calibration")
    results = [allot.prune(net, data, "sparsity=0.95", **chain) for chain in (control, learned)]
    scores = [allot.evaluate(result.model(), test).score for result in results]
    assert scores[1] > scores[0] + 0.08
    assert max(abs(density - 0.05) for density in results[1].allocation.values()) > 0.2


# the paper's form


def test_every_threshold_gets_the_gradient_of_the_reconstruction():
    # where a mask is replaced by itself plus the change of clip((1 + u)/2, 0, 1), the loss is smooth in the thresholds
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double().eval()
    inputs = torch.randn(10, 6, dtype=torch.float64)
    calibration = Calibration.of(inputs, batch_size=10, dtype=torch.float64)
    problem = make_problem(model, Budget(sparsity=0.5), Unstructured(), calibration=calibration)
    method = FcptsPaper(UNIFORM, Training(steps=100, loss="mse", learning_rate=1.0), decay=0.0, penalty=0.0)
    candidate = Candidate.dense(problem)
    state = method.init(problem, candidate)
    method.step(problem, candidate, state)  # the start
    method.step(problem, candidate, state)
    lr = 0.1  # the first of ten steps of warm-up
    found = {name: -float(speed) * lr for name, speed in state["speed"].items()}
    s = {name: float(value) - found[name] for name, value in state["s"].items()}  # before the step
    weights = {name: tensor.double() for name, tensor in problem.dense.items()}

    def threshold(name: str, score: float) -> float:
        return state["M"][name] / (1 + math.exp(-score))

    def surrogate(name: str, score: float) -> Tensor:
        u = (weights[name].abs() - threshold(name, score)) / state["M"][name]
        return ((1 + u) / 2).clamp(0, 1)

    def loss(name: str, change: float) -> float:
        tensors = dict(weights)
        for layer in s:
            mask = (weights[layer].abs() > threshold(layer, s[layer])).double()
            if layer == name:
                mask = mask + surrogate(layer, s[layer] + change) - surrogate(layer, s[layer])
            tensors[layer] = weights[layer] * mask
        with torch.no_grad():
            outputs, dense = torch.func.functional_call(model, tensors, inputs), model(inputs)
        return float((outputs - dense).square().mean() / dense.square().mean())

    for name in s:
        slope = (loss(name, 1e-5) - loss(name, -1e-5)) / 2e-5
        assert abs(slope) > 1e-5
        assert -found[name] / lr == pytest.approx(slope, rel=1e-3), name


def test_the_bridge_is_the_slope_of_the_smoothed_count_and_the_count_itself_is_exact():
    magnitudes = torch.randn(4001, generator=torch.Generator().manual_seed(0)).double().abs() * 0.05
    low, high = torch.quantile(magnitudes, torch.tensor([0.25, 0.75], dtype=torch.float64))
    h = 0.9 * (high - low) / 1.34 * 4001**-0.2

    def smoothed(t: Tensor) -> Tensor:
        normal = torch.distributions.Normal(0.0, 1.0)
        return (normal.cdf((t - magnitudes) / h) + normal.cdf((t + magnitudes) / h)).mean()

    for t in (0.01, 0.05, 0.12):
        at = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        share = pruned(at, magnitudes)
        assert float(share.detach()) == float((magnitudes <= t).double().mean())
        share.backward()
        slope = (smoothed(at.detach() + 1e-6) - smoothed(at.detach() - 1e-6)) / 2e-6
        assert float(at.grad) == pytest.approx(float(slope), rel=1e-6)
        true = 2 * math.exp(-((t / 0.05) ** 2) / 2) / (0.05 * math.sqrt(2 * math.pi))
        assert float(at.grad) == pytest.approx(true, rel=0.15)


def test_one_huge_outlier_does_not_change_the_bridge():
    magnitudes = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs() * 0.02
    far = magnitudes.clone()
    far[7] = 1e6
    for t in (0.005, 0.02, 0.06):
        assert float(bridge(torch.tensor(t), far)) == pytest.approx(
            float(bridge(torch.tensor(t), magnitudes)), rel=1e-3
        )


@pytest.mark.parametrize("n", [1, 2, 70_001])
def test_the_bridge_is_finite_for_equal_few_and_many_weights(n: int):
    for t in (0.0, 0.5, 3.0):
        assert math.isfinite(float(bridge(torch.tensor(t), torch.full((n,), 0.5))))


def test_a_mask_is_whole_and_a_weight_at_its_threshold_is_pruned():
    u = torch.tensor([-2.0, -0.3, 0.0, 1e-7, 0.4, 5.0], requires_grad=True)
    mask = keep(u)
    assert mask.tolist() == [0, 0, 0, 1, 1, 1]
    mask.sum().backward()
    assert u.grad.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_quantised_weights_of_any_scale_are_kept_or_pruned_whole(scale: float):
    model = CASES["linear chain"].make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 4).round() / 4 * scale)
    problem = make_problem(
        model, Budget(sparsity=0.7), Unstructured(), calibration=Calibration.of(CASES["linear chain"].inputs())
    )
    for form in FORMS.values():
        candidate, steps = told(form, problem)
        assert sum(candidate.allocation.kept.values()) == round(0.3 * problem.budget.total)
        assert all(math.isfinite(value) for progress in steps for value in progress.metrics.values())


def test_the_penalty_pulls_the_sparsity_to_the_budget():
    problem = problem_of("linear chain", "sparsity=0.8")
    start = METHODS["uniform"]
    wide = problem.budget.widened(2.5).counts(dict.fromkeys((layer.name for layer in problem.scope), 1.0))
    total = {layer.name: layer.total for layer in problem.scope}
    method = FcptsPaper(start, Training(steps=150, learning_rate=0.05, temperature=4.0), penalty=20.0)
    candidate = Candidate.dense(problem)
    state = method.init(problem, candidate)
    method.step(problem, candidate, state)
    begun = method._begin_training(problem, candidate, state)
    for name, kept in wide.items():  # begin at 50 % instead of 80 %
        magnitudes = problem.dense[name].abs().flatten()
        t = magnitudes.kthvalue(max(total[name] - kept, 1)).values
        begun["s"][name] = torch.logit(t / begun["M"][name])
    state |= begun
    sparsity = [method.step(problem, candidate, state)["sparsity"] for _ in range(150)]
    assert sparsity[0] < 0.6
    assert sparsity[-1] == pytest.approx(0.8, abs=0.06)


def test_a_score_that_thresholds_on_magnitudes_cannot_follow_is_refused():
    model, inputs = CASES["linear chain"].make(), CASES["linear chain"].inputs()
    with pytest.raises(UsageError, match="--score magnitude"):
        allot.prune(model, inputs, "sparsity=0.5", method="fcpts-paper", score="wanda")
