"""The pieces of FCPTS against their equations, written out once more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.methods import METHODS
from allot.methods.fcpts import FcptsPaper, _threshold_scale, _update_signals, _window_bounds, moved
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.run.problem import Candidate, finished
from contract.cases import problem_of

TERMS = (Term("a", 100, macs=100), Term("b", 2_000, macs=8_000), Term("c", 900, macs=900))


@pytest.mark.parametrize("kind", [{"sparsity": 0.8}, {"macs": "20%"}])
@pytest.mark.parametrize("absolute", [1.0, 0.4])
def test_an_update_is_the_one_in_the_equations(kind: dict[str, object], absolute: float):
    budget = Budget(**kind).on(TERMS)  # type: ignore[arg-type]
    density = dict(budget.project({"a": 0.5, "b": 0.15, "c": 0.3}))
    b = {"a": 2e-2, "b": 3e-3, "c": 9e-4}
    p = {"a": 1.0, "b": 4.0 if "macs" in kind else 1.0, "c": 1.0}
    n = {term.name: term.total for term in TERMS}
    u = {l: p[l] * n[l] * density[l] * (1 - density[l]) for l in n}

    def mean(x: dict[str, float]) -> float:
        return sum(u[l] * x[l] for l in u) / sum(u.values())

    weight = {l: math.log(b[l] / p[l]) for l in u}
    r = {l: absolute * (weight[l] - mean(weight)) for l in u}
    eta = 0.1
    odds = {l: density[l] / (1 - density[l]) * math.exp(max(-0.5, min(0.5, eta * r[l]))) for l in u}
    expected = budget.project({l: odds[l] / (1 + odds[l]) for l in u})
    found = moved(budget, density, b, eta, absolute)
    assert found == pytest.approx(dict(expected), rel=1e-9)
    assert found["a"] > density["a"]  # its weights matter more: more of it


def test_a_layer_without_signal_keeps_its_place_however_small():
    budget = Budget(params=300).on((Term("a", 10**7), Term("b", 10**7)))
    found = moved(budget, {"a": 1e-5, "b": 2e-5}, {"a": 0.0, "b": 0.0}, 0.3)
    assert found["b"] == pytest.approx(2 * found["a"])


@pytest.mark.parametrize("first", [100.0, 1.0])
def test_a_whole_layer_can_give_up_its_weights_and_one_that_matters_stays_whole(first: float):
    budget = Budget(sparsity=0.8).on((Term("a", 1_000), Term("x", 10_000), Term("y", 10_000)))
    schedule = Schedule(ramp=8.0)
    for matters in (0.01, 100.0):
        density = dict(budget.project({"a": first, "x": 1.0, "y": 1.0}))
        for t in range(250):
            if share := schedule.fraction(t, 250, 0.1):
                density = moved(budget, density, {"a": matters, "x": 1.0, "y": 1.0}, share)
        if matters < 1:
            assert density["a"] < 0.25
        elif first > 1:
            assert density["a"] > 0.999


@pytest.mark.parametrize("steps", [3, 6, 8, 12, 20, 40, 60, 250, 1_000])
@pytest.mark.parametrize("every", [1, 5])
def test_the_parts_of_a_change_add_up_to_it(steps: int, every: int):
    schedule = Schedule(every=every)
    parts = [schedule.fraction(t, steps, 0.1) for t in range(steps)]
    assert math.fsum(parts) == pytest.approx(1)
    assert all(part == 0 or (schedule.due(t, steps) and t >= 0.1 * steps) for t, part in enumerate(parts))


def test_windows_reach_half_of_what_is_kept_to_both_sides_within_limits_and_bounds():
    budget = Budget(sparsity=0.5).on((Term("a", 10), Term("b", 1_000), Term("c", 200_000)))
    low, high = _window_bounds(budget, {"a": 5, "b": 400, "c": 100_000}, 0.5)
    assert (low, high) == ({"a": 1, "b": 200, "c": 83_616}, {"a": 10, "b": 600, "c": 116_384})


def test_signals_are_plain_means_at_first_and_running_means_later():
    state = {"seen": 0, "a": {"w": 0.0}, "b": {"w": 0.0}, "windows": {"w": torch.tensor([0, 2])}}
    state["training"] = {"tensors": {"w": torch.tensor([[1.0, 9.0], [-2.0, 9.0]])}}
    seen = []
    for k in range(1, 41):
        gradient = torch.tensor([[float(k), 50.0], [1.0, 50.0]])
        _update_signals(state, {"w": gradient})
        seen.append(((-k + 2) / 2, (k + 2) / 2))
    a = b = 0.0
    for k, (gain, weight) in enumerate(seen, 1):
        keep = min(0.9, 1 - 1 / k)
        a, b = keep * a + (1 - keep) * gain, keep * b + (1 - keep) * weight
        if k == 5:
            assert a == pytest.approx(sum(gain for gain, _ in seen[:5]) / 5)
    assert (state["a"]["w"], state["b"]["w"]) == (pytest.approx(a), pytest.approx(b))


# the paper's form


def ended(method: FcptsPaper, sparsity: float = 0.7):
    problem = problem_of("without batch norm", f"sparsity={sparsity}")
    candidate = Candidate.dense(problem)
    state = method.init(problem, candidate)
    while not finished(state):
        method.step(problem, candidate, state)
    return problem, state, method.finish(problem, candidate, state)


def test_the_projection_shifts_every_threshold_by_one_number():
    method = replace(METHODS["fcpts-paper"], training=Training(steps=12, learning_rate=0.05, temperature=4.0))
    _, state, candidate = ended(method)
    thresholds = candidate.diagnostics["fcpts-paper"]["threshold"]
    shifts = [
        float(torch.logit(torch.tensor(t / state["M"][l], dtype=torch.float64)) - state["s"][l])
        for l, t in thresholds.items()
    ]
    assert max(shifts) - min(shifts) < 1e-3 * max(1, abs(shifts[0])) and abs(shifts[0]) > 1e-4
    above = {l: int((state["training"]["tensors"][l].abs() > t).sum()) for l, t in thresholds.items()}
    assert all(abs(above[l] - kept) <= 1 for l, kept in candidate.allocation.kept.items())


def test_weights_decay_and_thresholds_do_not():
    found = {}
    for decay in (0.0, 0.1):
        training = Training(steps=1, learning_rate=0.5, temperature=4.0)
        _, state, _ = ended(replace(METHODS["fcpts-paper"], training=training, decay=decay, penalty=0.0))
        found[decay] = state
    problem = problem_of("without batch norm")
    lr = 0.5 * 0.1  # the first of ten steps of warm-up
    for l, value in found[0.1]["training"]["tensors"].items():
        expected = found[0.0]["training"]["tensors"][l] - lr * 0.1 * problem.dense[l]
        assert torch.allclose(value, expected, atol=1e-6)
    assert all(torch.equal(found[0.1]["s"][l], found[0.0]["s"][l]) for l in found[0.0]["s"])


def test_a_threshold_reaches_ten_upper_quartiles_and_at_least_one():
    assert _threshold_scale(torch.linspace(0.01, 4.0, 400)) == pytest.approx(10 * 3.0, rel=0.01)
    assert _threshold_scale(torch.full((50,), 1e-3)) == 1.0
