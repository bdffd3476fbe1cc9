"""DSA: the gradient of soft masks, three ways to hold a budget, whole numbers at the end."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import allot
from allot.budget.budget import Budget
from allot.budget.channels import channel_budget
from allot.errors import Stopped, UsageError
from allot.methods import METHODS
from allot.methods.dsa import HOLDS, SPACES, Dsa, _place, padded, projected, soft_masks
from allot.methods.training.channel_costs import Costs
from allot.methods.training.channel_gates import DRAWS
from allot.methods.training.distillation import Training
from allot.network.layers import Rules
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import Progress, drive
from allot.run.patterns import Channels
from allot.run.problem import Candidate, Problem
from allot.run.scores import CHANNEL_SCORES
from allot.run.store import Log, Store
from contract.cases import ON_CHANNELS, Case, nothing_more_fits, problem_of

SIZES = [1, 2, 7, 40, 13, 3]
SEVERAL = "macs=60%,params=45%,bytes=80%"
STEPS = {"implicit": 8, "lagrangian": 8, "admm": 2}  # a projection takes as long as many steps


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def channel_problem(case: str = "with batch norm", budget: str = "macs=40%", **more: Any) -> Problem:
    return problem_of(case, budget, name="dsa" + ON_CHANNELS, **more)


def dsa(steps: int = 12, **options: Any) -> Dsa:
    return Dsa(Training(steps=steps), **options)


def told(method: Dsa, problem: Problem, **more: Any) -> tuple[Candidate, list[Progress]]:
    steps: list[Progress] = []
    return drive(method, problem, Candidate.dense(problem), on_step=steps.append, **more), steps


def costs_of(problem: Problem, alpha: Tensor) -> list[tuple[float, Tensor]]:
    return Costs(problem)(alpha)


def densities(method: Dsa, problem: Problem, a: Tensor) -> tuple[Tensor, Tensor]:
    return method._densities(problem, Costs(problem), a)


# soft masks


IMPORTANCES: dict[str, list[Tensor]] = {
    "random": [draws(n, seed=n) for n in SIZES],
    "ranks": [_place(draws(n, seed=n).abs(), "rank") for n in SIZES],
    "logs": [_place(draws(n, seed=n).abs(), "log") for n in SIZES],
    "equal": [torch.full((n,), 0.3, dtype=torch.float64) for n in SIZES],
    "zero": [torch.zeros(n, dtype=torch.float64) for n in SIZES],
    "ties": [draws(n, seed=n).round() for n in SIZES],
    "huge spread": [100 * draws(n, seed=n) for n in SIZES],
    "one far off": [torch.cat([draws(n, seed=n)[1:], torch.tensor([-1000.0], dtype=torch.float64)]) for n in SIZES],
    "no score at all": [_place(torch.zeros(n, dtype=torch.float64), "log") for n in SIZES],
    "scores beyond float32": [_place(torch.logspace(-300, 300, n, dtype=torch.float64), "log") for n in SIZES],
    "channels of one group": [draws(1, seed=n) for n in SIZES],
}
each_importance = pytest.mark.parametrize("importances", IMPORTANCES.values(), ids=IMPORTANCES)


@each_importance
@pytest.mark.parametrize("beta", [0.1, 1, 8, 64, 128])
def test_soft_masks_keep_the_wanted_share_on_average(importances: list[Tensor], beta: float):
    x, there = padded(importances)
    for share in (0.02, 0.1, 1 / 3, 0.5, 0.8, 0.97, 0.999):
        alpha = torch.full((len(x),), share, dtype=torch.float64)
        p, w = soft_masks(x, there, alpha, beta)
        assert float((p.sum(1) - alpha * there.sum(1)).abs().max()) < 1e-9
        for values in (p, w):
            assert bool(((values >= 0) & (values <= 1)).all())  # which nan is not
            assert not bool(values[there == 0].any())
        assert torch.allclose(w.sum(1), torch.ones(len(w), dtype=torch.float64), atol=1e-12)


@each_importance
@pytest.mark.parametrize("beta", [1, 8, 64])
def test_a_more_important_channel_has_no_lower_mask(importances: list[Tensor], beta: float):
    x, there = padded(importances)
    p, _ = soft_masks(x, there, torch.full((len(x),), 0.4, dtype=torch.float64), beta)
    for k, row in enumerate(importances):
        masks = p[k, : len(row)][row.argsort()]
        assert bool((masks.diff() >= -1e-12).all())


@pytest.mark.parametrize("importances", [IMPORTANCES[name] for name in ("random", "ranks", "logs", "equal", "ties")])
@pytest.mark.parametrize(("beta", "error"), [(1, 1e-6), (8, 1e-6), (64, 1e-5), (128, 1e-5)])
def test_the_gradient_of_the_densities_is_that_of_finite_differences(
    importances: list[Tensor], beta: float, error: float
):
    x, there = padded(importances)
    generator = torch.Generator().manual_seed(3)

    def loss(p: Tensor) -> Tensor:  # curved, and each group by itself
        weight = draws(*p.shape, seed=11)
        return (weight * p + (weight.roll(1) * p).square()).mul(there).sum(1)

    for _ in range(5):
        alpha = torch.empty(len(x), dtype=torch.float64).uniform_(0.05, 0.95, generator=generator)
        p, w = soft_masks(x, there, alpha, beta)
        p.requires_grad_()
        dp = torch.autograd.grad(loss(p).sum(), p)[0]
        dalpha = there.sum(1) * (w * dp).sum(1)
        h = 1e-4 / beta
        ahead, behind = (loss(soft_masks(x, there, alpha + s * h, beta)[0]) for s in (1, -1))
        expected = (ahead - behind) / (2 * h)
        scale = there.sum(1) * (w * dp.abs()).sum(1)
        assert bool(((dalpha - expected).abs() <= error * scale + 1e-7 * beta).all())


def test_a_group_does_not_depend_on_those_that_it_is_padded_with():
    importances = IMPORTANCES["random"]
    x, there = padded(importances)
    alpha = torch.linspace(0.1, 0.9, len(x), dtype=torch.float64)
    p, w = soft_masks(x, there, alpha, 16)
    for k, row in enumerate(importances):
        alone_p, alone_w = soft_masks(*padded([row]), alpha[k : k + 1], 16)
        assert torch.allclose(p[k, : len(row)], alone_p[0], atol=1e-9)
        assert torch.allclose(w[k, : len(row)], alone_w[0], atol=1e-9)


def test_a_steep_mask_is_the_choice_of_the_most_important():
    row = _place(draws(20), "rank")
    p, _ = soft_masks(*padded([row]), torch.tensor([0.35], dtype=torch.float64), 1e4)
    expected = torch.zeros(20, dtype=torch.float64)
    expected[row.argsort(descending=True)[:7]] = 1
    assert torch.allclose(p[0], expected, atol=1e-6)


def test_ranks_do_not_depend_on_the_scale_and_ties_go_to_the_lower_index():
    score = draws(9).abs()
    assert torch.equal(_place(score, "rank"), _place(1e6 * score.square(), "rank"))
    assert sorted(_place(score, "rank").tolist()) == pytest.approx([(i + 0.5) / 9 * 4 - 2 for i in range(9)])
    assert _place(torch.ones(4), "rank").diff().lt(0).all()


# the budget, in every step


@pytest.mark.parametrize("budget", ["macs=40%", "params=50%", "bytes=75%", "sparsity=0.6", SEVERAL])
@pytest.mark.parametrize("space", SPACES)
def test_the_implicit_hold_spends_the_budget_in_every_step(budget: str, space: str):
    problem = channel_problem(budget=budget)
    _, steps = told(dsa(space=space, rate=0.3), problem)
    assert len(steps) == 12
    assert all(abs(progress.metrics["spent"] - 1) < 1e-9 for progress in steps)


@pytest.mark.parametrize("budget", ["macs=40%", "params=50%", "bytes=75%", SEVERAL])
@pytest.mark.parametrize("seed", range(4))
def test_the_implicit_gradient_is_that_of_finite_differences_through_the_solve(budget: str, seed: int):
    problem, method = channel_problem(budget=budget), dsa()
    c, a = draws(2, len(problem.scope.groups), seed=seed)
    alpha, slope = densities(method, problem, a)
    costs = costs_of(problem, alpha)
    assert max(cost for cost, _ in costs) == pytest.approx(1, abs=1e-9)
    found = method._logit_gradient({}, alpha, slope, c, costs, 1.0)
    h = 1e-5
    for k in range(len(a)):
        moved = h * torch.eye(len(a), dtype=torch.float64)[k]
        ahead, behind = (float(c @ densities(method, problem, a + s * moved)[0]) for s in (1, -1))
        assert float(found[k]) == pytest.approx((ahead - behind) / (2 * h), abs=1e-6)


@pytest.mark.parametrize("budget", ["macs=40%", SEVERAL])
@pytest.mark.parametrize("hold", ["lagrangian", "admm"])
def test_the_gradient_of_the_other_holds_is_that_of_their_penalty(hold: str, budget: str):
    problem, method = channel_problem(budget=budget), dsa(hold=hold)
    a, c, z, u = draws(4, len(problem.scope.groups), seed=2)
    rho, several = 1.7, len(channel_budget(problem.budget).limits)
    state = {"lambda": [0.1 * (i + 1) for i in range(several)], "z": z.sigmoid(), "u": 0.1 * u}

    def penalised(a: Tensor) -> float:
        alpha = densities(method, problem, a)[0]
        loss = float(c @ alpha)
        if hold == "admm":
            return loss + rho / 2 * float((alpha - state["z"] + state["u"]).square().sum())
        for (cost, _), multiplier in zip(costs_of(problem, alpha), state["lambda"], strict=True):
            loss += (max(0.0, multiplier + rho * (cost - 1)) ** 2 - multiplier**2) / (2 * rho)
        return loss

    alpha, slope = densities(method, problem, a)
    found = method._logit_gradient(state, alpha, slope, c, costs_of(problem, alpha), rho)
    for k in range(len(a)):
        moved = 1e-5 * torch.eye(len(a), dtype=torch.float64)[k]
        expected = (penalised(a + moved) - penalised(a - moved)) / 2e-5
        assert float(found[k]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("budget", ["macs=40%", "params=60%", SEVERAL])
def test_costs_are_the_budgets_and_their_gradients_those_of_finite_differences(budget: str):
    problem = channel_problem(budget=budget)
    alpha = draws(3).sigmoid()
    for i, limit in enumerate(channel_budget(problem.budget).limits):
        kept = {g.name: float(x) * g.total for g, x in zip(problem.scope.groups, alpha, strict=True)}
        cost, gradient = costs_of(problem, alpha)[i]
        assert cost == pytest.approx(float(channel_budget(problem.budget).real_cost(limit.kind, kept)) / limit.ceiling)
        for k in range(3):
            moved = 1e-6 * torch.eye(3, dtype=torch.float64)[k]
            ahead, behind = (costs_of(problem, alpha + s * moved)[i][0] for s in (1, -1))
            assert float(gradient[k]) == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("case", "budget"),
    [("with batch norm", "macs=40%"), ("with batch norm", "params=70%"), ("linear chain", "macs=25%")],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_projection_is_the_nearest_point_that_fits(case: str, budget: str, seed: int):
    problem = channel_problem(case, budget)
    groups = problem.scope.groups
    least, top = dsa()._bounds(problem)
    wished = 0.8 + 0.4 * draws(len(groups), seed=seed)

    def room(z: Any) -> float:
        return 1 - costs_of(problem, torch.as_tensor(z))[0][0]

    def distance(z: Any) -> float:
        return float((torch.as_tensor(z) - wished).square().sum())

    found = projected(Costs(problem), wished, least, top)
    assert bool(((found >= least - 1e-12) & (found <= top + 1e-12)).all()) and room(found) >= -1e-9
    for start in (found, least, torch.full_like(least, 0.5), draws(len(groups), seed=9).sigmoid()):
        other = minimize(
            distance,
            start.numpy(),
            jac=lambda z: (2 * (torch.as_tensor(z) - wished)).numpy(),
            bounds=list(zip(least.tolist(), top.tolist(), strict=True)),
            constraints={
                "type": "ineq",
                "fun": room,
                "jac": lambda z: -costs_of(problem, torch.as_tensor(z))[0][1].numpy(),
            },
            method="SLSQP",
        )
        assert room(other.x) < -1e-6 or distance(found) <= distance(other.x) + 1e-4


@pytest.mark.parametrize("budget", ["macs=60%,params=45%", pytest.param(SEVERAL, marks=pytest.mark.slow)])
def test_a_projection_on_several_limits_leaves_no_room_in_all_of_them(budget: str):
    problem = channel_problem(budget=budget)
    wished = 0.9 + 0.4 * draws(3)
    found = projected(Costs(problem), wished, *dsa()._bounds(problem))
    assert max(cost for cost, _ in costs_of(problem, found)) == pytest.approx(1, abs=1e-3)


def test_what_fits_already_is_projected_to_itself():
    problem = channel_problem()
    wished = torch.tensor([0.3, 0.4, 0.35], dtype=torch.float64)
    least, top = dsa()._bounds(problem)
    assert torch.equal(projected(Costs(problem), wished, least.clamp_max(0.2), top), wished)


FORMS = [
    *((hold, space, sampled) for hold in HOLDS[:2] for space in SPACES for sampled in (False, True)),
    ("admm", "rank", True),
    ("admm", "log", False),
]
ONE_OF_EACH_HOLD = {form[0]: form for form in FORMS}.values()  # the space and the draws do not look at the budget


@pytest.mark.parametrize(
    ("budget", "hold", "space", "sampled"),
    [
        *(("macs=45%", *form) for form in FORMS),
        *(pytest.param(SEVERAL, *form, marks=() if form in ONE_OF_EACH_HOLD else pytest.mark.slow) for form in FORMS),
    ],
)
def test_every_form_ends_within_the_budget_with_no_room_for_a_channel(
    hold: str, space: str, sampled: bool, budget: str
):
    problem = channel_problem(budget=budget)
    candidate, steps = told(
        dsa(STEPS[hold], hold=hold, space=space, sampled=sampled, steepness=(1, 64), rate=0.5), problem
    )
    nothing_more_fits(problem, candidate.allocation.kept)
    assert all(math.isfinite(value) for progress in steps for value in progress.metrics.values())


@pytest.mark.parametrize("case", ["linear chain", "attention", "zero weights", "equal weights", "one huge outlier"])
@pytest.mark.parametrize("hold", HOLDS)
def test_odd_nets_end_within_the_budget(case: str, hold: str):
    problem = channel_problem(case, "params=75%")
    for space in SPACES:
        nothing_more_fits(problem, told(dsa(STEPS[hold] // 2, hold=hold, space=space), problem)[0].allocation.kept)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("budget", ["macs=99%", "sparsity=0.013", "params=9%"])
def test_a_very_loose_and_a_very_tight_budget_are_met(hold: str, budget: str):
    problem = channel_problem("linear chain", budget)
    nothing_more_fits(problem, told(dsa(STEPS[hold] // 2, hold=hold, rate=1.0), problem)[0].allocation.kept)


@pytest.mark.parametrize("hold", HOLDS)
def test_bounds_of_rules_hold_and_groups_that_are_excluded_stay_whole(hold: str):
    case = Case(lambda: Branches(0.001), (6,))
    problem = posed(
        case, "params=50%", Rules(exclude=("of_spare",), max_density={"first": 0.25}, min_density={"vital": 0.4})
    )
    assert [group.name for group in problem.scope.groups] == ["first", "vital"]
    candidate, _ = told(dsa(STEPS[hold], hold=hold, rate=0.5), problem)
    kept = candidate.allocation.kept
    assert kept["first"] <= 4 and kept["vital"] >= 7
    nothing_more_fits(problem, kept)
    for _, densities in candidate.diagnostics["dsa"]["densities"]:
        assert densities[0] <= 0.25 + 1e-9 and densities[1] >= 0.4 - 1e-9


@pytest.mark.parametrize("hold", HOLDS)
def test_densities_start_at_the_uniform_allocation(hold: str):
    problem = channel_problem(budget="params=50%")
    _, first = told(dsa(1, hold=hold), problem)[0].diagnostics["dsa"]["densities"][0]
    start = channel_budget(problem.budget).project({group.name: 1.0 for group in problem.scope.groups})
    assert first == pytest.approx([start[group.name] for group in problem.scope.groups], abs=2e-3)


@pytest.mark.parametrize("hold", HOLDS)
def test_densities_start_at_the_uniform_allocation_where_rules_bound_them(hold: str):
    problem = posed(Case(lambda: Branches(0.001), (6,)), "params=40%", Rules(max_density={"vital.*": 0.5}))
    _, first = told(dsa(1, hold=hold), problem)[0].diagnostics["dsa"]["densities"][0]
    start = channel_budget(problem.budget).project({group.name: 1.0 for group in problem.scope.groups})
    assert first == pytest.approx([start[group.name] for group in problem.scope.groups], abs=0.02)


# what is learned


class Branches(nn.Module):
    """Two branches of one width behind one layer, one of which hardly counts."""

    def __init__(self, spare: float) -> None:
        super().__init__()
        self.first, self.vital, self.spare = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.of_vital, self.of_spare = nn.Linear(16, 5), nn.Linear(16, 5)
        for i, (name, tensor) in enumerate(self.named_parameters()):
            factor = spare if name == "of_spare.weight" else 0.5
            tensor.data = factor * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.of_vital(torch.relu(self.vital(x))) + self.of_spare(torch.relu(self.spare(x)))


def posed(case: Case, budget: str, rules: Rules | None = None, score: str = "magnitude", samples: int = 20) -> Problem:
    calibration = Calibration.of(case.inputs(samples), batch_size=8)
    return make_problem(
        case.make(),
        Budget.parse(budget),
        Channels(),
        calibration=calibration,
        rules=rules,
        score=CHANNEL_SCORES[score],
    )


@pytest.mark.parametrize(
    ("hold", "sampled", "steps"),
    [("implicit", False, 30), ("lagrangian", False, 30), ("admm", False, 8), ("implicit", True, 30)],
)
def test_a_group_that_hardly_counts_keeps_fewer_channels_than_with_uniform(hold: str, sampled: bool, steps: int):
    problem = posed(Case(lambda: Branches(1e-4), (6,)), "params=50%")
    method = dsa(steps, hold=hold, sampled=sampled, rate=3 / steps)
    kept = told(method, problem)[0].allocation.kept
    uniform = drive(METHODS["uniform"], problem, Candidate.dense(problem)).allocation.kept
    assert kept["spare"] < uniform["spare"] and kept["vital"] > uniform["vital"]
    assert kept["spare"] < kept["vital"] // 2


def test_the_loss_falls_where_the_budget_is_held_and_the_steepness_stays():
    problem = posed(Case(lambda: Branches(1e-4), (6,)), "params=50%")
    losses = [progress.metrics["loss"] for progress in told(dsa(40, steepness=(8, 8)), problem)[1]]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_densities_are_told_as_they_moved():
    problem = channel_problem()
    candidate, _ = told(dsa(104), problem)
    found = candidate.diagnostics["dsa"]
    assert json.loads(json.dumps(found)) == found
    assert found["groups"] == [group.name for group in problem.scope.groups]
    at = [t for t, _ in found["densities"]]
    assert at == sorted(set(at)) and at[0] == 0 and at[-1] == 103 and len(at) <= 60
    for _, densities in found["densities"]:
        assert len(densities) == 3 and all(0 < density < 1 for density in densities)
        cost = costs_of(problem, torch.tensor(densities, dtype=torch.float64))[0][0]
        assert cost == pytest.approx(1, abs=1e-9)
    assert found["densities"][0][1] != found["densities"][-1][1]


def test_weights_and_the_model_stay_as_they_are():
    problem = channel_problem()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    candidate, _ = told(dsa(4), problem)
    assert not candidate.tensors and not candidate.masks
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(parameter.grad is None for parameter in problem.model.parameters())


# what it costs


@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_images_are_all_those_that_went_through_the_net(score: str):
    log = Log()
    problem = posed(Case(lambda: Branches(0.1), (6,)), "params=50%", score=score)
    told(dsa(10), problem, log=log)
    sizes = [len(problem.inputs().positions(t)) for t in range(10)]
    scoring = 20 * DRAWS if score == "taylor" else 0
    assert sum(sizes[:3]) == 20
    assert log.backward == sum(sizes) + scoring
    assert log.forward == sum(sizes) + 20 + scoring  # the dense net saw each sample once


def test_images_are_counted_where_the_net_is_asked(monkeypatch: pytest.MonkeyPatch):
    problem = posed(Case(lambda: Branches(0.1), (6,)), "params=50%", score="taylor")
    passed: list[int] = []
    handle = problem.model.register_forward_hook(lambda module, args, output: passed.append(len(output)))
    log = Log()
    told(dsa(7), problem, log=log)
    handle.remove()
    assert log.forward == sum(passed)


# going on, and options


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_densities(hold: str, sampled: bool, tmp_path: Any):
    problem, method = channel_problem(), dsa(4, hold=hold, sampled=sampled)
    whole, _ = told(method, problem)
    asked = iter([False] * 3 + [True])

    store = Store(tmp_path, {}, {})
    with pytest.raises(Stopped):
        told(method, problem, store=store, should_stop=lambda: next(asked))
    store.describe("stopped", Log())
    store.close()
    store = Store(tmp_path, {}, {})
    found, steps = told(method, problem, store=store)
    store.close()
    assert [progress.step for progress in steps] == [4]
    assert dict(found.allocation) == dict(whole.allocation) and found.diagnostics == whole.diagnostics


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0},
        {"rate": "fast"},
        {"rate": math.nan},
        {"least": 1},
        {"least": -0.1},
        {"sampled": 1},
        {"steepness": 4},
        {"steepness": (1, 2, 3)},
        {"steepness": (0, 2)},
        {"steepness": (2, math.nan)},
        {"steepness": (2, True)},
        {"hold": "admn"},
        {"hold": None},
        {"space": ["rank"]},
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_one_line_that_says_what_would_do(options: dict[str, Any]):
    with pytest.raises(UsageError, match=r"accepted|Accepted|did you mean") as refused:
        Dsa(**options)
    [name] = options
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_list_of_two_numbers_is_a_steepness():
    assert Dsa(steepness=[2, 16]) == Dsa(steepness=(2.0, 16.0))  # type: ignore[arg-type]


def test_dsa_without_channels_and_without_data_is_refused_in_one_line():
    case = Case(lambda: Branches(0.1), (6,))
    with pytest.raises(UsageError, match="cannot share out weights") as refused:
        allot.prune(case.make(), case.inputs(), "params=50%", allocate="dsa", pattern="unstructured", repair="none")
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="calibration") as refused:
        allot.prune(case.make(), None, "params=50%", method="dsa", example=case.inputs(1))
    assert "\n" not in str(refused.value)


def test_prune_takes_the_options_of_dsa():
    case = Case(lambda: Branches(0.1), (6,))
    with pytest.raises(UsageError, match="did you mean 'implicit'"):
        allot.prune(case.make(), case.inputs(), "params=50%", method="dsa", options={"dsa": {"hold": "implict"}})
    options = {"dsa": {"hold": "admm", "steps": 3}, "distill": {"steps": 2}}
    result = allot.prune(case.make(), case.inputs(), "params=50%", method="dsa", options=options)
    nothing_more_fits(result.problem, result.allocation.kept)
    assert len(result.report()["diagnostics"]["dsa"]["densities"]) == 3
