"""ADMM: masks near the best ones, weights that a dense solver gives, exact counts for any layer and pattern."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot import Budget, Calibration, Channels, Rules, Unstructured, UsageError
from allot.methods.admm import Admm, _energy_of_mean
from allot.methods.layerwise.grams import Gram, Statistics
from allot.methods.layerwise.quadratic import Quadratic, alternated, refined
from allot.methods.layerwise.sites import Site
from allot.methods.layerwise.streamed import Streamed
from allot.methods.layerwise.swaps import exchanged
from allot.methods.rules import uniform
from allot.methods.training.selection import Selection
from allot.network.call import call
from allot.network.layers import Layer
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.patterns import NM, Rows, parse, select
from allot.run.problem import Candidate, Method, Problem, Rule
from cli.command import MLP, SAMPLES, done
from contract.cases import same
from methods.columns import gram_of
from methods.layerwise.nets import NETS
from processes.together import together


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def posed(
    model: nn.Module, inputs: Any, *, sparsity: float = 0.5, pattern: Any = None, batch_size: int = 8, **rules: Any
) -> tuple[Problem, Candidate]:
    """A problem, and weights selected by magnitude at uniform densities."""
    data = Calibration.of(inputs, batch_size=batch_size)
    budget = Budget(sparsity=sparsity)
    problem = make_problem(model.eval(), budget, pattern or Unstructured(), calibration=data, rules=Rules(**rules))
    return problem, drive(Selection(), problem, drive(Rule(uniform), problem, Candidate.dense(problem)))


def correlated(samples: int, width: int, seed: int = 1) -> Tensor:
    return drawn(samples, width, seed=seed) @ drawn(width, width, seed=seed + 1)


# oracles


def best_errors(W: Tensor, G: Tensor) -> Tensor:
    """The least of |(W' - W) X|^2 for each number of weights, by least squares on every mask."""
    _rows, K = W.shape
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=K)), dtype=torch.float64)
    G, W = G.double(), W.double()
    A = masks[:, :, None] * G * masks[:, None] + torch.diag_embed(1 - masks)
    fitted = torch.linalg.solve(A, masks[:, :, None] * (G @ W.t())).mT  # [masks, rows, K]
    errors = ((fitted - W) @ G * (fitted - W)).sum(-1)
    counts = masks.sum(1).long()
    of_rows = torch.stack([errors[counts == count].amin(0) for count in range(K + 1)], 1)  # [rows, K + 1]
    best = of_rows[0]
    for row in of_rows[1:]:
        total = torch.full((len(best) + K,), float("inf"), dtype=torch.float64)
        for count in range(K + 1):
            total[count : count + len(best)] = torch.minimum(total[count : count + len(best)], best + row[count])
        best = total
    return best


class Beside(nn.Module):
    """Layers of one size, each with inputs of its own."""

    def __init__(self, count: int, K: int, rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, rows, bias=False) for _ in range(count))
        for layer in self.layers:
            nn.init.normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:, i]) for i, layer in enumerate(self.layers)], -1)


SIZES = [(1, 10), (2, 5), (5, 2), (3, 3)]
CASES_OF_A_SIZE = 15


def test_small_layers_are_within_a_hundredth_of_the_best_mask_in_95_of_100_cases():
    ratios = []
    for number, (rows, K) in enumerate(SIZES):
        model = Beside(CASES_OF_A_SIZE, K, rows)
        inputs = torch.stack([correlated(200, K, 7 * i + number) + i % 2 for i in range(CASES_OF_A_SIZE)], 1)
        best = [
            best_errors(layer.weight.detach(), inputs[:, i].t() @ inputs[:, i]) for i, layer in enumerate(model.layers)
        ]
        for sparsity in (0.4, 0.7):
            problem, candidate = posed(model, inputs, sparsity=sparsity, batch_size=200)
            result = drive(Admm(damping=1e-6), problem, candidate)
            weights = result.effective(problem)
            for i, layer in enumerate(model.layers):
                name = f"layers.{i}.weight"
                with torch.no_grad():
                    apart = inputs[:, i].double() @ (weights[name] - layer.weight).double().t()
                ratios.append(float(apart.square().sum()) / float(best[i][candidate.allocation.kept[name]]))
    assert min(ratios) > 1 - 1e-3
    near = sum(ratio <= 1.01 for ratio in ratios) / len(ratios)
    assert near >= 0.95, near


@pytest.mark.parametrize("pattern", [Rows(), NM(2, 4), Unstructured()], ids=str)
def test_exchanges_end_at_a_mask_of_the_pattern_that_no_exchange_improves(pattern: Any):
    layer = Layer("w", (3, 8), "linear", min_per_row=1)
    W, x = drawn(3, 8), correlated(100, 8, 3)
    quadratic = Quadratic(W, {("w", 0, 3): gram_of(*x.chunk(2))}, 1e-6)
    before = pattern.mask(layer, drawn(3, 8, seed=9), 12)
    mask = exchanged(quadratic.A_of_rows(), quadratic.Y, [before], layer, pattern)
    assert int(mask.sum()) == 12 and torch.equal(pattern.mask(layer, mask.float(), 12), mask)

    def error(M: Tensor) -> float:
        A, Y = quadratic.A_of_rows()[0].double(), quadratic.Y.double()
        solved = [Y[r, M[r]] @ torch.linalg.solve(A[M[r]][:, M[r]], Y[r, M[r]]) for r in range(3)]
        return -float(sum(solved))

    found = error(mask)
    assert found < error(before)
    flat, span = mask.flatten(), float(quadratic.Y.square().sum())
    for i, j in itertools.product(flat.nonzero().flatten().tolist(), (~flat).nonzero().flatten().tolist()):
        other = flat.clone()
        other[i], other[j] = False, True
        if torch.equal(pattern.mask(layer, other.view(3, 8).float(), 12), other.view(3, 8)):
            assert error(other.view(3, 8)) > found - 1e-4 * span


def test_conjugate_gradients_are_least_squares_on_the_mask():
    W, x, M = drawn(6, 12).double(), correlated(64, 24).double(), drawn(6, 12, seed=5) > 0
    first, second = gram_of(*x[:, :12].chunk(2)), gram_of(*x[:, 12:].chunk(2))
    both = Gram(
        [torch.cat(halves) for halves in zip(first.halves, second.halves, strict=True)],
        torch.cat([first.cross, second.cross]),
        [torch.cat(totals) for totals in zip(first.totals, second.totals, strict=True)],
        torch.cat([first.dense_total, second.dense_total]),
        first.positions,
    )
    quadratic = Quadratic(W, {("w", 0, 6): both}, 0.01)
    found = refined(quadratic, drawn(6, 12, seed=8).double(), M, 60)
    for row, mask in enumerate(M):
        A = quadratic.A_of_rows()[row]
        G = (first if row < 3 else second).gram[0]
        torch.testing.assert_close(A, G / quadratic.n[row].outer(quadratic.n[row]) + 0.01 * torch.eye(12).double())
        wanted = torch.linalg.solve(A[mask][:, mask], quadratic.Y[row, mask])
        torch.testing.assert_close(found[row, mask], wanted, atol=1e-6, rtol=1e-6)
        assert not found[row, ~mask].any()


def test_a_row_is_the_least_squares_fit_of_the_dense_nets_outputs():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x = correlated(80, 6).double()
    problem, candidate = posed(model, x, batch_size=20)
    result = drive(Admm(damping=0, refinement=60), problem, candidate)
    weights = result.effective(problem)
    with torch.no_grad():
        sparse = call(model[:2], {"0.weight": weights["0.weight"]}, x)
        targets = model[:2](x) @ model[2].weight.t()
        for row, mask in enumerate(result.masks["2.weight"]):
            fitted = torch.linalg.lstsq(sparse[:, mask], targets[:, row : row + 1]).solution[:, 0]
            torch.testing.assert_close(weights["2.weight"][row, mask], fitted, atol=1e-5, rtol=1e-5)
        error = (sparse @ weights["2.weight"].t() - targets).square().sum() / targets.square().sum()
    assert result.diagnostics["admm"]["errors"]["2.weight"] == pytest.approx(float(error), rel=1e-6)


def test_the_mask_that_moves_is_better_than_the_mask_by_magnitude():
    W, x = drawn(20, 40), correlated(400, 40)
    quadratic = Quadratic(W, {("w", 0, 20): gram_of(*x.chunk(2))}, 1e-3)
    energy = float((x @ W.t()).square().sum())

    def error(X: Tensor, mask: Tensor) -> float:
        return quadratic.error(refined(quadratic, X, mask, 60) / quadratic.n, energy)

    X, mask = alternated(quadratic, select, 240, 24)
    moving = error(X, mask)
    by_magnitude = select(W.abs(), 240), select((W * quadratic.n).abs(), 240)
    assert all(moving < 0.7 * error(X, mask) for mask in by_magnitude)


# nets


class OneAtATime(nn.Module):
    """Attention with three inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 8)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4)
        self.mixed = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        y = y + self.cross(y, x[..., :4], x[..., 4:], need_weights=False)[0]
        return y + self.mixed(y, x, x, need_weights=False)[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **more: Any) -> None:
        super().__init__()
        self.cells, self.out = kind(8, 8, batch_first=True, **more), nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0])


class Experts(nn.Module):
    """Each position goes to one of the first three experts; no position reaches the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 12) / 3), nn.Parameter(torch.randn(4, 12, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        expert, out = flat[:, :3].argmax(1), torch.zeros_like(flat)
        for e in range(4):
            if len(mine := flat[expert == e]):
                out[expert == e] = torch.relu(mine @ self.up[e]) @ self.down[e]
        return out.view(x.shape)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))))


def conv1d() -> nn.Module:
    """A layer stored [in, out], as those of GPT-2 are; the name and the home of a class tell the kind."""

    class Conv1D(nn.Module):
        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            return torch.addmm(self.bias, flat, self.weight).view(*x.shape[:-1], -1)

    Conv1D.__module__ = "transformers.pytorch_utils"
    return nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(4, 12))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 2, stride=2),
        nn.ConvTranspose2d(8, 4, 3, groups=2),
    )


def with_lazy(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        model(x)
    return model


SEQUENCE, PICTURE = (12, 6, 8), (12, 4, 8, 8)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), SEQUENCE),
    "convolutions": (convolutions, PICTURE),
    "1 dimension": (lambda: nn.Sequential(nn.Conv1d(8, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 3)), (12, 8, 9)),
    "3 dimensions": (lambda: nn.Conv3d(4, 4, 2), (8, 4, 3, 4, 3)),
    "Conv1D": (conv1d, SEQUENCE),
    "self-attention": (SelfAttention, SEQUENCE),
    "cross-attention": (OneAtATime, SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "gru both ways": (lambda: Recurrent(nn.GRU, bidirectional=True), SEQUENCE),
    "experts": (Experts, SEQUENCE),
    "tied": (Tied, SEQUENCE),
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    x = drawn(*shape)
    return with_lazy(make(), x), x


INPUTS_NOT_IN_FOURS = {"convolutions": ("3.weight", "5.weight"), "1 dimension": ("2.weight",)}


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "2:4", "n:4"])
@pytest.mark.parametrize("name", LAYERS)
def test_counts_are_exact_and_masks_are_of_the_pattern(name: str, pattern: str):
    model, x = net(name)
    exclude = INPUTS_NOT_IN_FOURS.get(name, ()) if ":4" in pattern else ()
    problem, candidate = posed(model, x, pattern=parse(pattern), exclude=exclude)
    result = drive(Admm(iterations=6, refinement=4), problem, candidate)
    assert result.allocation == candidate.allocation
    assert set(result.diagnostics["admm"]["errors"]) == {layer.name for layer in problem.scope}
    weights = result.effective(problem)
    for layer in problem.scope:
        mask, kept = result.masks[layer.name], candidate.allocation.kept[layer.name]
        assert int(mask.sum()) == kept
        assert torch.equal(problem.pattern.mask(layer, mask.float(), kept), mask)
        weight = weights[layer.name]
        assert weight.shape == mask.shape == layer.shape and bool(torch.isfinite(weight).all())
        assert not weight[~mask].any()


@pytest.mark.parametrize("inputs", ["sparse", "dense"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_layers_error_is_above_that_of_dense_weights_under_the_mask_by_score(name: str, inputs: str):
    model, x = net(name)
    problem, candidate = posed(model, x)
    method = Admm(inputs=inputs)
    state = method.init(problem, candidate)
    method.step(problem, candidate, state)
    for site in map(Site.from_state, list(state["sites"])):
        statistics = Statistics(problem, site, inputs=inputs, targets="dense")
        statistics.collect(dict(state["tensors"]))
        method.step(problem, candidate, state)
        for layer in site.layers:
            parts = {
                part: statistics.grams[site.source.get(part, part)] for part in statistics.energy if part[0] == layer
            }
            dense, matrix = problem.dense[layer], problem.scope[layer].matrix
            energy = float(sum(statistics.energy[part] for part in parts))
            if layer in state["norm_means"]:
                energy -= sum(_energy_of_mean(matrix(dense), part, gram) for part, gram in parts.items())
                parts = {part: gram.centred() for part, gram in parts.items()}
            masked = Quadratic(matrix(dense), parts, 0.01).error(matrix(dense * candidate.masks[layer]), energy)
            assert state["errors"][layer] <= masked * 1.0001 + 1e-6, layer


def test_each_row_keeps_what_the_floor_asks_for():
    problem, candidate = posed(nn.Linear(16, 12), correlated(64, 16), sparsity=0.8, floor="2/row")
    result = drive(Admm(), problem, candidate)
    assert int(result.masks["weight"].sum(1).min()) >= 2
    assert int(result.masks["weight"].sum()) == candidate.allocation.kept["weight"]


def test_the_mask_of_channels_is_left_and_its_weights_are_fitted():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    x = correlated(100, 6).double()
    problem, candidate = posed(model, x, sparsity=0.4, pattern=Channels())
    result = drive(Admm(damping=0, refinement=60), problem, candidate)
    assert dict(result.masks) == dict(candidate.masks) and result.channels == candidate.channels
    weights = result.effective(problem)
    with torch.no_grad():
        sparse = call(model[:2], {"0.weight": weights["0.weight"], "0.bias": weights.get("0.bias", model[0].bias)}, x)
        targets = model[:2](x) @ model[2].weight.t()
        for row, mask in enumerate(result.masks["2.weight"]):
            if mask.any():
                fitted = torch.linalg.lstsq(sparse[:, mask], targets[:, row : row + 1]).solution[:, 0]
                torch.testing.assert_close(weights["2.weight"][row, mask], fitted, atol=1e-5, rtol=1e-5)


def test_a_layer_that_keeps_everything_keeps_its_weights():
    problem, _candidate = posed(nn.Linear(8, 4), correlated(64, 8))
    whole = Candidate.dense(problem)
    whole = replace(whole, masks={"weight": torch.ones(4, 8, dtype=torch.bool)})
    result = drive(Admm(), problem, whole)
    torch.testing.assert_close(result.tensors["weight"], problem.dense["weight"], atol=1e-4, rtol=1e-4)
    assert result.diagnostics["admm"]["errors"]["weight"] < 1e-6


# the same again


@pytest.mark.parametrize("name", ["convolutions", "self-attention", "lstm", "experts"])
def test_two_runs_are_equal_and_so_is_one_whose_state_went_through_a_file_at_every_step(name: str):
    model, x = net(name)
    problem, candidate = posed(model, x)
    method = Admm(iterations=6)
    one = drive(method, problem, candidate)
    assert same(one, drive(method, problem, candidate))
    state = method.init(problem, candidate)
    while state["step"] < state["steps"]:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        method.step(problem, candidate, state)
    assert same(one, method.finish(problem, candidate, state))


@pytest.mark.parametrize("name", NETS)
def test_a_streamed_run_is_that_of_the_whole_net(name: str):
    problem, candidate = posed(NETS[name].model(), NETS[name].inputs(), batch_size=4)
    method = Admm(iterations=8)
    whole, found = drive(method, problem, candidate), drive(Streamed(method, torch.device("cpu")), problem, candidate)
    assert found.tensors.keys() == whole.tensors.keys() >= {layer.name for layer in problem.scope}
    for layer in whole.tensors:
        assert layer.endswith("running_mean") or torch.equal(found.masks[layer], whole.masks[layer]), layer
        torch.testing.assert_close(found.tensors[layer], whole.tensors[layer], atol=1e-4, rtol=1e-3)
    assert found.diagnostics["admm"]["errors"] == pytest.approx(whole.diagnostics["admm"]["errors"], abs=1e-5)


def test_two_processes_give_what_one_gives():
    problems = {name: posed(*net(name), batch_size=5) for name in ("convolutions", "self-attention", "tied")}

    def run() -> dict[str, Any]:
        found = {name: drive(Admm(iterations=8), *problem) for name, problem in problems.items()}
        return {
            name: {
                layer: (result.masks[layer].numpy(), result.tensors[layer].numpy(), error)
                for layer, error in result.diagnostics["admm"]["errors"].items()
            }
            for name, result in found.items()
        }

    one = run()
    for other in together(2, run, 100):
        for name, layers in one.items():
            assert other[name].keys() == layers.keys()
            for layer, (mask, weight, error) in layers.items():
                found_mask, found_weight, found_error = other[name][layer]
                assert (found_mask == mask).all(), (name, layer)
                assert found_error == pytest.approx(error, rel=1e-3, abs=1e-5)
                # rounding grows from layer to layer along directions in which inputs hardly vary
                assert found_weight == pytest.approx(weight, rel=1e-2, abs=1e-2)


# odd inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_any_precision_are_repaired_in_theirs(dtype: torch.dtype):
    def model(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8)).to(dtype)

    x = drawn(60, 3, 5, 5)
    errors = {}
    for kind in (dtype, torch.float32):
        problem, candidate = posed(model(kind), x.to(kind))
        result = drive(Admm(), problem, candidate)
        assert {tensor.dtype for tensor in result.tensors.values()} == {kind}
        errors[kind] = result.diagnostics["admm"]["errors"]
    assert errors[dtype] == pytest.approx(errors[torch.float32], rel=0.2)


def finite(problem: Problem, candidate: Candidate, method: Method | None = None) -> Candidate:
    result = drive(method or Admm(), problem, candidate)
    for name, weight in result.effective(problem).items():
        assert bool(torch.isfinite(weight).all()), name
    for layer in problem.scope:
        assert int(result.masks[layer.name].sum()) == candidate.allocation.kept[layer.name]
    return result


@pytest.mark.parametrize("damping", [None, 0, 0.01])
@pytest.mark.parametrize("case", ["one sample", "fewer positions than columns", "dead columns", "nothing but zeros"])
def test_odd_inputs_give_finite_weights(case: str, damping: float | None):
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    x = correlated({"one sample": 1, "fewer positions than columns": 7}.get(case, 40), 12)
    if case == "dead columns":
        x[:, ::3] = 0
    if case == "nothing but zeros":
        x = torch.zeros(8, 12)
    problem, candidate = posed(model, x)
    result = finite(problem, candidate, Admm(damping=damping))
    errors = result.diagnostics["admm"]["errors"]
    assert all(0 <= error < 1 for error in errors.values())
    if case == "fewer positions than columns" and damping == 0.01:
        assert errors["0.weight"] < 0.02  # more weights than equations
    if case == "dead columns":
        dead = result.masks["0.weight"][:, ::3].float().mean()
        assert float(dead) < 0.2


def test_a_wide_layer_without_damping_and_with_few_positions_is_solved():
    problem, candidate = posed(nn.Linear(80, 10), correlated(6, 80))
    finite(problem, candidate, Admm(damping=0))


def test_a_layer_that_is_never_reached_keeps_its_weights_and_its_mask_by_score():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + (self.two(x) if float(x.max()) > 1e6 else 0)

    x = correlated(20, 8)
    problem, candidate = posed(Half(), torch.cat([x, torch.full((1, 8), 1e7)]))  # else it leaves the scope
    problem = replace(problem, calibration=Calibration.of(x, batch_size=8))
    result = finite(problem, candidate)
    assert set(result.tensors) == {"one.weight"} == set(result.diagnostics["admm"]["errors"])
    assert torch.equal(result.masks["two.weight"], candidate.masks["two.weight"])


def test_an_expert_that_no_sample_reaches_keeps_its_dense_weights_under_its_mask():
    model, x = net("experts")
    problem, candidate = posed(model, x, pattern=Rows())
    result = finite(problem, candidate)
    for name in ("up", "down"):
        weight, mask = result.effective(problem)[name][3], result.masks[name][3]
        torch.testing.assert_close(weight, problem.dense[name][3] * mask)


def test_layers_whose_inputs_overflow_stay_as_they_were_selected():
    problem, candidate = posed(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), correlated(20, 8) * 1e25)
    result = finite(problem, candidate)
    assert torch.equal(result.masks["0.weight"], candidate.masks["0.weight"])
    assert "0.weight" not in result.tensors and "0.weight" not in result.diagnostics["admm"]["errors"]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_inputs_does_not_matter(scale: float):
    model, x = nn.Linear(12, 8), correlated(40, 12)
    one, other = (drive(Admm(), *posed(model, x * factor)) for factor in (1, scale))
    assert torch.equal(one.masks["weight"], other.masks["weight"])
    torch.testing.assert_close(one.tensors["weight"], other.tensors["weight"], atol=1e-4, rtol=1e-4)


# options, and the command line


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"refinement": -1},
        {"damping": -0.1},
        {"inputs": "both"},
        {"targets": ""},
        {"iterations": 1.5},
    ],
)
def test_options_out_of_range_are_one_clear_line(options: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(options))):
        Admm(**options)


def test_inputs_and_targets_are_chosen():
    model, x = net("linear")
    problem, candidate = posed(model, x, sparsity=0.7)
    found = [
        drive(Admm(inputs=inputs, targets=targets), problem, candidate)
        for inputs, targets in itertools.product(("sparse", "dense"), repeat=2)
    ]
    first = [result.tensors["0.weight"] for result in found]
    assert all(torch.equal(first[0], other) for other in first[1:])  # the first layer reads the same inputs in all
    assert not torch.equal(found[0].tensors["2.weight"], found[1].tensors["2.weight"])
    assert torch.equal(found[2].tensors["2.weight"], found[3].tensors["2.weight"])


def test_a_net_answers_nearer_to_the_dense_one_with_targets_of_the_dense_net():
    model, x = net("convolutions")
    problem, candidate = posed(model, x, sparsity=0.6)

    def apart(result: Candidate) -> float:
        with torch.no_grad():
            dense, ours = (call(model, tensors, x) for tensors in ({}, result.effective(problem)))
        return float((ours - dense).square().mean() / dense.square().mean())

    assert apart(drive(Admm(), problem, candidate)) < 0.5 * apart(candidate)


@pytest.fixture(scope="module")
def run_of_the_command_line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("admm") / "run"
    done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --allocate erk --repair admm --samples 32 --out {out}")
    return out


def test_the_report_of_the_command_line_holds_the_error_of_each_layer(run_of_the_command_line: Path):
    report = json.loads((run_of_the_command_line / "report.json").read_text())
    errors = report["diagnostics"]["admm"]["errors"]
    assert set(errors) == {"0.weight", "2.weight"} and all(0 < error < 1 for error in errors.values())
    assert report["repair"] == ["admm"]
    assert allot.verify(run_of_the_command_line)["passed"]
    done(f"verify {run_of_the_command_line}")


# models whose passes differ


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 6)


class Looping(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(torch.relu(self.a(sample))) for sample in x])


class Whole(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Choosing(TwoLayers):
    """Both layers read the first sample; a batch is read by one of them."""

    def forward(self, x: Tensor) -> Tensor:
        both = float(x.sum()) > 0
        return self.b(torch.relu(self.a(x) + self.c(x) if both else self.c(x)))


FAR = 1e6  # a sample beyond it reaches layers that others do not


class Wider(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(nn.functional.linear(x.double(), self.a.weight.double())).float()
        return self.b(y + self.c(x) if float(x.max()) > FAR else y)


class Picking(TwoLayers):
    """Samples that are picked are none in some batches."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        picked = x[:, 0] > 1.5
        z = y.clone()
        z[picked] = z[picked] + self.c(x[picked])
        return self.b(torch.relu(z))


def repaired(model: nn.Module, x: Tensor, **options: Any) -> Candidate:
    problem, candidate = posed(model, x, **options)
    return drive(Admm(iterations=8), problem, candidate)


def test_a_loop_over_samples_gives_what_the_batch_gives():
    x, whole = correlated(40, 16), Whole()
    looping = Looping()
    looping.load_state_dict(whole.state_dict())
    one, other = repaired(whole, x), repaired(looping, x)
    for name in ("a.weight", "b.weight"):
        torch.testing.assert_close(other.tensors[name], one.tensors[name], atol=0.05, rtol=0.05)
    assert other.diagnostics["admm"]["errors"] == pytest.approx(one.diagnostics["admm"]["errors"], rel=0.1)


def test_layers_that_share_an_input_in_some_batches_only_have_a_gram_each():
    x = -correlated(40, 16).abs()
    x[:1] *= -1
    result = repaired(Choosing(), x, batch_size=20)
    assert "c.weight" in result.diagnostics["admm"]["errors"] and bool(torch.isfinite(result.tensors["c.weight"]).all())


def test_a_pass_in_another_precision_than_the_weights_and_batches_without_a_sample_are_accepted():
    x = correlated(40, 16)
    problem, candidate = posed(Wider(), torch.cat([x, torch.full((1, 16), 10 * FAR)]))  # else `c` leaves the scope
    report = drive(Admm(iterations=8), replace(problem, calibration=Calibration.of(x, batch_size=8)), candidate)
    assert "c.weight" in report.diagnostics["admm"]["not_repaired"]
    assert "a.weight" in report.diagnostics["admm"]["errors"]
    assert repaired(Picking(), x, batch_size=2).diagnostics["admm"]["errors"].keys() >= {"a.weight", "b.weight"}


def test_layers_with_inputs_too_large_to_square_stay_as_they_were_selected():
    result = repaired(Whole(), correlated(40, 16) * 1e18)
    assert "a.weight" in result.diagnostics["admm"]["not_repaired"]


def test_a_norm_after_an_activation_in_place_keeps_its_mean():
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(inplace=True), nn.BatchNorm1d(12), nn.Linear(12, 6)).eval()
    assert "2.running_mean" not in repaired(model, correlated(40, 16)).tensors


class Apart(nn.Module):
    """Layers in no container: nothing in it is a block. Their inputs are smaller than eight times their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).relu()).relu())


def test_a_time_limit_that_is_not_reached_changes_nothing():
    torch.manual_seed(0)
    model = Apart().eval()
    asked: dict[str, Any] = {"calibration": drawn(256, 64), "budget": "sparsity=0.5", "repair": "admm"}
    free, limited = allot.prune(model, **asked), allot.prune(model, **asked, max_minutes=5)
    for name, value in free.candidate.tensors.items():  # the steps that were timed leave nothing behind
        assert torch.equal(value, limited.candidate.tensors[name])


def test_a_run_that_keeps_inputs_ends_and_counts_alike_however_often_it_is_stopped(tmp_path: Path):
    torch.manual_seed(0)
    model = Apart().eval()
    asked: dict[str, Any] = {"calibration": drawn(256, 64), "budget": "sparsity=0.5", "repair": "admm"}
    whole = allot.prune(model, **asked, save_to=tmp_path / "whole")
    for stops in itertools.count():
        steps = iter([False])  # one, each time
        try:
            parts = allot.prune(model, **asked, save_to=tmp_path / "parts", should_stop=lambda: next(steps, True))
            break
        except allot.Stopped:
            continue
    assert stops > 3 and same(parts.candidate, whole.candidate)
    assert (tmp_path / "parts/steps.jsonl").read_bytes() == (tmp_path / "whole/steps.jsonl").read_bytes()
    forward = [json.loads(line)["forward"] for line in (tmp_path / "whole/steps.jsonl").read_text().splitlines()]
    assert forward[-3:] == [448, 224, 224]  # the dense net runs once, for all three layers
