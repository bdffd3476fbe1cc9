"""Statistics of columns that a test draws."""

from __future__ import annotations

from torch import Tensor

from allot.methods.layerwise.grams import Gram


def gram_of(first: Tensor, second: Tensor) -> Gram:
    """Of the columns of two halves, each [positions, K], which both nets share."""
    halves = [(x.mT @ x)[None] for x in (first, second)]
    totals = [x.sum(0)[None] for x in (first, second)]
    return Gram(halves, halves[0] + halves[1], totals, totals[0] + totals[1], [len(first), len(second)])
