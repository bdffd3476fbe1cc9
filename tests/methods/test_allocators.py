"""The allocators against oracles that do the obvious thing slowly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods import METHODS
from allot.methods.rules import erk, global_magnitude
from allot.network.layers import Layer, Rules, Scope
from allot.pruning.prune import prune
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem
from contract.cases import CASES, problem_of


def kept_by(name: str, problem: Problem) -> dict[str, int]:
    return drive(METHODS[name], problem, Candidate.dense(problem)).allocation.kept


def linears(*weights: list[list[float]]) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(len(w[0]), len(w), bias=False) for w in weights))
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(torch.tensor(weight))
    return model


def posed(model: nn.Module, kept: int, rules: Rules | None = None) -> Problem:
    return make_problem(model, Budget(params=kept), Unstructured(), rules=rules)


def test_uniform_gives_every_layer_the_same_share():
    problem = problem_of("without batch norm", "sparsity=0.75")
    for layer, kept in kept_by("uniform", problem).items():
        assert abs(kept - 0.25 * problem.scope[layer].total) < 1


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_erk_agrees_with_the_loop_over_dense_layers(sparsity: float):
    problem = problem_of("without batch norm", f"sparsity={sparsity}")
    layers = {layer.name: layer for layer in problem.scope}
    raw = {name: sum(layer.shape) / layer.total for name, layer in layers.items()}
    dense: set[str] = set()
    while True:  # RigL: raise the price until no density is above 1; layers above become dense
        left = (1 - sparsity) * problem.budget.total - sum(layers[name].total for name in dense)
        price = left / sum(raw[name] * layers[name].total for name in layers if name not in dense)
        above = {name for name in layers if name not in dense and price * raw[name] > 1}
        if not above:
            break
        dense |= above
    for name, kept in kept_by("erk", problem).items():
        expected = layers[name].total * (1.0 if name in dense else price * raw[name])
        assert abs(kept - expected) < 1


def test_erk_gives_a_stack_of_experts_the_density_of_one_of_them():
    layers = (Layer("stack", (8, 6, 4), "experts"), Layer("one", (6, 4), "linear"))
    densities = erk(replace(posed(linears([[1.0]]), 1), scope=Scope(layers, {})))
    assert densities["stack"] == densities["one"] == 10 / 24


SCORES = {
    "global": lambda weights: [abs(w) for w in weights],
    "global-normalised": lambda weights: [abs(w) / (math.hypot(*weights) or 1) for w in weights],
    # the energy of the weights that are still there when w goes, in ascending order; ties by index
    "lamp": lambda weights: [
        w * w / (sum(v * v for j, v in enumerate(weights) if (abs(v), -j) >= (abs(w), -i)) or 1)
        for i, w in enumerate(weights)
    ],
}

values = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 3.0])
layers = st.lists(st.lists(values, min_size=1, max_size=6), min_size=1, max_size=4)


@pytest.mark.parametrize("name", SCORES)
@given(rows=layers, share=st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_rankings_agree_with_sorting_all_weights_in_python(name: str, rows: list[list[float]], share: float):
    total = sum(map(len, rows))
    kept = max(round(share * total), len(rows))
    ranked = sorted(
        (-score, f"{i}.weight", j) for i, row in enumerate(rows) for j, score in enumerate(SCORES[name](row))
    )
    for r in range(total + 1):  # the floor of one weight a layer takes what the ranking does not
        survivors = [layer for _, layer, _ in ranked[:r]]
        expected = {f"{i}.weight": max(survivors.count(f"{i}.weight"), 1) for i in range(len(rows))}
        if sum(expected.values()) == kept:
            break
    assert kept_by(name, posed(linears(*([row] for row in rows)), kept)) == expected


def test_equal_scores_go_to_the_layer_first_by_name():
    found = kept_by("global", posed(linears([[1.0, 1.0, 1.0]], [[1.0], [1.0], [1.0]]), 4))
    assert found == {"0.weight": 3, "1.weight": 1}


def test_bounds_of_a_layer_shift_weights_to_the_others():
    model = linears([[9.0, 8.0, 7.0, 6.0]], [[1.0], [1.1], [1.2], [1.3]])
    assert kept_by("global", posed(model, 5)) == {"0.weight": 4, "1.weight": 1}
    capped = posed(model, 5, Rules(max_density={"0": 0.5}))
    assert kept_by("global", capped) == {"0.weight": 2, "1.weight": 3}
    floored = posed(model, 5, Rules(min_density={"1": 0.75}))
    assert kept_by("global", floored) == {"0.weight": 2, "1.weight": 3}


def test_rankings_are_of_weights_whatever_their_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = linears([[1.0, 2.0, 3.0, 4.0]], [[0.5], [5.0], [6.0], [7.0]])
        assert kept_by("global", posed(model.to(dtype), 4)) == {"0.weight": 1, "1.weight": 3}


def test_lamp_scores_do_not_overflow_in_half_precision():
    model = linears([[300.0, 400.0, 500.0, 1.0]], [[0.001], [0.002], [0.003], [0.004]]).half()
    assert sum(kept_by("lamp", posed(model, 4)).values()) == 4


def test_a_given_allocation_that_meets_the_budget_is_kept_as_it_is():
    wished = {"0.weight": 0.25, "1.weight": 0.75}
    model = linears([[1.0] * 8] * 4, [[1.0] * 4] * 8)
    result = prune(model, None, "sparsity=0.5", allocate=wished, repair="none")
    assert result.allocation.kept == {"0.weight": 8, "1.weight": 24}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.9])
def test_an_edited_allocation_is_scaled_to_the_budget_in_proportion(sparsity: float):
    model = linears([[1.0] * 32] * 4, [[1.0] * 4] * 64)
    edited = {"0.weight": 0.2, "1.weight": 0.4}
    kept = prune(model, None, f"sparsity={sparsity}", allocate=edited, repair="none").allocation.kept
    assert sum(kept.values()) == round((1 - sparsity) * 384)
    if sparsity >= 0.5:
        assert abs(2 * kept["0.weight"] / 128 - kept["1.weight"] / 256) < 0.02


def test_an_allocation_of_other_layers_is_refused_by_name():
    model = linears([[1.0, 2.0]], [[1.0], [2.0]])
    with pytest.raises(UsageError, match=r"allocate: .*unknown 7.weight.*missing 1.weight"):
        prune(model, None, "sparsity=0.5", allocate={"0.weight": 0.5, "7.weight": 0.5}, repair="none")
    for wrong in ({"0.weight": "many", "1.weight": 1}, {"0.weight": None, "1.weight": 1}):
        with pytest.raises(UsageError, match="no number"):
            prune(model, None, "sparsity=0.5", allocate=wrong, repair="none")
    with pytest.raises(UsageError, match=r"0\.weight"):
        prune(model, None, "sparsity=0.5", allocate={"0.weight": math.nan, "1.weight": 1.0}, repair="none")


def test_a_ranking_takes_the_whole_net_into_account():
    problem = posed(CASES["one huge outlier"].make(), 200)
    densities = global_magnitude(problem)
    assert set(densities) == {layer.name for layer in problem.scope}
    assert sum(densities[layer.name] * layer.total for layer in problem.scope) == pytest.approx(200)
