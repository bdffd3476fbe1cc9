"""Frozen weights beside trained ones stay as they are; a wholly frozen model is pruned like any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.network.kinds import FROZEN
from allot.network.layers import Rules, Scope

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FEW = {"steps": 2}
WAYS = {
    "uniform": {"method": "uniform"},
    "erk": {"method": "erk"},
    "global": {"method": "global"},
    "distill": {"repair": "distill", "options": {"distill": FEW}},
    "fcpts": {"method": "fcpts", "options": {"fcpts": FEW}},
    "admm": {"repair": "admm"},
    "channels": {"method": "dsa", "budget": "macs=60%", "options": {"dsa": FEW, "distill": FEW}},
}


class Blurs(nn.Module):
    """A fixed filter of each channel between two convolutions that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blur = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False).requires_grad_(False)
        self.blur.weight.data[:] = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.blur(self.first(x).relu())).relu().mean((2, 3)))


class Bins(nn.Module):
    """The expected value of a distribution over bins, as a detector's box head takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.wide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.bins = nn.Linear(16, 1, bias=False).requires_grad_(False)
        self.bins.weight.data[0] = torch.arange(16.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.bins(self.wide(self.body(x).relu()).movedim(1, -1).softmax(-1)).flatten(1)


def pruned(model: nn.Module, budget: str = "sparsity=0.9", **ways) -> allot.Result:
    torch.manual_seed(0)
    return allot.prune(model.eval(), IMAGES, budget, **ways)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "name"), [(Blurs, "blur"), (Bins, "bins")])
def test_a_fixed_filter_stays_as_it_is(make, name, way):
    torch.manual_seed(0)
    model = make()
    before = model.get_submodule(name).weight.clone()
    result = pruned(model, **WAYS[way])
    assert torch.equal(result.model().get_submodule(name).weight, before)
    assert result.problem.scope.skipped[f"{name}.weight"] == FROZEN
    if result.problem.scope.groups:
        assert torch.equal(result.slim().get_submodule(name).weight, before)


def test_a_wholly_frozen_model_is_pruned():
    model = Blurs().requires_grad_(False)
    assert {layer.name for layer in pruned(model).problem.scope} == {
        n for n, p in model.named_parameters() if p.dim() > 1
    }


def test_a_model_whose_trained_parameters_are_no_weights_is_pruned():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)).requires_grad_(False)
    model[1].requires_grad_(True)
    assert [layer.name for layer in Scope.of(model)] == ["0.weight", "2.weight"]


def test_a_frozen_weight_is_pruned_where_a_rule_includes_it():
    model = Blurs()
    assert [layer.name for layer in Scope.of(model, Rules(include=("blur", "second")))] == [
        "blur.weight",
        "second.weight",
    ]


def test_frozen_biases_and_norms_beside_trained_weights_are_not_trained():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    model[2].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    tensors = pruned(model, repair="distill", options={"distill": {"steps": 3}}).candidate.tensors
    assert tensors and not tensors.keys() & {"1.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("repair", ["lstsq", "bias", "variance", "admm", "layerwise", "weight-moments", "blocks"])
def test_no_repair_moves_a_frozen_bias(repair: str):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(256, 12) + 1
    model[0].bias.requires_grad_(False)
    tensors = allot.prune(model.eval(), inputs, "sparsity=0.5", repair=repair).candidate.tensors
    assert tensors and torch.equal(tensors.get("0.bias", model[0].bias), model[0].bias)
