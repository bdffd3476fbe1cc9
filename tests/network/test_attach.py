"""`attach` and `fold`: masks for those who train in their own loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from allot.errors import UsageError
from allot.network.applied_masks import masked
from allot.network.attach import Mask, attach, fold
from allot.network.call import call
from allot.network.layers import Scope


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def masks_for(model: nn.Module) -> dict[str, Tensor]:
    return {layer.name: rand(*layer.shape) > 0 for layer in Scope.of(model)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.table(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.alias = self.layer

    def forward(self, x):
        return self.alias(self.layer(x))


class SelfAttention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), rand(3, 4)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2)),
        rand(2, 2, 5, 5),
    ),
    "tied": (Tied, torch.tensor([[1, 2], [3, 4]])),
    "shared": (Shared, rand(3, 4)),
    "attention": (SelfAttention, rand(3, 2, 4)),
    "attention of other widths": (lambda: SelfAttention(kdim=4, vdim=4, bias=False), rand(3, 2, 4)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), rand(2, 3, 4)),
    "frozen and half": (lambda: nn.Sequential(nn.Linear(4, 4)).bfloat16().requires_grad_(False), rand(3, 4).bfloat16()),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", MODELS)
def test_an_attached_model_computes_what_a_call_with_masked_weights_computes(case, mode):
    make, x = MODELS[case]
    model = make().train(mode == "train")
    masks = masks_for(model)
    tensors = {name: masked(model.get_parameter(name).detach(), mask) for name, mask in masks.items()}
    with torch.no_grad():
        expected = call(model, tensors, x, training=lambda module: mode == "train")
    assert attach(model, masks) is model
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5 if x.dtype != torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("case", MODELS)
def test_folding_restores_classes_keys_and_ties_and_leaves_zeros(case):
    make, x = MODELS[case]
    model = make().eval()
    classes = [type(part) for part in model.modules()]
    keys, flags = list(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    identities = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = masks_for(model)
    attach(model, masks)
    with torch.no_grad():
        expected = model(x)
    assert fold(model) is model
    assert [type(part) for part in model.modules()] == classes
    assert sorted(model.state_dict()) == sorted(keys)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == identities
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), masked(dense[name], mask))
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["linear", "conv", "tied", "shared", "attention", "encoder layer"])
def test_optimiser_steps_leave_zeros_at_zero(case):
    make, x = MODELS[case]
    model = make().train()
    masks = masks_for(model)
    attach(model, masks)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    fold(model)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any() and not torch.signbit(weight[~mask]).any()
        assert bool(weight[mask].any())


def test_a_folded_model_can_be_trained_on():
    model = fold(attach(nn.Sequential(nn.Linear(4, 2)), {"0.weight": rand(2, 4) > 0}))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    model(rand(3, 4)).sum().backward()
    optimiser.step()
    assert not torch.equal(model[0].weight, before)


def test_the_state_dict_of_an_attached_model_holds_the_mask_and_goes_back_in():
    make, x = MODELS["linear"]
    model = make()
    attach(model, {"0.weight": rand(5, 4) > 0})
    state = model.state_dict()
    assert {"0.parametrizations.weight.original", "0.parametrizations.weight.0.mask", "0.bias"} <= state.keys()
    other = make()
    attach(other, {"0.weight": torch.ones(5, 4, dtype=torch.bool)})
    other.load_state_dict(state)
    assert torch.equal(model(x), other(x))


def test_an_attached_model_can_be_copied_saved_and_folded_apart(tmp_path):
    make, x = MODELS["encoder layer"]
    model = make().eval()
    masks = masks_for(model)
    attach(model, masks)
    twin = copy.deepcopy(model)
    fold(twin)
    with torch.no_grad():
        assert torch.allclose(twin(x), model(x), atol=1e-6)
    assert any(isinstance(part, Mask) for part in model.modules())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = attach(make().eval(), masks)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_a_tied_weight_goes_by_any_one_of_its_names():
    mask = rand(6, 4) > 0
    for name in ("table.weight", "head.weight"):
        model = attach(Tied(), {name: mask})
        assert not model.table.weight[~mask].any() and not model.head.weight[~mask].any()
        fold(model)
        assert model.table.weight is model.head.weight and not model.head.weight[~mask].any()
    with pytest.raises(UsageError, match=r"table\.weight and head\.weight are one tied weight"):
        attach(Tied(), {"table.weight": mask, "head.weight": ~mask})


def test_a_module_under_two_names_gets_one_mask():
    model = attach(Shared(), {"layer.weight": rand(4, 4) > 0})
    assert len(model.layer.parametrizations["weight"]) == 1


@pytest.mark.parametrize(("case", "name"), [("linear", "0.weight"), ("attention", "attention.in_proj_weight")])
def test_a_second_mask_is_refused(case, name):
    model = MODELS[case][0]()
    mask = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
    attach(model, {name: mask})
    with pytest.raises(UsageError, match=f"{name} carries a mask already: fold the model first"):
        attach(model, {name: mask})
    attach(fold(model), {name: mask})


def test_another_parametrization_is_named_as_what_it_is_and_survives_folding():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(UsageError, match=r"0\.weight is parametrized: remove the parametrization first"):
        attach(model, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    fold(attach(model, {"1.weight": torch.ones(4, 4, dtype=torch.bool)}))
    assert hasattr(model[0], "parametrizations") and not hasattr(model[1], "parametrizations")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"0.weight": torch.ones(5, 4) > 0, "0.wieght": torch.ones(5, 4) > 0},
            r"unknown parameter.*did you mean '0\.weight'",
        ),
        ({"0.weight": torch.ones(5, 4) > 0, "2.weight": torch.ones(5, 2) > 0}, r"mask of 2\.weight has shape \[5, 2\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_any_is_attached(masks, message):
    model = MODELS["linear"][0]()
    with pytest.raises(UsageError, match=message):
        attach(model, masks)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_changing_the_mask_that_was_passed_in_changes_nothing():
    mask = torch.ones(5, 4, dtype=torch.bool)
    model = attach(MODELS["linear"][0](), {"0.weight": mask})
    mask.zero_()
    assert bool(model[0].weight.any())
