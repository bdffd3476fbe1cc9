"""Products that a pass computes: which rows, by which inputs; the columns give the layer's output again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.network.call import call
from allot.network.layers import Scope
from allot.network.products import Product, watched_products


def products_of(
    model: nn.Module, inputs: Any, tensors: dict[str, Tensor] | None = None
) -> list[tuple[Product, Tensor]]:
    """Each product with the outputs that its columns and rows give: `[positions, groups * rows]`."""
    seen = []
    parameters = {**dict(model.named_parameters()), **(tensors or {})}

    def visit(product: Product) -> None:
        rows = product.layer.matrix(parameters[product.layer.name].detach())[product.rows]
        columns = torch.cat(list(product.columns()), 1)  # [groups, positions, K]
        grouped = rows.unflatten(0, (product.groups, -1))
        seen.append((product, torch.einsum("gpk,grk->pgr", columns, grouped).flatten(1)))

    with watched_products(model, Scope.of(model), visit):
        call(model, tensors or {}, inputs)
    return seen


CONVOLUTIONS = {
    "grouped, strided": (nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), (3, 4, 9, 8)),
    "depthwise, circular": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4, bias=False), (2, 4, 5, 6)),
    "dilated, same": (nn.Conv1d(4, 6, 3, dilation=2, padding="same", bias=False), (3, 4, 9)),
    "three dimensions": (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2), bias=False), (2, 2, 4, 5, 6)),
    "transposed, grouped": (
        nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2, bias=False),
        (2, 4, 5, 4),
    ),
    "transposed, padding past the kernel": (nn.ConvTranspose1d(4, 6, 2, 3, 4, bias=False), (2, 4, 7)),
    "channels last": (nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_columns_times_rows_are_the_output_of_a_convolution(name: str) -> None:
    torch.manual_seed(0)
    model, shape = CONVOLUTIONS[name]
    x = torch.randn(shape)
    ((product, output),) = products_of(model, x)
    expected = model(x).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(output, expected.detach(), atol=1e-5, rtol=1e-5)
    assert product.positions == len(expected)


def test_samples_without_a_batch_dimension_are_seen() -> None:
    model = nn.Conv2d(3, 4, 3, bias=False)
    x = torch.randn(3, 6, 6)
    ((_, output),) = products_of(model, x)
    torch.testing.assert_close(output, model(x).detach().flatten(1).t(), atol=1e-5, rtol=1e-5)


def test_large_inputs_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allot.network.products.COLUMNS", 100)
    for model, x in ((nn.Conv2d(3, 4, 3), torch.randn(5, 3, 6, 6)), (nn.Linear(7, 3), torch.randn(40, 7))):
        parts: list[int] = []
        with watched_products(
            model, Scope.of(model), lambda product, parts=parts: parts.extend(c.numel() for c in product.columns())
        ):  # type: ignore[misc]
            model(x)
        assert len(parts) > 1
        assert max(parts) <= max(100, 27 * 16)  # one sample at least


def test_linear_layers_of_any_form_are_seen_with_their_inputs() -> None:
    x = torch.randn(2, 5, 4)
    model = nn.Linear(4, 3, bias=False)
    for inputs in (x, x[0], x[0, 0]):
        ((_, output),) = products_of(model, inputs)
        torch.testing.assert_close(output, model(inputs).detach().reshape(-1, 3))


def test_the_tensors_put_in_place_for_a_pass_count() -> None:
    model, x, weight = nn.Linear(4, 3, bias=False), torch.randn(5, 4), torch.randn(3, 4)
    ((_, output),) = products_of(model, x, {"weight": weight})
    torch.testing.assert_close(output, x @ weight.t())


def test_attention_with_one_input_is_one_product_and_with_three_inputs_three() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, other = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    own = [(product.layer.name, product.rows) for product, _ in products_of(model, (x, x, x))]
    assert own == [("in_proj_weight", slice(0, 24)), ("out_proj.weight", slice(0, 8))]
    cross = [product.rows for product, _ in products_of(model, (x, other, other.clone()))]
    assert cross == [slice(0, 8), slice(8, 16), slice(16, 24), slice(0, 8)]


def test_a_weight_that_matmul_repeats_over_a_batch_is_seen() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    placed = {"in_proj_weight": torch.randn(24, 8)}  # without a gradient, products of transposed inputs stay apart
    (product, output), _ = products_of(model, (x, x, x), placed)
    assert (product.layer.name, product.positions) == ("in_proj_weight", 10)
    wanted = torch.nn.functional.linear(x.transpose(0, 1), placed["in_proj_weight"]).flatten(0, 1)
    torch.testing.assert_close(output, wanted)

    class Left(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight.expand(len(x), -1, -1) @ x

    columns, weight = torch.randn(2, 4, 5), torch.randn(3, 4)
    ((_, output),) = products_of(Left(4, 3, bias=False), columns, {"weight": weight})
    torch.testing.assert_close(output, (weight @ columns).movedim(1, -1).flatten(0, 1))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).sum() + self.three(self.two(x)).sum()


def test_layers_that_read_the_same_tensor_have_the_same_key() -> None:
    keys: dict[str, Any] = {}
    alive = []

    def visit(product: Product) -> None:
        keys[product.layer.name] = product.key
        alive.append(product.inputs)

    model = TwoReaders()
    with watched_products(model, Scope.of(model), visit):
        model(torch.randn(5, 4))
    assert keys["one.weight"] == keys["two.weight"] != keys["three.weight"]


class OwnPadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, None, 2)


def test_a_forward_of_its_own_is_followed() -> None:
    model, x = OwnPadding(3, 4, 3), torch.randn(2, 3, 8, 8)
    ((_, output),) = products_of(model, x)
    torch.testing.assert_close(output, model(x).detach().movedim(1, -1).flatten(0, -2), atol=1e-5, rtol=1e-5)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight - self.weight.mean())


def test_a_weight_that_is_computed_anew_is_not_taken_for_the_weight() -> None:
    assert products_of(Standardised(4, 3), torch.randn(5, 4)) == []


def test_a_copy_of_the_weight_stands_for_it_and_a_part_of_it_does_not() -> None:
    class Copying(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t().contiguous() + x[..., :2] @ self.weight[:, :2].t()

    model, x = Copying(4, 3), torch.randn(5, 4)
    ((_, output),) = products_of(model, x)
    torch.testing.assert_close(output, x @ model.weight.detach().t())


def test_autocast_copies_stand_for_the_weight() -> None:
    model, x = nn.Linear(4, 3, bias=False), torch.randn(5, 4)
    seen: list[Product] = []
    with watched_products(model, Scope.of(model), seen.append), torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert [(product.layer.name, product.rows) for product in seen] == [("weight", slice(0, 3))]
