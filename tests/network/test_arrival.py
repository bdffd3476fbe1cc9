"""Layers whose zeros do not arrive where the model multiplies stay dense, with the reason; others are not bothered."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import allot
from allot.network.arrival import COMPUTED, ELSEWHERE, IDLE
from allot.network.layers import Scope
from allot.network.macs import Uses, measured

ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Computes(nn.Linear):
    """A linear layer that multiplies by `change(self, weight)`."""

    def __init__(self, change) -> None:
        super().__init__(6, 6)
        self.change = change
        self.scale, self.mask = nn.Parameter(torch.rand(6, 1) + 0.5), torch.rand(6, 6) < 0.5
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.change(self, self.weight), self.bias)


def standardised_in_place(layer: Computes, weight: Tensor) -> Tensor:
    copy = weight.clone()
    copy -= copy.mean(1, keepdim=True)
    return copy


def dct(weight: Tensor) -> Tensor:
    return torch.fft.rfft(weight, dim=1).real @ torch.ones(4, 6)


LOST = {
    "standardised": lambda layer, w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True),
    "standardised in place": standardised_in_place,
    "low-rank update": lambda layer, w: w + layer.up @ layer.down,
    "symmetric": lambda layer, w: w + w.t(),
    "rotated": lambda layer, w: w @ torch.linspace(-1, 1, 36).view(6, 6),
    "softmax": lambda layer, w: w.softmax(1),
    "cumulated": lambda layer, w: w.cumsum(1),
    "transformed": lambda layer, w: dct(w),
    "normalised by batch norm": lambda layer, w: F.batch_norm(w[None], None, None, training=True)[0],
    "shifted": lambda layer, w: w + 0.1,
}
ARRIVE = {
    "as it is": lambda layer, w: w,
    "twice the transpose": lambda layer, w: w.t() * 2,
    "scaled by row": lambda layer, w: w * layer.scale,
    "scaled by its norm": lambda layer, w: w / w.norm(dim=1, keepdim=True),
    "rounded": lambda layer, w: (w * 64).round() / 64,
    "bounded": lambda layer, w: torch.tanh(w),
    "masked": lambda layer, w: w * layer.mask,
    "cast": lambda layer, w: w.double().float(),
    "doubled in place": lambda layer, w: w.clone().mul_(2),
}


def pruned(model: nn.Module, inputs: Tensor = ROWS) -> allot.Result:
    torch.manual_seed(0)
    return allot.prune(model.eval(), inputs, "sparsity=0.5", repair="none")


@pytest.mark.parametrize("case", LOST)
def test_a_layer_whose_zeros_are_lost_stays_dense(case):
    result = pruned(nn.Sequential(Computes(LOST[case]), nn.ReLU(), nn.Linear(6, 4)))
    assert result.problem.scope.skipped["0.weight"] == COMPUTED
    assert [layer.name for layer in result.problem.scope] == ["2.weight"]


@pytest.mark.parametrize("case", ARRIVE)
def test_a_layer_whose_zeros_arrive_is_pruned_with_its_macs(case):
    result = pruned(nn.Sequential(Computes(ARRIVE[case]), nn.ReLU(), nn.Linear(6, 4)))
    assert result.problem.scope["0.weight"].macs == 36


def test_an_update_that_is_still_zero_counts_as_one():
    layer = Computes(LOST["low-rank update"])
    nn.init.zeros_(layer.up)
    assert pruned(nn.Sequential(layer, nn.Linear(6, 4))).problem.scope.skipped["0.weight"] == COMPUTED


class Convolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Unfolded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)
        return (self.weight.flatten(1) @ columns).view(len(x), -1, *x.shape[2:])


def images_net(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4))


def test_a_standardised_convolution_stays_dense():
    result = pruned(images_net(Convolution(3, 8, 3, padding=1)), IMAGES)
    assert result.problem.scope.skipped["0.weight"] == COMPUTED


def test_a_convolution_written_as_a_product_is_pruned():
    result = pruned(images_net(Unfolded(3, 8, 3, padding=1, bias=False)), IMAGES)
    assert result.problem.scope["0.weight"].macs == 8 * 27 * 64


class FourierConvolution(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.weight, n=x.shape[-1])
        return torch.fft.irfft((torch.fft.rfft(x)[:, None] * spectrum).sum(2), n=x.shape[-1])


def test_a_convolution_in_the_frequency_domain_stays_dense():
    model = nn.Sequential(FourierConvolution(2, 4, 3), nn.Flatten(), nn.Linear(32, 4))
    result = pruned(model, torch.randn(40, 2, 8))
    assert result.problem.scope.skipped["0.weight"] == COMPUTED


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).relu() @ (self.encoder.weight * 2)


def test_a_second_use_through_a_computed_copy_counts_its_macs():
    result = pruned(Autoencoder())
    assert result.problem.scope["encoder.weight"].macs == 2 * 24


class OneProduct(nn.Module):
    """Computes three projections in one product, and reads a head as a table."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.table, self.out = nn.Linear(6, 2, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        q, k, v = F.linear(x + F.embedding((x[:, 0] > 0).long(), self.table.weight), weight).chunk(3, -1)
        return self.out(q * k + v)


def test_weights_that_are_put_together_for_one_product_are_pruned_with_the_macs_of_each():
    scope = pruned(OneProduct()).problem.scope
    assert [scope[f"{name}.weight"].macs for name in "qkv"] == [36, 36, 36]
    assert "table.weight" in {layer.name for layer in scope} and scope.macs == 3 * 36 + 24


class LearnedQueries(nn.Module):
    """Queries are parameters: what the projection makes of them comes from weights alone, and is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(3, 6)), nn.LayerNorm(6)
        self.ask, self.key, self.out = (nn.Linear(6, 6) for _ in range(3))
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        asked = self.ask(self.norm(self.queries))
        weights = (self.key(x) @ asked.t()).softmax(-1)
        attended, _ = self.attend(self.queries.expand(len(x), -1, -1), x[:, None], x[:, None])
        return self.out(weights @ asked + attended.mean(1))


def test_what_a_layer_makes_of_learned_queries_is_no_computed_weight():
    scope = pruned(LearnedQueries()).problem.scope
    assert {layer.name.partition(".")[0] for layer in scope} == {"ask", "key", "out", "attend"}


class ByAttribute(nn.Module):
    """Multiplies by a tensor that it took from a parameter when it was made."""

    def __init__(self, take) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.taken = take(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        taken = self.taken[0] if isinstance(self.taken, list) else self.taken
        return self.second(F.linear(x, taken).relu())


@pytest.mark.parametrize("take", [lambda w: [w], lambda w: w.data, lambda w: w.data.t()])
def test_a_weight_that_is_read_through_an_attribute_stays_dense(take):
    result = pruned(ByAttribute(take))
    assert result.problem.scope.skipped["first.weight"] == ELSEWHERE


def test_a_list_of_parameters_that_no_pass_reads_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    model.optimised = list(model.parameters())
    assert len(pruned(model).problem.scope) == 2


@pytest.mark.parametrize(
    "layer", [nn.LSTM(6, 6, batch_first=True), nn.MultiheadAttention(6, 2), nn.TransformerEncoderLayer(6, 2, 8)]
)
def test_layers_of_torch_are_not_in_doubt(layer):
    uses, x = Uses(), torch.randn(2, 3, 6)
    inputs = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    scope = measured(Scope.of(layer), layer.eval(), lambda: layer(*inputs), uses)
    assert uses.direct.keys() == {part.name for part in scope} and not uses.computed | uses.unseen | uses.idle


# layers that never run


class WithSpares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.average = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        self.auxiliary = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return (self.second(hidden), self.auxiliary(hidden)) if self.training else self.second(hidden)


def test_layers_that_never_run_leave_the_scope():
    result = pruned(WithSpares())
    assert [layer.name for layer in result.problem.scope] == ["first.weight", "second.weight"]
    for name in ("average.0.weight", "average.1.weight", "auxiliary.weight"):
        assert result.problem.scope.skipped[name] == IDLE


class Routed(nn.Module):
    """Sends a sample to one of three experts by the sign of its first number; the third has none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice = (x[:, 0] > 0).long()
        out = x.new_zeros(len(x), 4)
        for number, expert in enumerate(self.experts):
            if (choice == number).any():
                out[choice == number] = expert(x[choice == number])
        return out


def test_experts_that_other_samples_reach_stay_in_scope():
    result = pruned(Routed())
    assert [layer.name for layer in result.problem.scope] == ["experts.0.weight", "experts.1.weight"]
    assert result.problem.scope.skipped["experts.2.weight"] == IDLE


def test_experts_stay_in_scope_where_only_an_example_is_known():
    result = allot.prune(Routed().eval(), None, "sparsity=0.5", repair="none", example=ROWS[:1])
    assert len(result.problem.scope) == 3


def test_copies_that_autocast_keeps_hide_no_weight():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    with torch.autocast("cpu", torch.bfloat16):
        model(ROWS)  # from here on autocast reads its copies of both weights
        result = allot.prune(model, ROWS, "sparsity=0.5", method="erk", repair="none")
        assert torch.is_autocast_cache_enabled()
    assert [layer.name for layer in result.problem.scope] == ["0.weight", "2.weight"]


class ByOtherWays(nn.Module):
    """Uses a weight by an object, or by a closure, beside the parameter."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        weight = self.a.weight
        if way == "object":
            self.other = SimpleNamespace(weight=weight)
            self.first = lambda x: x @ self.other.weight.t()
        else:
            self.first = lambda x: x @ weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.first(x).relu())


@pytest.mark.parametrize("way", ["object", "closure"])
def test_weights_that_are_used_by_objects_and_closures_are_left_dense(way: str):
    model = ByOtherWays(way).eval()
    scope = allot.prune(model, torch.randn(32, 8), "sparsity=0.5", method="erk").problem.scope
    assert [layer.name for layer in scope] == ["b.weight"]
    assert "another reference" in scope.skipped["a.weight"]
