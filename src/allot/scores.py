"""Importance of single weights: plain functions `(layer, weight, evidence) -> score`, larger is more important.

A score has the weight's shape and is float32 or wider; only its order within a layer decides which weights stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from allot.layers import Layer


class Evidence(Protocol):
    """What a score may ask about a layer beyond its weight."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        ...

    def input_norm(self, layer: Layer) -> Tensor:
        """Root of the summed squares of the calibration inputs that each weight multiplies; shape of the weight."""
        ...


Score = Callable[[Layer, Tensor, Evidence], Tensor]


def magnitude(layer: Layer, weight: Tensor, evidence: Evidence) -> Tensor:
    """|w|."""
    return weight.detach().abs().float() if weight.element_size() < 4 else weight.detach().abs()


def lamp(layer: Layer, weight: Tensor, evidence: Evidence) -> Tensor:
    """Layer-adaptive magnitude: `lamp_score`. Within a layer it orders weights like |w|."""
    return lamp_score(weight)


def lamp_score(weight: Float[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """w^2 over the sum of all squares not smaller than it (Lee et al., ICLR 2021), float64, shape of `weight`.

    lamp(w_i) = w_i^2 / sum_{j: |w_j| >= |w_i|} w_j^2, ties by index.
    """
    square = weight.detach().double().square().flatten()
    order = square.argsort(descending=True, stable=True)
    energy = square[order].cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(square).scatter_(0, order, square[order] / energy).view_as(weight)


def wanda(layer: Layer, weight: Tensor, evidence: Evidence) -> Tensor:
    """|w| times the norm of the input that it multiplies (Sun et al., ICLR 2024), for any kernel and groups."""
    return magnitude(layer, weight, evidence) * evidence.input_norm(layer).to(weight.device)


def random(layer: Layer, weight: Tensor, evidence: Evidence) -> Tensor:
    """A draw from [0, 1) by the run's seed and the layer's name: the floor that any score has to beat."""
    generator = torch.Generator().manual_seed((evidence.seed * 1_000_003 + zlib.crc32(layer.name.encode())) % 2**63)
    return torch.rand(layer.shape, generator=generator).to(weight.device)


SCORES: dict[str, Score] = {"magnitude": magnitude, "lamp": lamp, "wanda": wanda, "random": random}
