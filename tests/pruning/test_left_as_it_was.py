"""After any call, returned or raised, the user's model is as before: attributes, lists, hooks, modes, parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError

IMAGES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0))
FEW = {"steps": 2}


class KeepsItsAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.attention, self.entropies = None, []

    def forward(self, x: Tensor) -> Tensor:
        self.attention = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        self.entropies.append(self.attention.mean())
        return self.out(self.attention @ self.value(x)).mean(1)


class Counts(nn.Module):
    """Keeps a running mean in a plain tensor, counts its calls, and remembers its last few outputs by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.calls, self.mean, self.recent = 0, torch.zeros(8), {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        self.recent[self.calls] = self.second(hidden)
        self.calls += 1
        return self.recent[self.calls - 1]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.utils.spectral_norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


WAYS = {
    "fcpts": {"method": "fcpts", "options": {"fcpts": FEW}},
    "distill": {"repair": "distill", "options": {"distill": FEW}},
    "channels": {"method": "dsa", "options": {"dsa": FEW, "distill": FEW}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_keeps_its_attention_is_as_before(way):
    model = KeepsItsAttention().eval()
    with torch.no_grad():
        model(TOKENS[:1])
    kept, values = model.attention, model.attention.clone()
    result = allot.prune(model, TOKENS, "macs=60%", **WAYS[way])
    assert model.attention is kept and torch.equal(kept, values) and len(model.entropies) == 1
    copy.deepcopy(model)
    assert result.model()(TOKENS).shape == (40, 8)


@pytest.mark.parametrize("way", ["fcpts", "distill"])
def test_a_model_that_counts_is_as_before(way):
    model = Counts().eval()
    allot.prune(model, IMAGES, "macs=60%", **WAYS[way])
    assert model.calls == 0 and not model.mean.any() and not model.recent


def test_a_model_whose_graph_was_kept_before_the_call_gives_its_sparse_model():
    model = KeepsItsAttention().eval()
    model(TOKENS[:1])  # with gradients: Python's deepcopy refuses this model
    assert allot.prune(model, TOKENS, "sparsity=0.5").model()(TOKENS).shape == (40, 8)


def test_a_layer_normed_the_old_way_is_copied():
    model = Normed().eval()
    result = allot.prune(model, IMAGES, "sparsity=0.5")
    assert "second.weight_orig" in result.problem.scope.skipped
    assert int((result.model().first.weight == 0).sum()) == 24


def test_hooks_that_collect_are_as_before_after_every_call(tmp_path):
    model, outputs = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), []
    model[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    labelled = [(x, 0) for x in IMAGES]
    result = allot.prune(model, IMAGES, "sparsity=0.5", test=labelled, save_to=tmp_path / "run")
    allot.evaluate(model, labelled)
    result.export(to="bitmask")
    result.slim()
    assert outputs == []


class OutOfOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.training = True
        if self.calls > 3:
            raise RuntimeError("out of order")
        return self.layer(x)


def test_a_model_that_raises_is_as_before():
    model = OutOfOrder().eval()
    with pytest.raises(Exception, match="out of order"):
        allot.prune(model, IMAGES, "sparsity=0.5", repair="distill", options={"distill": {"steps": 9}})
    assert model.calls == 0 and not model.training


class Clamps(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.05, 0.05)
        return super().forward(x)


class LimitsNorms(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("layer", [Clamps, LimitsNorms])
def test_a_model_that_writes_its_parameters_is_refused_and_as_before(layer):
    model = nn.Sequential(layer(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: allot.prune(model, IMAGES, "sparsity=0.5"),
        lambda: allot.prune(model, None, "sparsity=0.5", example=IMAGES[:1], repair="none"),
        lambda: allot.evaluate(model, [(x, 0) for x in IMAGES]),
        lambda: allot.export(model, IMAGES[:1], "never.pt2"),
    ):
        with pytest.raises(UsageError, match=r"writes into its parameter 0\.weight"):
            call()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_limits_norms_which_are_within_limits_is_pruned():
    model = nn.Sequential(LimitsNorms(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model(IMAGES)
    before = model[0].weight.detach().clone()
    result = allot.prune(model, IMAGES, "sparsity=0.5")
    assert torch.equal(model[0].weight, before) and result.report()["kept"] == 36


class GivesUpMemory(nn.Module):
    """Between the layers are many activations as large as the first layer's weight, whose memory is free by then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = LimitsNorms(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.last(y) for y in [self.first(x) for _ in range(16)])


def test_activations_in_memory_that_a_parameter_gave_up_are_not_taken_for_it():
    for images in torch.randn(8, 6, 6):
        model = GivesUpMemory().eval()
        model(images)
        assert allot.prune(model, images, "sparsity=0.5", allocate="erk", repair="none").report()["kept"] == 36
