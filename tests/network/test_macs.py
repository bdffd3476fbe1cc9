"""MACs per layer, against torch's own flop counter (two flops a multiply-accumulate)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from allot.network.layers import Rules, Scope
from allot.network.macs import measured


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Cross(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query, memory):
        return self.attention(query, memory, memory)[0]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, *, a, b):
        return self.left(a) + self.right(b)


class Functional(nn.Module):
    """Uses its layers' weights without calling the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.einsum, self.product = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.conv = nn.Conv1d(6, 6, 3)

    def forward(self, x):
        x = F.linear(x, self.linear.weight)
        x = torch.einsum("bti,oi->bto", x, self.einsum.weight)
        x = x @ self.product.weight.t()
        return F.conv1d(x.transpose(1, 2), self.conv.weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.alias = self.layer

    def forward(self, x):
        return self.alias(self.layer(x))


class Patches(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


MODELS = {
    "linear": (lambda: nn.Linear(4, 5), (rand(1, 4),)),
    "linear on one vector": (lambda: nn.Linear(4, 5, bias=False), (rand(4),)),
    "linear on tokens": (lambda: nn.Linear(4, 5), (rand(2, 7, 4),)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, padding="same"), nn.Conv2d(8, 12, 1), nn.Flatten(), nn.Linear(12 * 16, 5),
        ),
        (rand(1, 3, 8, 8),),
    ),
    "dilated and reflected": (
        lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, padding=2, padding_mode="reflect"), (rand(1, 4, 9, 9),),
    ),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (rand(1, 4, 9, 9),)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), (rand(2, 4, 9),)),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 3), (rand(1, 2, 5, 6, 7),)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (rand(1, 4, 5, 5),)),
    "transposed and 1d": (lambda: nn.ConvTranspose1d(4, 6, 5, stride=3), (rand(2, 4, 5),)),
    "self-attention": (lambda: Cross(batch_first=True), (rand(1, 5, 8), rand(1, 5, 8))),
    "cross-attention": (lambda: Cross(), (rand(5, 1, 8), rand(7, 1, 8))),
    "cross-attention of other widths": (lambda: Cross(kdim=6, vdim=6), (rand(5, 1, 8), rand(7, 1, 6))),
    "vision transformer": (Patches, (rand(1, 3, 8, 8),)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), (rand(5, 1, 8),)),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(8, 2, 16), (rand(5, 1, 8), rand(3, 1, 8))),
    "dict": (Named, {"a": rand(1, 4), "b": rand(1, 6)}),
    "functional": (Functional, (rand(2, 5, 6),)),
    "tied weights": (Tied, (rand(3, 6),)),
    "one module used twice": (Reused, (rand(3, 6),)),
}  # fmt: skip


def run(model: nn.Module, inputs) -> None:
    model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def counted(model: nn.Module, inputs) -> int:
    """MACs of matrix products and convolutions with weights; attention between activations is left out."""
    products = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}
    model.train()  # the fused attention of eval mode hides its products
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with FlopCounterMode(display=False) as counter:
        run(model, inputs)
    flops = counter.get_flop_counts()["Global"]
    products |= {torch.ops.aten.bmm} if isinstance(model, Functional) else set()
    return sum(count for operator, count in flops.items() if operator in products) // 2


def macs_of(model: nn.Module, inputs) -> dict[str, int]:
    scope = measured(Scope.of(model), model, lambda: run(model, inputs))
    return {layer.name: layer.macs for layer in scope}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", MODELS)
def test_macs_are_those_of_the_flop_counter(case, mode):
    make, inputs = MODELS[case]
    model = make()
    model.train(mode == "train")
    found = macs_of(model, inputs)
    expected = counted(model, inputs)
    if case == "linear on one vector":  # the flop counter knows no matrix-vector product
        expected = 20
    assert sum(found.values()) == expected
    assert all(found.values())


@pytest.mark.parametrize("case", MODELS)
def test_macs_are_the_same_under_inference_mode(case):
    make, inputs = MODELS[case]
    model = make().eval()
    expected = macs_of(model, inputs)

    def forward() -> None:
        with torch.inference_mode():
            run(model, inputs)

    found = measured(Scope.of(model), model, forward)
    assert {layer.name: layer.macs for layer in found} == expected


@pytest.mark.parametrize("case", ["cnn", "vision transformer", "cross-attention of other widths", "functional"])
def test_macs_are_the_same_under_autocast(case):
    make, inputs = MODELS[case]
    model = make().eval()
    expected = macs_of(model, inputs)

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            run(model, inputs)

    found = measured(Scope.of(model), model, forward)
    assert {layer.name: layer.macs for layer in found} == expected


def test_cross_attention_counts_each_projection_by_its_own_length():
    found = macs_of(Cross(kdim=6, vdim=6), (rand(5, 1, 8), rand(7, 1, 6)))
    assert found == {
        "attention.q_proj_weight": 5 * 8 * 8,
        "attention.k_proj_weight": 7 * 8 * 6,
        "attention.v_proj_weight": 7 * 8 * 6,
        "attention.out_proj.weight": 5 * 8 * 8,
    }


def test_a_transformers_conv1d_is_counted():
    model = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    assert macs_of(model, (rand(1, 3, 4),)) == {"weight": 3 * 24}


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_weight_that_is_standardised_before_use_is_counted():
    model = Standardised(3, 4, 3)
    assert macs_of(model, (rand(1, 3, 6, 6),)) == {"weight": 4 * 3 * 9 * 16}


def test_an_embedding_tied_to_a_linear_counts_for_the_linear_only():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    assert macs_of(Language(), (torch.tensor([[1, 2, 3]]),)) == {"table.weight": 3 * 36}


def test_a_layer_that_is_not_reached_costs_nothing():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    assert macs_of(Spare(), (rand(1, 4),)) == {"used.weight": 16, "spare.weight": 0}


def test_a_layer_that_returns_more_than_a_tensor_is_counted():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.bias

    assert macs_of(Pair(4, 4), (rand(1, 4),)) == {"weight": 16}


def test_inputs_passed_by_name_are_counted():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm = nn.ConvTranspose1d(2, 3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(input=self.up(input=x))

    model = ByName().eval()
    scope = measured(Scope.of(model), model, lambda: model(rand(1, 2, 4)))
    assert scope["up.weight"].macs == 18 * 4 and scope["up.weight"].normalised


def test_what_goes_straight_into_a_batch_norm_is_known():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4),
    ).eval()  # fmt: skip
    scope = measured(Scope.of(model), model, lambda: model(rand(1, 3, 8, 8)))
    assert {layer.name: layer.normalised for layer in scope} == {
        "0.weight": True,
        "2.weight": False,
        "6.weight": True,
        "8.weight": False,
    }


def hooks(model: nn.Module) -> int:
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks) for part in model.modules()
    )


def test_counting_leaves_nothing_behind_even_when_the_forward_raises():
    model = Patches().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs_of(model, (rand(1, 3, 8, 8),))
    with pytest.raises(RuntimeError):
        macs_of(model, (rand(1, 4, 8, 8),))
    assert hooks(model) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = self.into(x).unflatten(-1, (3, 2, 4)).movedim(2, 0).transpose(2, 3)  # each [B, heads, T, 4]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_macs_of_the_whole_model_hold_those_of_attention_and_of_weights_out_of_scope():
    model = Attends().eval()
    scope = Scope.of(model, Rules(exclude=("out",)))
    assert scope.macs is None
    found = measured(scope, model, lambda: run(model, (rand(2, 5, 8),)))
    projections, attention = 10 * 8 * 24, 2 * 2 * (5 * 5 * 4 + 5 * 5 * 4)
    assert [layer.macs for layer in found] == [projections] and found.macs == projections + attention + 10 * 8 * 4


@pytest.mark.parametrize("case", ["cnn", "functional", "tied weights", "transposed"])
def test_macs_of_a_model_without_other_products_are_those_of_its_layers(case):
    make, inputs = MODELS[case]
    model = make().eval()
    scope = measured(Scope.of(model), model, lambda: run(model, inputs))
    assert scope.macs == sum(layer.macs for layer in scope)
