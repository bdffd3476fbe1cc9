"""Zeros that a foreign loop keeps: each step is that of `attach`, and the model stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError
from allot.integrations.held_zeros import HeldZeros, zeros_of
from allot.network.layers import Scope


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {layer.name: rand(*layer.shape, seed=1) > 0 for layer in Scope.of(model)}


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def steps(model: nn.Module, optimiser: torch.optim.Optimizer, after: Callable[[], None]) -> None:
    for k in range(5):
        optimiser.zero_grad()
        (model(rand(4, 6, seed=k)) - 1).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        after()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_step_is_that_of_an_attached_model(name: str):
    held, attached = net(), net()
    masks = masks_of(held)
    zeros = HeldZeros(held, masks)
    zeros.hold()
    steps(held, OPTIMISERS[name](held.parameters()), zeros.apply)
    allot.attach(attached, masks)
    steps(attached, OPTIMISERS[name](attached.parameters()), lambda: None)
    for key, value in allot.fold(attached).state_dict().items():
        assert torch.allclose(held.state_dict()[key], value, atol=1e-6), key
    for key, mask in masks.items():
        assert not held.state_dict()[key][~mask].any() and bool(held.state_dict()[key][mask].all())


def test_an_optimiser_that_moves_weights_without_gradients_moves_no_zero():
    model = net()
    zeros = HeldZeros(model, masks_of(model))
    zeros.hold()
    before = zeros.sparsity
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    assert zeros.sparsity < before
    zeros.apply()
    assert zeros.sparsity == before


def test_classes_and_keys_stay_plain_and_release_leaves_no_hook():
    model = net()
    keys, kinds = list(model.state_dict()), [type(part) for part in model.modules()]
    zeros = HeldZeros(model, masks_of(model))
    zeros.hold()
    zeros.hold()  # twice is once
    assert list(model.state_dict()) == keys and [type(part) for part in model.modules()] == kinds
    zeros.release()
    model(rand(2, 6)).sum().backward()
    assert bool(model[0].weight.grad[~zeros.masks["0.weight"]].any())


def test_without_masks_the_zeros_of_the_weights_are_kept():
    result = allot.prune(net(), None, "sparsity=0.5", repair="none")
    model = result.model()
    found = HeldZeros(model)
    assert found.masks.keys() == result.masks.keys()
    assert all(torch.equal(found.masks[name], mask) for name, mask in result.masks.items())
    assert found.sparsity == 0.5


def test_frozen_weights_are_held_without_gradients():
    model = net()
    zeros = HeldZeros(model, masks_of(model))
    model[0].weight.requires_grad_(False)
    zeros.hold()
    model(rand(2, 6)).sum().backward()
    assert not model[0].weight[~zeros.masks["0.weight"]].any()


def test_tied_weights_are_held_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model = Tied()
    zeros = HeldZeros(model, {"head.weight": rand(6, 4) > 0})
    zeros.hold()
    model(torch.tensor([[1, 2]])).sum().backward()
    assert not model.table.weight.grad[rand(6, 4) <= 0].any() and model.head.weight is model.table.weight


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (None, "no zeros to keep: give result.model"),
        ({"0.wieght": torch.ones(8, 6).bool()}, r"did you mean '0\.weight'"),
        ({"0.weight": torch.ones(8, 5).bool()}, r"the mask of 0\.weight has shape \[8, 5\]"),
    ],
)
def test_what_cannot_be_held_is_refused(masks: dict[str, Tensor] | None, message: str):
    with pytest.raises(UsageError, match=message):
        HeldZeros(net(), masks)


def test_a_new_head_of_zeros_is_trained_and_said(caplog: pytest.LogCaptureFixture):
    model = allot.prune(net(), None, "sparsity=0.5", repair="none").model()
    nn.init.zeros_(model[2].weight)
    with caplog.at_level(logging.WARNING, "allot"):
        zeros = HeldZeros(model)
    zeros.hold()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1), zeros.apply)
    assert list(zeros.masks) == ["0.weight"] and bool(model[2].weight.any())
    assert not model[0].weight[~zeros.masks["0.weight"]].any() and zeros.sparsity > 0.4
    assert "2.weight: every weight is zero" in caplog.text and "0.weight" not in caplog.text
    asked = HeldZeros(net(), {"2.weight": torch.zeros(3, 8).bool()})  # a mask says what it says
    asked.hold()
    assert asked.sparsity == 1


def test_a_model_of_nothing_but_new_heads_holds_no_zeros():
    with pytest.raises(UsageError, match="no zeros to keep"):
        HeldZeros(_zeroed(nn.Linear(2, 2)))


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


def test_only_weights_with_zeros_get_a_mask():
    model = net()
    with torch.no_grad():
        model[2].weight[0] = 0.0
    assert list(zeros_of(model)) == ["2.weight"]
