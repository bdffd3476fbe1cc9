"""Sums of squared inputs: shared where layers read one tensor, small, and of every row whatever a pass computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from allot.network.input_squares import Squares, input_norms, watched_squares
from allot.network.layers import Scope
from allot.network.products import Product, watched_products
from allot.network.trees import tensors_in


def squares_of(model: nn.Module, *passes: tuple[Tensor, ...]) -> Squares:
    sums: Squares = {}
    with watched_squares(model, Scope.of(model), sums), torch.no_grad():
        for inputs in passes:
            model(*inputs)
    return sums


def columns(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).double().square().sum(0)


class Readers(nn.Module):
    """Three layers that read one tensor, which changes in place before the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        y = self.one(x).sum() + self.two(x).sum()
        return y + self.three(x.mul_(2)).sum()


def test_layers_that_read_one_tensor_share_the_work_until_it_changes(monkeypatch: pytest.MonkeyPatch):
    model, x, counted = Readers(), torch.randn(6, 4), []
    squares = Product.squares
    monkeypatch.setattr(Product, "squares", lambda self: counted.append(self.layer.name) or squares(self))
    sums = squares_of(model, (x,))
    assert counted == ["one.weight", "three.weight"]
    for name, factor in (("one", 1), ("two", 1), ("three", 4)):
        (found,) = sums[f"{name}.weight"].values()
        torch.testing.assert_close(found, factor * columns(x)[None], rtol=1e-5, atol=1e-6)


def test_rows_that_passes_compute_apart_and_together_add_up():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, other = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    sums = squares_of(model, (x, x, x), (x, other, other.clone()))
    assert set(sums["in_proj_weight"]) == {"0:24", "0:8", "8:16", "16:24"}
    found = input_norms(Scope.of(model)["in_proj_weight"], sums["in_proj_weight"])
    wanted = torch.cat([columns(x) + columns(y) for y in (x, other, other) for _ in range(8)]).view(24, 8)
    torch.testing.assert_close(found.square(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns_at_once", [10, 2**24])
def test_squares_of_a_product_are_those_of_its_columns_in_parts_of_any_size(
    columns_at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("allot.network.products.COLUMNS", columns_at_once)
    layers = {
        "grouped": (nn.Conv2d(4, 6, 3, 2, 1, groups=2), torch.randn(3, 4, 9, 8)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, output_padding=1), torch.randn(3, 4, 5, 4)),
        "three dimensions": (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2)), torch.randn(2, 2, 4, 5, 6)),
        "linear": (nn.Linear(7, 3), torch.randn(5, 6, 7)),
    }
    for model, x in layers.values():
        found: list[tuple[Tensor, Tensor]] = []

        def visit(product: Product, found: list[tuple[Tensor, Tensor]] = found) -> None:
            found.append((product.squares(), sum(part.square().sum(1) for part in product.columns())))

        with watched_products(model, Scope.of(model), visit):
            model(x)
        ((squares, wanted),) = found
        torch.testing.assert_close(squares, wanted, rtol=1e-5, atol=1e-5)


def test_a_convolution_is_not_unrolled_for_its_squares():
    model, x = nn.Conv2d(8, 4, 5, padding=2), torch.randn(16, 8, 24, 24)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(tensor.numel() for tensor in tensors_in(out))])
            return out

    seen: list[Product] = []
    with watched_products(model, Scope.of(model), seen.append):
        model(x)
    with Sizes():
        seen[0].squares()
    assert largest <= max(x.numel(), 8 * 24 * 24 * 25)  # unrolled: 16 times as many


def test_what_a_pass_leaves_is_small():
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 256))
    sums = squares_of(model, (torch.randn(2, 8, 3, 3),))
    assert sum(part.nbytes for of_layer in sums.values() for part in of_layer.values()) == 8 * (8 * 9 + 64)
