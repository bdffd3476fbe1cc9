"""POT: what a row had it gets back, and each layer is rebuilt on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.methods import METHODS, RECIPES
from allot.methods.pot import Layerwise, WeightMoments
from allot.network.applied_masks import masked
from allot.network.call import call
from allot.network.hooks import Apply, watched_layers
from allot.run.driver import drive
from allot.run.problem import Candidate, Problem
from contract.cases import CASES, attention, before, convolutions, problem_of, same


def repaired(method: Any, problem: Problem) -> tuple[Candidate, Candidate]:
    """Before and after."""
    pruned = before("layerwise", problem)
    return pruned, drive(method, problem, pruned)


def layer_errors(problem: Problem, candidate: Candidate) -> dict[str, float]:
    """Relative squared error of each layer's output, at the inputs that it has in the dense net."""
    errors: dict[str, float] = {}
    tensors = candidate.effective(problem)

    def visit(layer: Any, apply: Apply, output: Tensor) -> None:
        bias = layer.name.removesuffix("weight") + "bias"
        ours = apply(tensors[layer.name], tensors.get(bias, problem.dense.get(bias)))
        errors[layer.name] = float((ours - output).square().mean() / output.square().mean())

    inputs = problem.inputs().pick(range(len(problem.inputs())))
    with torch.no_grad(), watched_layers(problem.model, problem.scope, visit):
        call(problem.model, {}, inputs)
    return errors


# weights


def test_a_row_has_its_spread_again_and_its_mean_as_far_as_what_is_left_can_carry_it():
    torch.manual_seed(0)
    w, m = torch.randn(5, 40, dtype=torch.float64) + 0.3, torch.rand(5, 40) < 0.4
    found = WeightMoments().matched(w, m)
    left = torch.where(m, w, 0.0)
    r = w.std(1, correction=0) / left.std(1, correction=0)
    d = w.mean(1) - (r[:, None] * left).mean(1)
    assert torch.allclose(torch.where(m, found, 0.0), torch.where(m, r[:, None] * w + d[:, None], 0.0))
    # the shift lands on what is left only: before it is masked, both moments are those of the dense row
    whole = r[:, None] * left + d[:, None]
    assert torch.allclose(whole.std(1, correction=0), w.std(1, correction=0))
    assert torch.allclose(whole.mean(1), w.mean(1))
    assert torch.equal(found[~m], w[~m])


def test_rows_without_a_weight_or_without_spread_stay():
    w = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1e-3, 2.0, 1.0]])
    m = torch.tensor([[False] * 3, [True, True, True], [True, False, False], [True, False, False]])
    found = WeightMoments(limit=4.0).matched(w, m)
    assert torch.equal(found[:3], w[:3])
    assert bool(torch.isfinite(found).all()) and float(found[3, 0]) < 2.0  # the factor is cut


def test_it_needs_no_data():
    problem = replace(problem_of("without batch norm"), calibration=None)
    pruned = before("weight-moments", problem)
    assert not same(pruned, drive(WeightMoments(), problem, pruned))


# layers


def test_what_is_rebuilt_is_the_least_squares_answer_on_what_is_left():
    problem = problem_of("linear chain", "sparsity=0.5", batch_size=20)
    pruned, found = repaired(Layerwise(steps=600, learning_rate=0.05), problem)
    x, name = problem.inputs().pick(range(20)).double(), "0.weight"
    w, b = problem.dense[name].double(), problem.dense["0.bias"].double()
    y = x @ w.T + b
    for c, row in enumerate(pruned.masks[name]):
        kept = torch.cat([x[:, row], torch.ones(20, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(kept, y[:, c : c + 1]).solution[:, 0]
        ours = torch.cat([found.tensors[name][c, row], found.tensors["0.bias"][c : c + 1]]).double()
        least = float((kept @ best - y[:, c]).square().mean())
        assert float((kept @ ours - y[:, c]).square().mean()) == pytest.approx(least, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("inputs", ["dense", "sparse"])
@pytest.mark.parametrize("case", ["with batch norm", "without batch norm", "attention", "linear chain"])
def test_every_layer_comes_nearer_to_its_dense_output(case: str, inputs: str):
    problem = problem_of(case, "sparsity=0.6", batch_size=10)
    pruned, found = repaired(Layerwise(steps=60, learning_rate=0.03, inputs=inputs), problem)
    start, end = layer_errors(problem, pruned), layer_errors(problem, found)
    if inputs == "dense":
        assert all(end[name] < start[name] for name in start if start[name] > 1e-6)
    assert sum(end.values()) < sum(start.values())
    assert all(torch.equal(found.masks[name], mask) for name, mask in pruned.masks.items())


def test_inputs_of_the_sparse_net_let_a_layer_mend_what_came_before():
    problem = problem_of("linear chain", "sparsity=0.6", batch_size=20)
    x = problem.inputs().pick(range(20))
    errors = {}
    for inputs in ("dense", "sparse"):
        _, found = repaired(Layerwise(steps=400, learning_rate=0.03, inputs=inputs), problem)
        with torch.no_grad():
            ours, dense = (call(problem.model, tensors, x) for tensors in (found.effective(problem), {}))
        errors[inputs] = float((ours - dense).square().mean())
    assert errors["sparse"] < errors["dense"]


class InPlace(nn.Module):
    """Writes into what its layers have given."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.act, self.inplace = nn.ReLU(inplace=inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.one(x))
        z = self.two(y)
        z = z.add_(y) if self.inplace else z + y
        return self.three(self.act(z))


@pytest.mark.parametrize("inputs", ["dense", "sparse"])
def test_what_is_written_over_in_place_was_seen_before(inputs: str):
    found = [
        repaired(Layerwise(steps=8, inputs=inputs), problem_of("linear chain", model=InPlace(inplace=inplace)))[1]
        for inplace in (True, False)
    ]
    assert same(*found)


def test_no_gradient_passes_from_layer_to_layer():
    problem = problem_of("linear chain", "sparsity=0.5")
    _, found = repaired(Layerwise(steps=5), problem)
    model = CASES["linear chain"].make()
    with torch.no_grad():
        model[2].weight.mul_(3.0)
    _, other = repaired(Layerwise(steps=5), problem_of("linear chain", "sparsity=0.5", model=model))
    assert torch.equal(found.tensors["0.weight"], other.tensors["0.weight"])


@pytest.mark.parametrize("make", [convolutions, attention])
def test_a_layer_applied_with_its_own_weight_gives_what_it_gave(make: Any):
    case = "with batch norm" if make is convolutions else "attention"
    problem = problem_of(case)
    seen: list[str] = []

    def visit(layer: Any, apply: Apply, output: Tensor) -> None:
        bias = {"attention.in_proj_weight": "attention.in_proj_bias"}.get(
            layer.name, layer.name.removesuffix("weight") + "bias"
        )
        ours = apply(problem.dense[layer.name], problem.dense.get(bias))
        assert torch.allclose(ours, output, atol=1e-6), layer.name
        seen.append(layer.name)

    with torch.no_grad(), watched_layers(problem.model, problem.scope, visit):
        call(problem.model, {}, problem.inputs().batch(0)[0])
    assert sorted(seen) == sorted(layer.name for layer in problem.scope)


def test_the_recipe_is_pots_own_allocation_and_repairs():
    recipe = RECIPES["pot"]
    assert recipe.allocate == "global-normalised" and recipe.repair[:2] == ("weight-moments", "layerwise")
    problem = problem_of("with batch norm", "sparsity=0.8")
    kept = drive(METHODS["global-normalised"], problem, Candidate.dense(problem)).allocation.kept
    scores = {layer.name: problem.dense[layer.name].abs() / problem.dense[layer.name].norm() for layer in problem.scope}
    every = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
    cut = every[round(0.2 * problem.budget.total) - 1]
    assert kept == {name: int((score >= cut).sum()) for name, score in scores.items()}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": -1}, {"inputs": "both"}])
def test_a_value_out_of_its_range_is_refused(wrong: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Layerwise(**wrong)


def test_masked_weights_do_not_move():
    problem = problem_of("without batch norm")
    pruned, found = repaired(Layerwise(steps=5), problem)
    for name, mask in pruned.masks.items():
        assert torch.equal(found.tensors[name][~mask], problem.dense[name][~mask])
        assert not torch.equal(masked(found.tensors[name], mask), masked(problem.dense[name], mask))


def test_a_tied_weight_is_rebuilt_at_all_its_places_and_biases_beside_it_stay():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
            self.b.weight = self.a.weight
            nn.init.ones_(self.a.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.tanh(self.a(x))))

    problem = problem_of("linear chain", "sparsity=0.3", batch_size=20, model=Tied())
    pruned, found = repaired(Layerwise(steps=60, learning_rate=0.03), problem)
    x = problem.inputs().pick(range(20))
    with torch.no_grad():
        dense, before_it, after = (
            call(problem.model, tensors, x) for tensors in ({}, pruned.effective(problem), found.effective(problem))
        )
    assert float((after - dense).square().mean()) < float((before_it - dense).square().mean())
    assert torch.equal(found.effective(problem).get("a.bias", problem.dense["a.bias"]), problem.dense["a.bias"])


def test_a_sparse_net_that_takes_another_way_is_told():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(self.b(h) if h.std() < 0.5 else h)

    problem = problem_of("linear chain", "sparsity=0.9", batch_size=20, model=Gate())
    with pytest.raises(UsageError, match=r"b\.weight is applied more often"):
        repaired(Layerwise(steps=2, inputs="sparse"), problem)
