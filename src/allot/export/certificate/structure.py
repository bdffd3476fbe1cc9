"""Whether layers keep the pattern that was promised: N of every M weights, or as many in every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from allot.export.certificate.rows import Row, checked
from allot.network.layers import Layer
from allot.run.patterns import NM, Pattern, Rows, parse


def structure_of(pattern: Pattern, layers: Iterable[Layer]) -> dict[str, Any] | None:
    """`{"pattern", "layers": {name: [kind, groups]}}`, JSON-ready; None where layers have no structure inside."""
    if not isinstance(pattern, NM | Rows):
        return None
    return {"pattern": str(pattern), "layers": {layer.name: [layer.kind, layer.groups] for layer in layers}}


def structure_row(file: str, promised: Mapping[str, Any], kept: Mapping[str, int], state: Mapping[str, Tensor]) -> Row:
    """Whether the nonzeros of every layer fit into the pattern.

    Args:
        promised: of `structure_of`.
        kept: layer name -> weights that it keeps.
        state: tensors of the file.
    """
    pattern = parse(promised["pattern"])
    broken = []
    for name, (kind, groups) in promised["layers"].items():
        layer = Layer(name, tuple(state[name].shape), kind, groups)
        if not fits(pattern, layer, state[name], kept[name]):
            broken.append(name)
    wanted = f"in every layer {promised['pattern']}"
    return checked(file, "pattern", wanted, ", ".join(broken) or wanted)


def fits(pattern: Pattern, layer: Layer, weight: Tensor, kept: int) -> bool:
    """Whether a mask of this pattern that keeps `kept` weights can cover every nonzero of the layer.

    >>> import torch
    >>> layer = Layer("fc.weight", (1, 4), "linear")
    >>> [fits(NM(2, 4), layer, torch.tensor([row]), 2) for row in ([1.0, 0.0, 0.0, 2.0], [1.0, 3.0, 0.0, 2.0])]
    [True, False]
    """
    nonzero = layer.matrix(weight) != 0  # [rows, cols]
    if isinstance(pattern, NM):
        of_group = nonzero.unflatten(1, (-1, pattern.m)).sum(-1)  # [rows, cols/m]
        return int(of_group.max()) * layer.total <= kept * pattern.m
    k, more = divmod(kept, layer.rows)
    of_row = nonzero.sum(1)  # [rows]
    return int(of_row.max()) <= k + 1 and int((of_row > k).sum()) <= more
