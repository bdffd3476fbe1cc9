"""Second-order statistics: each Gram is the product of the inputs that a layer reads, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allot
from allot import Budget, Calibration, Rules
from allot.methods.layerwise import grams
from allot.methods.layerwise import sites as sites_module
from allot.methods.layerwise.grams import Statistics
from allot.methods.layerwise.sites import DenseProducts, Site, sites_of
from allot.network.call import call
from allot.pruning.setup import make_problem
from allot.run.problem import Problem
from processes.together import together


def posed(model: nn.Module, inputs: Any, *, batch_size: int = 4, **rules: Any) -> Problem:
    data = Calibration.of(inputs, batch_size=batch_size)
    return make_problem(
        model.eval(), Budget(sparsity=0.5), allot.Unstructured(), calibration=data, rules=Rules(**rules)
    )


def collected(
    problem: Problem, layer: str, tensors: dict[str, Tensor] | None = None, **options: str
) -> tuple[Statistics, Site]:
    site = next(site for site in sites_of(problem) if layer in site.layers)
    statistics = Statistics(problem, site, **{"inputs": "sparse", "targets": "dense", **options})
    statistics.collect(tensors or {})
    return statistics, site


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# by hand


def patches(x: Tensor, kernel: tuple[int, ...], stride: int, padding: int) -> Tensor:
    """[positions, C * kernel], by indices: kernel positions run slowest, channels fastest."""
    x = F.pad(x, [padding] * (2 * len(kernel)))
    for dim, size in enumerate(kernel):
        x = x.unfold(2 + dim, size, stride)
    dims = len(kernel)
    x = x.movedim(1, -1)  # [N, *positions, *kernel, C]
    return x.flatten(1 + dims).flatten(0, dims)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1 dimension": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "2 dimensions": (nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (3, 7, 6)),
    "3 dimensions": (nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_gram_of_a_convolution_is_that_of_its_patches(name: str):
    model, shape = CONVOLUTIONS[name]
    x = drawn(10, *shape)
    statistics, _ = collected(posed(model, x), "weight")
    columns = patches(x, model.kernel_size, model.stride[0], model.padding[0])
    (gram,) = statistics.grams.values()
    torch.testing.assert_close(gram.gram[0], columns.t() @ columns, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gram.cross, gram.gram)
    assert sum(gram.positions) == len(columns)
    (energy,) = statistics.energy.values()
    outputs = columns @ model.weight.detach().movedim(1, -1).flatten(1).t()
    assert float(energy) == pytest.approx(float(outputs.square().sum()), rel=1e-5)


def test_a_grouped_convolution_has_a_gram_for_each_group():
    model, x = nn.Conv2d(4, 6, 3, groups=2), drawn(6, 4, 5, 5)
    (gram,) = collected(posed(model, x), "weight")[0].grams.values()
    for g in range(2):
        columns = patches(x[:, 2 * g : 2 * g + 2], (3, 3), 1, 0)
        torch.testing.assert_close(gram.gram[g], columns.t() @ columns, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_the_gram_of_a_linear_layer_is_that_of_all_positions_in_two_halves(shape: tuple[int, ...], size: int):
    x = drawn(8, *shape)
    problem = posed(nn.Linear(5, 3), x, batch_size=size)
    (gram,) = collected(problem, "weight")[0].grams.values()
    batches = [problem.inputs().batch(k)[0].reshape(-1, 5) for k in range(problem.inputs().batches)]
    if len(batches) == 1:
        batches = list(batches[0].chunk(2))
    for number in range(2):
        columns = torch.cat(batches[number::2])
        torch.testing.assert_close(gram.halves[number][0], columns.t() @ columns, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gram.totals[number][0], columns.sum(0), rtol=1e-4, atol=1e-4)
        assert gram.positions[number] == len(columns)
    centred = x.reshape(-1, 5) - x.reshape(-1, 5).mean(0)
    torch.testing.assert_close(gram.centred().gram[0], centred.t() @ centred, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gram.centred().cross[0], centred.t() @ centred, rtol=1e-4, atol=1e-4)
    flat = x.reshape(-1, 5)
    torch.testing.assert_close(gram.gram[0], flat.t() @ flat, rtol=1e-4, atol=1e-4)


def test_the_cross_product_is_between_the_dense_and_the_sparse_nets_inputs():
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), drawn(12, 5)
    tensors = {"0.weight": model[0].weight.detach() * (torch.rand(6, 5) > 0.5)}
    problem = posed(model, x)
    with torch.no_grad():
        dense = model[:2](x)
        sparse = torch.relu(F.linear(x, tensors["0.weight"], model[0].bias))
    energy = float((dense @ model[2].weight.detach().t()).square().sum())
    for options, gram_of, cross_of in (
        ({}, sparse, dense.t() @ sparse),
        ({"targets": "sparse"}, sparse, sparse.t() @ sparse),
        ({"inputs": "dense"}, dense, dense.t() @ dense),
    ):
        statistics, _ = collected(problem, "2.weight", tensors, **options)
        (gram,) = statistics.grams.values()
        torch.testing.assert_close(gram.gram[0], gram_of.t() @ gram_of, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gram.cross[0], cross_of, rtol=1e-4, atol=1e-4)
        if options.get("targets") != "sparse":
            assert float(next(iter(statistics.energy.values()))) == pytest.approx(energy, rel=1e-5)
        assert statistics.forward == (24 if not options else 12)


def test_gates_of_a_recurrent_layer_read_inputs_and_hidden_states():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model, x = Last().eval(), drawn(6, 5, 4)
    problem = posed(model, x, floor="0%")
    with torch.no_grad():
        hidden = model(x)
    previous = torch.cat([torch.zeros(6, 1, 3), hidden[:, :-1]], 1).flatten(0, 1)
    for name, columns in (("lstm.weight_ih_l0", x.flatten(0, 1)), ("lstm.weight_hh_l0", previous)):
        (gram,) = collected(problem, name)[0].grams.values()
        torch.testing.assert_close(gram.gram[0], columns.t() @ columns, rtol=1e-4, atol=1e-4)


# shared inputs


class SameInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.out = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.q(x), self.k(x), self.v(x)], -1))


def test_layers_that_read_the_same_tensor_share_one_gram():
    problem = posed(SameInputs(), drawn(8, 4))
    first, second = sites_of(problem)
    assert (first.layers, second.layers) == (("q.weight", "k.weight", "v.weight"), ("out.weight",))
    statistics, _ = collected(problem, "q.weight")
    assert len(statistics.grams) == 1 and len(statistics.energy) == 3
    assert Site.from_state(first.to_state()) == first


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y, need_weights=False)[0]


def test_the_projections_of_a_cross_attention_have_the_grams_of_their_inputs():
    x, y = drawn(6, 3, 8), drawn(6, 5, 8, seed=2)
    problem = posed(Cross(), [{"x": a, "y": b} for a, b in zip(x, y, strict=True)])
    statistics, _ = collected(problem, "attention.in_proj_weight")
    found = {part[1:]: gram.gram[0] for part, gram in statistics.grams.items()}
    for (start, stop), gram in found.items():
        columns = (x if start == 0 else y).flatten(0, 1)
        assert start == 0 or stop > 8
        torch.testing.assert_close(gram, columns.t() @ columns, rtol=1e-4, atol=1e-4)
    assert sum(stop - start for _, start, stop in statistics.energy) == 24


class Once(nn.Module):
    """Reads its weight twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)))


def test_the_gram_of_a_weight_that_is_used_twice_adds_both_uses():
    model, x = Once(), drawn(8, 4)
    (gram,) = collected(posed(model, x), "fc.weight")[0].grams.values()
    with torch.no_grad():
        h = torch.relu(model.fc(x))
    torch.testing.assert_close(gram.gram[0], x.t() @ x + h.t() @ h, rtol=1e-4, atol=1e-4)
    assert sum(gram.positions) == 16


def test_halves_are_equal_for_batches_of_one_sample():
    (gram,) = collected(posed(nn.Linear(5, 3), drawn(8, 5), batch_size=1), "weight")[0].grams.values()
    one, other = (half.diagonal(dim1=1, dim2=2).sum() for half in gram.halves)
    assert 0.3 < float(one / (one + other)) < 0.7


@pytest.mark.parametrize("positions", [10**9, 2])
@pytest.mark.parametrize("layer", ["0.weight", "3.weight"])
def test_processes_give_the_halves_of_one(layer: str, positions: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grams, "POSITIONS", positions)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 4))
    problem = posed(model, drawn(27, 2, 6, 6), batch_size=7)

    def run() -> dict[str, Any]:
        statistics, _ = collected(problem, layer)
        (gram,), (energy,) = statistics.grams.values(), statistics.energy.values()
        return {"halves": [half.numpy() for half in gram.halves], "count": gram.positions, "energy": float(energy)}

    one = run()
    for other in together(2, run, 30):
        assert other["count"] == one["count"]
        assert other["energy"] == pytest.approx(one["energy"], rel=1e-5)
        for half, wanted in zip(other["halves"], one["halves"], strict=True):
            assert half == pytest.approx(wanted, rel=1e-4, abs=1e-3)


# experts


class Routed(nn.Module):
    """Each sample goes to the expert that its first number names; the weight is one tensor."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x[:, 1:], self.weight, x[:, 0].long())


def one_by_one(x: Tensor, w: Tensor, expert: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 3)
    for e in expert.unique().tolist():
        out[expert == e] = x[expert == e] @ w[e]
    return out


def picked(x: Tensor, w: Tensor, expert: Tensor) -> Tensor:
    return torch.bmm(x[:, None], w[expert])[:, 0]


def routed_inputs(experts: list[int]) -> Tensor:
    return torch.cat([torch.tensor(experts)[:, None].float(), drawn(len(experts), 5)], 1)


ROUTES = {"each batch alike": [0, 1, 3] * 4, "first one alone": [0] + [1] * 5 + [3] * 6, "a run": [0, 1, 2, 3] * 6}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("function", [one_by_one, picked])
def test_each_expert_has_the_gram_of_the_samples_that_reach_it(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], route: str
):
    x = routed_inputs(ROUTES[route])
    statistics, _ = collected(posed(Routed(function), x, batch_size=2), "weight")
    found = torch.zeros(4, 5, 5)
    for (_, start, stop), gram in statistics.grams.items():
        found[start // 3 : stop // 3] += gram.gram
    for e in range(4):
        columns = x[x[:, 0] == e, 1:]
        torch.testing.assert_close(found[e], columns.t() @ columns, rtol=1e-4, atol=1e-4)
    rows = [row for _, start, stop in statistics.grams for row in range(start, stop)]
    assert len(rows) == len(set(rows)), "an expert has two Grams"


def test_processes_whose_samples_reach_other_experts_give_the_grams_of_one():
    model, x = Routed(one_by_one), routed_inputs([0, 0, 0, 0, 1, 1, 2, 3])

    def run() -> dict[Any, Any]:
        statistics, _ = collected(posed(model, x), "weight")
        grams = {part: gram.gram.numpy() for part, gram in statistics.grams.items()}
        return {"grams": grams, "energy": {part: float(value) for part, value in statistics.energy.items()}}

    one = run()
    for other in together(2, run, 30):
        assert other["grams"].keys() == one["grams"].keys()
        assert other["energy"] == pytest.approx(one["energy"], rel=1e-5)
        for part, gram in one["grams"].items():
            assert other["grams"][part] == pytest.approx(gram, rel=1e-4, abs=1e-4)


# positions


@pytest.mark.parametrize("layer", ["0.weight", "3.weight"])
def test_a_part_of_the_positions_gives_nearly_the_same(layer: str, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 4))
    problem = posed(model, drawn(96, 2, 8, 8), batch_size=32)
    monkeypatch.setattr(grams, "POSITIONS", 10**9)
    whole, _ = collected(problem, layer)
    monkeypatch.setattr(grams, "POSITIONS", 4)
    part, _ = collected(problem, layer)
    (one,), (other,) = whole.grams.values(), part.grams.values()
    K = one.gram.shape[1]
    assert 3 * K <= sum(other.positions) < sum(one.positions)
    scaled = other.gram / sum(other.positions) - one.gram / sum(one.positions)
    assert (
        float(scaled.norm() / (one.gram / sum(one.positions)).norm()) < 1.5 * (K / sum(other.positions)) ** 0.5
    )  # of draws
    few, all_of_them = (
        float(next(iter(s.energy.values()))) / sum(next(iter(s.grams.values())).positions) for s in (part, whole)
    )
    assert few == pytest.approx(all_of_them, rel=0.2)


# passes


def test_a_pass_ends_with_the_last_layer_of_the_site():
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[1].register_forward_hook(lambda *_: calls.append(1))
    problem = posed(model, drawn(8, 4))
    site = sites_of(problem)[0]
    calls.clear()
    Statistics(problem, site, inputs="sparse", targets="dense").collect({})
    assert not calls


class Writing(nn.Module):
    """Writes to the memory that a layer has read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        z = self.two(y)
        y.add_(z)
        return self.three(y)


@pytest.mark.parametrize(("room", "pushed"), [(0, [16, 16, 16]), (1, [24, 16, 16]), (8, [16, 8, 8])])
def test_the_dense_net_is_read_once_for_all_sites_where_its_inputs_fit(
    room: int, pushed: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sites_module, "ROOM", room)
    problem = posed(Writing(), drawn(8, 4))  # 2 batches
    sites = sites_of(problem)
    assert [site.layers for site in sites] == [("one.weight",), ("two.weight",), ("three.weight",)]
    tensors = {"one.weight": drawn(4, 4, seed=2)}
    dense = DenseProducts(problem, sites)
    for site, samples in zip(sites, pushed, strict=True):
        alone = Statistics(problem, site, inputs="sparse", targets="dense")
        shared = Statistics(problem, site, inputs="sparse", targets="dense", dense=dense)
        for statistics in (alone, shared):
            statistics.collect(tensors)
        dense.leave(site)
        (part,) = alone.grams
        assert torch.equal(alone.grams[part].cross, shared.grams[part].cross)
        assert alone.energy == shared.energy
        assert (alone.forward, shared.forward) == (16, samples)


def test_inputs_that_overflow_are_reported():
    problem = posed(nn.Linear(4, 3), torch.full((8, 4), 1e30))
    assert not collected(problem, "weight")[0].finite
    assert collected(posed(nn.Linear(4, 3), drawn(8, 4)), "weight")[0].finite


def test_layers_that_no_sample_reaches_have_no_site():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)

    assert [site.layers for site in sites_of(posed(Half(), drawn(8, 4)))] == [("one.weight",)]


def test_the_model_is_left_as_it_was():
    model = SameInputs()
    problem = posed(model, drawn(8, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collected(problem, "q.weight")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert call(model, {}, drawn(2, 4)).requires_grad
