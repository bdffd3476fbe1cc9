"""Importance of single weights: plain functions `(layer, weight, evidence) -> score`, larger is more important.

A score has the weight's shape and is float32 or wider; only its order within a layer decides which weights stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from allot.network.draws import generator, numbered
from allot.network.layers import Group, Layer, Member


class Evidence(Protocol):
    """The data that a score may use beside the weight."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    def input_norm(self, layer: Layer) -> Tensor:
        """Root of the summed squares of the calibration inputs that each weight multiplies; shape of the weight."""


class ChannelEvidence(Evidence, Protocol):
    """The data that a score of channels may use."""

    def tensor(self, name: str) -> Tensor:
        """A tensor of the net."""

    def module(self, name: str) -> nn.Module:
        """The module that holds a tensor."""

    def gate_squares(self, group: Group) -> Tensor:
        """Expected squared gradient of the log-likelihood by a factor on each channel; `[channels]`."""


WeightScore = Callable[[Layer, Tensor, Evidence], Tensor]
ChannelScore = Callable[[Group, ChannelEvidence], Tensor]


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
    """|w| times the norm of the input that it multiplies (Sun et al., ICLR 2024), for any kernel and groups.

    The paper compares weights within each output row: the pattern `rows` (`--pattern rows`), which the recipe `llm`
    has; `unstructured` compares all weights of a layer. `--method llm --repair none` is the paper's method.

    Of an embedding |w|: no input multiplies it.
    """
    return magnitude(layer, weight, evidence) * evidence.input_norm(layer).to(weight.device)


def random(layer: Layer, weight: Tensor, evidence: Evidence) -> Tensor:
    """A draw from [0, 1) by the run's seed and the layer's name: the floor that any score has to beat."""
    draw = generator(numbered(evidence.seed, zlib.crc32(layer.name.encode())))
    return torch.rand(layer.shape, generator=draw).to(weight.device)


SCORES: dict[str, WeightScore] = {"magnitude": magnitude, "lamp": lamp, "wanda": wanda, "random": random}


# importance of whole channels: `(group, evidence) -> [channels]`


def channel_norms(group: Group, evidence: ChannelEvidence) -> Tensor:
    """Norm of all weights that write or read a channel, each tensor's over its mean; the mean over tensors."""
    weights = [member for member in group.members if evidence.tensor(member.tensor).dim() > 1]
    return torch.stack([_norms(member, evidence) for member in weights]).mean(0)


def channel_scale(group: Group, evidence: ChannelEvidence) -> Tensor:
    """|gamma| of the norms that scale a channel, the mean over them (Liu et al., ICCV 2017); without any, `magnitude`.

    DSA's experiments use the |gamma| of one of them.
    """
    scales = [
        member
        for member in group.members
        if member.tensor.endswith("weight") and isinstance(evidence.module(member.tensor), _NormBase | nn.GroupNorm)
    ]
    if not scales:
        return channel_norms(group, evidence)
    return torch.stack([_norms(member, evidence) for member in scales]).mean(0)


def channel_taylor(group: Group, evidence: ChannelEvidence) -> Tensor:
    """What the log-likelihood loses to second order without the channel: the Fisher information of a factor on it.

    Labels are drawn from the model's own answers, so that none are needed (Theis et al. 2018, arXiv:1801.05787).
    """
    return evidence.gate_squares(group)


def channel_random(group: Group, evidence: ChannelEvidence) -> Tensor:
    """A draw from [0, 1) by the run's seed and the group's name."""
    return torch.rand(group.total, generator=generator(numbered(evidence.seed, zlib.crc32(group.name.encode()))))


CHANNEL_SCORES: dict[str, ChannelScore] = {
    "magnitude": channel_norms,
    "scale": channel_scale,
    "taylor": channel_taylor,
    "random": channel_random,
}


def _norms(member: Member, evidence: ChannelEvidence) -> Tensor:
    """Norm of each channel's part of a tensor over the mean of these norms; float64 `[channels]`."""
    tensor = evidence.tensor(member.tensor).detach().double()
    squares = tensor.square().movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).sum(1)  # [places]
    norms = squares[torch.tensor(member.places, device=tensor.device)].sum(1).sqrt()
    return norms / norms.mean().clamp_min(torch.finfo(torch.float64).tiny)
