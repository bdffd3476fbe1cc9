"""Sums of the squares of a layer's inputs: one number a column of its matrix, as far as rows read the same inputs.

    s_k = sum over positions p of x_pk^2        x: the inputs that rows of `layer.matrix(weight)` are multiplied with

Of an attention the rows of query, key and value may read different inputs; of a grouped convolution those of a group.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.layers import Layer, Place, Scope, places_by_parameter
from allot.network.products import Product, watched_products
from allot.processes import all_gather_object, all_reduce

Squares = dict[str, dict[str, Tensor]]  # layer -> rows, like "0:24" -> [groups, K], float64


@contextmanager
def watched_squares(model: nn.Module, scope: Scope, sums: Squares) -> Iterator[None]:
    """While open, each forward pass adds the squares of the inputs of every layer that it reaches to `sums`.

    Raises:
        UsageError: on leaving, a layer that ran and whose weight multiplied no input as it is.
    """
    last: list[
        tuple[Hashable, Tensor, Tensor]
    ] = []  # key, inputs and squares of the product before: q, k, v share them

    def visit(product: Product) -> None:
        if not (last and product.key == last[0][0]):
            last[:] = [(product.key, product.inputs, product.squares())]
        rows = f"{product.rows.start}:{product.rows.stop}"
        of_layer = sums.setdefault(product.layer.name, {})
        of_layer[rows] = of_layer.get(rows, 0) + last[0][2].double()

    ran: dict[str, Place] = {}
    places = places_by_parameter(model)
    with ExitStack() as stack:
        for layer in scope:
            for place in places[layer.name]:
                if place.kind:
                    note = partial(_note, ran, layer.name, place)
                    stack.callback(place.module.register_forward_hook(note).remove)
        stack.enter_context(watched_products(model, scope, visit))
        yield
        last.clear()
    for name, place in ran.items():
        if name not in sums:
            raise UsageError(
                f"{place.name}: {type(place.module).__name__} is not linear in its weight, so its inputs' norms mean "
                "nothing for single weights. Exclude the layer or use the score 'magnitude'."
            )


def reduced(sums: Squares) -> Squares:
    """The sums over all processes; an input that one of them never saw counts as zero there."""
    shapes = {(n, rows): tuple(s.shape) for n, of_layer in sums.items() for rows, s in of_layer.items()}
    every = sorted({key: shape for seen in all_gather_object(shapes) for key, shape in seen.items()}.items())
    device = next((s.device for of_layer in sums.values() for s in of_layer.values()), None)
    parts = [
        sums[name][rows] if (name, rows) in shapes else torch.zeros(shape, dtype=torch.float64, device=device)
        for (name, rows), shape in every
    ]
    total: Squares = {}
    for ((name, rows), _), part in zip(every, all_reduce(parts), strict=True):
        total.setdefault(name, {})[rows] = part
    return total


def input_norms(layer: Layer, squares: dict[str, Tensor]) -> Float64[Tensor, "*weight"]:
    """The root of the summed squares of the inputs of each weight, in the shape of the weight."""
    whole = squares.get(f"0:{layer.rows}")
    if len(squares) == 1 and whole is not None:
        norms = _of_rows(whole.sqrt(), layer.rows)
    else:
        first = next(iter(squares.values()))
        norms = first.new_zeros(layer.rows, first.shape[1])
        for rows, part in squares.items():
            start, stop = map(int, rows.split(":"))
            norms[start:stop] += _of_rows(part, stop - start)
        norms = norms.sqrt()
    return layer.unmatrix(norms)


def _of_rows(groups: Tensor, rows: int) -> Tensor:
    """`[groups, K]` for every row of a group: `[rows, K]`."""
    return groups[:, None].expand(-1, rows // len(groups), -1).flatten(0, 1)


def _note(ran: dict[str, Place], name: str, place: Place, module: nn.Module, args: Any, output: Any) -> None:
    ran.setdefault(name, place)
