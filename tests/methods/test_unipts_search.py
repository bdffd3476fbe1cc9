"""Reducing and regrowing: whole budgets, one trial each, the best never lost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import allot
from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import UsageError
from allot.methods import METHODS
from allot.methods.batchnorm import BatchNorm
from allot.methods.moments import OutputMoments
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.methods.training.selection import Selection
from allot.methods.training.trial import Trial, halves
from allot.methods.unipts_search import Search, decoded, encoded, equal_counts, reduced
from allot.network.call import call
from allot.network.layers import Rules
from allot.run.calibration import Calibration, Noisy
from allot.run.driver import drive
from allot.run.problem import Candidate, Problem, finished
from allot.run.store import Log
from contract.cases import problem_of, run

SIZES = {"a": 30, "b": 400, "c": 4_000, "d": 25}
QUICK = Trial(Training(steps=2), Schedule(every=1))
STARTS = tuple((name, METHODS[name]) for name in ("erk", "uniform"))


def bound(sparsity: float, **bounds: tuple[int, int]) -> Budget:
    terms = [Term(name, n, *bounds.get(name, (1, n))) for name, n in SIZES.items()]
    return Budget(sparsity=sparsity).on(tuple(terms))


def evolving(**changed: Any) -> Search:
    given = {"generations": 3, "parents": 2, "crossovers": 2, "mutants": 2, "strength": 1.0} | changed
    return Search(STARTS, **({"trial": QUICK} | given))


def searched(method: Search, problem: Problem, log: Log | None = None) -> dict[str, Any]:
    return dict(drive(method, problem, Candidate.dense(problem), log=log).diagnostics["search"])


# decoding


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0.5, 0.995),
    st.lists(st.floats(-40, 40), min_size=4, max_size=4),
    st.sampled_from([(0.9, True), (0.3, True), (1.0, True), (0.05, False)]),
)
def test_every_genome_meets_the_budget_to_the_weight_and_keeps_its_floor(sparsity, x, excess):
    budget = bound(sparsity)
    base = reduced(budget, excess[0], relative=excess[1])
    kept = decoded(budget, base, x)
    assert sum(kept.values()) == budget.limits[0].ceiling and budget.meets(kept)
    assert all(kept[name] >= math.floor(base[name]) - 1 for name in kept)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.999])
def test_the_papers_excess_serves_any_sparsity(sparsity: float):
    budget = bound(sparsity)
    for x in ([0.0] * 4, [9.0, 0.0, -9.0, 0.0]):
        kept = decoded(budget, reduced(budget, 0.05, relative=False), x)
        assert sum(kept.values()) == budget.limits[0].ceiling and budget.meets(kept)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.3, 0.99), st.lists(st.floats(-6, 6), min_size=4, max_size=4))
def test_what_full_layers_cannot_take_goes_to_the_others_in_proportion(sparsity, x):
    budget = bound(sparsity, a=(1, 9), d=(2, 5))
    base = reduced(budget, 0.8, relative=True)
    kept = decoded(budget, base, x)
    expected = water_filled(base, torch.tensor(x, dtype=torch.float64).softmax(0).tolist(), [9, 400, 4_000, 5], budget)
    assert all(abs(kept[name] - expected[name]) <= 1 + 1e-6 for name in kept)


def water_filled(base: dict[str, float], shares: list[float], caps: list[int], budget: Budget) -> dict[str, float]:
    """The same in closed form: fill the layers that overflow, share the rest again, until none does."""
    names, room = list(base), budget.limits[0].ceiling - sum(base.values())
    free, grown = set(range(len(names))), dict.fromkeys(range(len(names)), 0.0)
    while free:
        level = room / sum(shares[i] for i in free)
        full = [i for i in free if base[names[i]] + level * shares[i] > caps[i]]
        if not full:
            grown |= {i: level * shares[i] for i in free}
            break
        for i in full:
            grown[i] = caps[i] - base[names[i]]
            room -= grown[i]
            free.remove(i)
    return {name: base[name] + grown[i] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", ["erk", "lamp", "global", "uniform"])
@pytest.mark.parametrize("budget", ["sparsity=0.8", "macs=30%", "bytes=75%"])
def test_an_allocation_is_decoded_as_it_was_encoded(name: str, budget: str):
    problem = problem_of("with batch norm", budget)
    kept = run(name, problem).allocation.kept
    base = reduced(problem.budget, 1.0, relative=True)
    again = decoded(problem.budget, base, encoded(problem.budget, base, kept))
    assert all(abs(again[layer] - kept[layer]) <= 1 for layer in kept)


def test_a_constant_genome_grows_every_layer_by_the_same_number():
    problem = problem_of("with batch norm", "sparsity=0.9")
    densities = equal_counts(problem)
    base = reduced(problem.budget, 0.05, relative=False)
    grown = [densities[t.name] * t.total - base[t.name] for t in problem.budget.terms if densities[t.name] < 1]
    assert len(grown) > 1 and max(grown) - min(grown) < 2  # each is rounded up or down


# evolution


def test_the_best_is_never_lost_and_is_what_comes_out():
    problem = problem_of("without batch norm", "sparsity=0.9")
    method = evolving()
    candidate = drive(method, problem, Candidate.dense(problem))
    told = candidate.diagnostics["search"]
    assert told["best"] == sorted(told["best"], reverse=True) and len(told["best"]) == 4
    best = min(told["tried"], key=lambda row: row["losses"][-1])
    assert (told["chosen"], best["losses"][-1]) == (best["name"], told["best"][-1])
    assert candidate.allocation.kept == best["kept"]
    assert {row["generation"] for row in told["tried"]} == {0, 1, 2, 3}
    assert not candidate.masks and not candidate.tensors


def test_every_individual_meets_the_budget_and_none_is_tried_twice():
    problem = problem_of("without batch norm", "macs=30%")
    told = searched(evolving(strength=0.05, mutation=0.2, generations=6), problem)
    kept = [row["kept"] for row in told["tried"]]
    assert all(problem.budget.meets(some) for some in kept)
    assert len({tuple(some.values()) for some in kept}) == len(kept) < 2 + 6 * 4


def test_a_search_that_changes_nothing_ends_with_its_starts():
    problem = problem_of("without batch norm")
    told = searched(evolving(mutation=0.0, crossovers=0), problem)
    assert [row["name"] for row in told["tried"] if row["generation"] == 0] == ["erk", "uniform"]
    # mutants without a changed gene are their parents, but for what the encoding rounds
    parents = [row["kept"] for row in told["tried"][:2]]
    for row in told["tried"][2:]:
        assert any(all(abs(row["kept"][n] - kept[n]) <= 2 for n in kept) for kept in parents)


def test_fitness_of_one_shot_is_the_loss_after_re_estimation_on_the_other_half():
    problem = problem_of("with batch norm", "sparsity=0.6", batch_size=5)
    trial = Trial(Training(temperature=2.0), statistics=(BatchNorm(),), one_shot=True)
    (row, _) = searched(Search(STARTS, trial), problem)["tried"]
    train, judge = halves(problem)
    candidate = drive(Selection(), train, run("erk", train))
    candidate = drive(BatchNorm(), train, replace(candidate, masks=candidate.masks))
    losses = []
    for k in range(judge.inputs().batches):
        with torch.no_grad():
            y, z = (call(problem.model, t, judge.inputs().batch(k)[0]) for t in ({}, candidate.effective(problem)))
        p, q = (logits.div(2).softmax(1) for logits in (y, z))
        losses.append(float(4 * (p * (p.log() - q.log())).sum(1).mean()))
    assert row["losses"][0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_without_batch_norm_mean_and_variance_take_its_place():
    for case, factor in (("with batch norm", 1), ("without batch norm", 2)):
        problem, log = problem_of(case, batch_size=5), Log()
        trial = Trial(statistics=(BatchNorm(), OutputMoments(scale=True)), one_shot=True)
        searched(Search(STARTS, trial), problem, log)
        # each trial: statistics on one half of 10 (variance looks at both nets); the other half, the dense net once
        assert log.forward == 2 * (10 * factor + 10) + 10 and log.backward == 0


def test_individuals_are_judged_by_the_same_samples_that_no_start_has_seen():
    problem = problem_of("linear chain", batch_size=10)
    seen: list[Tensor] = []
    handle = problem.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    learned = (("fcpts", replace(METHODS["fcpts"], training=Training(steps=3))),)
    drive(replace(evolving(), starts=learned), problem, Candidate.dense(problem))
    handle.remove()
    every, indices = problem.inputs().source, problem.inputs().indices

    def places(xs: list[Tensor]) -> set[int]:
        return {i for i in indices for x in xs if bool((x == every[i]).all(1).any())}

    assert places(seen[:6]) <= set(indices[::2])
    assert places(seen) == set(indices)


def test_noise_is_a_share_of_a_sample_and_the_same_every_time():
    source = [({"x": 5 * torch.randn(1_000), "ids": torch.arange(3)}, 1) for _ in range(3)]
    noisy = Noisy(source, 0.1, seed=4)
    (one,), (again,) = noisy[1], noisy[1]
    assert torch.equal(one["x"], again["x"]) and torch.equal(one["ids"], torch.arange(3))
    share = float((one["x"] - source[1][0]["x"]).std() / source[1][0]["x"].std())
    assert share == pytest.approx(0.1, rel=0.1)
    calibration = Calibration.of([torch.zeros(4), torch.ones(4)])
    assert torch.equal(Calibration.of(Noisy(calibration.source, 0.0, 0)).batch(0)[0], calibration.batch(0)[0])


def test_a_single_individual_is_not_tried_and_its_start_sees_every_sample():
    problem, log = problem_of("with batch norm", batch_size=5), Log()
    learned = replace(METHODS["fcpts"], training=Training(steps=4))
    method = Search((("fcpts", learned),), QUICK)
    candidate = drive(method, problem, Candidate.dense(problem), log=log)
    expected = drive(learned, problem, Candidate.dense(problem))
    assert candidate.allocation.kept == expected.allocation.kept and not candidate.masks and not candidate.tensors
    assert log.backward == 4 * 5 and candidate.diagnostics["search"]["tried"][0]["losses"] == []


def test_children_have_genes_of_both_parents_and_of_the_best_ones_only():
    problem = problem_of("without batch norm", "sparsity=0.8")
    method = evolving(generations=1, mutants=0, crossovers=6, parents=2, population=5)
    state = method.init(problem, Candidate.dense(problem))
    while not finished(state):
        method.step(problem, Candidate.dense(problem), state)
    first = [row for row in state["pool"] if row["generation"] == 0]
    assert len(first) == 5
    parents = sorted(first, key=lambda row: row["losses"][-1])[:2]
    children = [row for row in state["pool"] if row["generation"] == 1]
    assert children
    for child in children:
        origin = [{x == y for x, y in zip(child["x"], row["x"], strict=True)} for row in parents]
        assert all(x in {a, b} for x, a, b in zip(child["x"], *(row["x"] for row in parents), strict=True))
        assert all(True in found for found in origin)


def test_multiplying_leaves_a_gene_of_zero_alone_and_adding_does_not():
    for change, moves in (("multiply", False), ("add", True)):
        problem = problem_of("without batch norm", "sparsity=0.8")
        method = evolving(generations=1, crossovers=0, mutation=1.0, change=change)
        state = method.init(problem, Candidate.dense(problem))
        while not state["pool"]:
            method.step(problem, Candidate.dense(problem), state)
        state["pool"] = [state["pool"][0] | {"x": [0.0] * len(problem.scope), "losses": [1.0]}]
        state["queue"], state["generation"] = [], 1
        method._breed(problem, state)
        children = [row["x"] for row in state["pool"][1:]]
        assert any(any(x) for x in children) == moves


def test_noise_reaches_the_trials():
    losses = [
        searched(evolving(generations=0, noise=noise), problem_of("linear chain"))["tried"][0]["losses"]
        for noise in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]


def test_individuals_are_judged_by_the_same_draws():
    class Drawn(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 18  # two of them are watched

        def __getitem__(self, i: int) -> Tensor:
            return torch.rand(6)

    class Watched(nn.Sequential):  # what a hook notes is put back as it was
        def forward(self, x: Tensor) -> Tensor:
            seen.setdefault(step[0], []).append(x.clone())
            return super().forward(x)

    model = Watched(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    seen: dict[int, list[Tensor]] = {}
    step = [0]
    search = Search(STARTS, QUICK)
    allot.prune(
        model, Drawn(), "sparsity=0.5", allocate=search, repair="none", batch_size=4,
        on_step=lambda progress: step.__setitem__(0, progress.step if progress.stage == "allocate" else 0),
    )  # fmt: skip
    each = (max(seen) - 1) // 2
    inputs = [
        torch.cat([x for k in sorted(seen) if 2 + i * each <= k < 2 + (i + 1) * each for x in seen[k]]) for i in (0, 1)
    ]
    assert inputs[0].shape == inputs[1].shape and torch.equal(*inputs)


def test_layer_bounds_hold_in_every_individual():
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    rules = Rules(max_density={"0": 0.5}, min_density={"2": 0.25})
    result = allot.prune(model, inputs, "sparsity=0.6", allocate=evolving(), repair="none", rules=rules)
    for row in result.report()["diagnostics"]["search"]["tried"]:
        assert row["kept"]["0.weight"] <= 32 and row["kept"]["2.weight"] >= 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"excess": 0},
        {"generations": -1},
        {"population": 0},
        {"mutation": 2},
        {"change": "swap"},
        {"noise": -1},
        {"relative": "no"},
    ],
)
def test_a_value_out_of_its_range_is_refused(wrong: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        evolving(**wrong)


def test_one_sample_cannot_be_split():
    problem = problem_of("linear chain")
    alone = replace(problem, calibration=Calibration.of(torch.zeros(1, 6)))
    with pytest.raises(UsageError, match="give 2 or more"):
        drive(evolving(), alone, Candidate.dense(alone))
