"""More inputs from a few: random crops of pictures, and mixtures of two inputs.

Statistics of a few hundred inputs, and weights trained on them, fit those inputs; others like them stand for the rest:

    crop       a part of a picture, brought back to its size, half of them mirrored
    mixture    a x + (1 - a) x',  x' another input, a even in [1/2, 1]     (mixup, Zhang et al. 2018; of no labels here)

Each is a function of (seed, sample, number), so that batches stay a function of (seed, k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from allot.network.draws import generator, numbered
from allot.run.calibration import Calibration, inputs_of

LEAST = 0.3  # of each side, that a crop has; nets are usually trained on crops of a twelfth of the area and more
SIDE = 16  # least height and width of a picture


def are_pictures(inputs: Any) -> bool:
    """Whether a batch of inputs is one tensor of pictures, `[B, channels, height, width]`.

    >>> are_pictures(torch.zeros(2, 3, 32, 32)), are_pictures(torch.zeros(2, 3, 100)), are_pictures((1, 2))
    (True, False, False)
    """
    return (
        isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dim() == 4
        and inputs.shape[1] in (1, 3, 4) and min(inputs.shape[2:]) >= SIDE
    )  # fmt: skip


def can_be_mixed(inputs: Any) -> bool:
    """Whether a batch of inputs is one tensor of numbers, not of tokens or the like.

    >>> can_be_mixed(torch.zeros(2, 100)), can_be_mixed(torch.zeros(2, 9, dtype=torch.int64)), can_be_mixed({})
    (True, False, False)
    """
    return isinstance(inputs, Tensor) and inputs.is_floating_point()


def with_crops(calibration: Calibration, count: int) -> Calibration:
    """The calibration with `count` crops of every picture beside it."""
    return _with_views(calibration, count, crop)


def with_mixtures(calibration: Calibration, count: int) -> Calibration:
    """The calibration with `count` mixtures of every input, with others of its inputs, beside it."""
    source, partners = calibration.source, calibration.indices

    def mixture(inputs: Tensor, seed: int) -> Tensor:
        place, a = torch.rand(2, generator=generator(seed)).tolist()
        other = torch.as_tensor(inputs_of(source[partners[int(place * len(partners))]]))
        return torch.lerp(other.to(inputs.dtype), inputs, 0.5 + a / 2) if other.shape == inputs.shape else inputs

    return _with_views(calibration, count, mixture)


def _with_views(calibration: Calibration, count: int, view: Callable[[Tensor, int], Tensor]) -> Calibration:
    indices = (index for i in calibration.indices for index in range(i * (count + 1), (i + 1) * (count + 1)))
    return replace(calibration, source=Views(calibration.source, count, calibration.seed, view), indices=tuple(indices))


class Views:
    """The samples of `source`, each followed by views of it: sample i has the places i (count + 1) and after.

    Args:
        view: (inputs of one sample, seed) -> a view of them.
    """

    def __init__(self, source: Any, count: int, seed: int, view: Callable[[Tensor, int], Tensor]) -> None:
        self.source, self.count, self.seed, self.view = source, count, seed, view

    def __len__(self) -> int:
        return len(self.source) * (self.count + 1)

    def __getitem__(self, place: int) -> Any:
        index, number = divmod(place, self.count + 1)
        inputs = inputs_of(self.source[index])
        if not number:
            return (inputs,)
        return (self.view(torch.as_tensor(inputs), numbered(numbered(self.seed, index), number)),)


def crop(picture: Float[Tensor, "C H W"], seed: int) -> Float[Tensor, "C H W"]:
    """A random crop of a picture, brought back to its size; mirrored or not."""
    height, width = picture.shape[1:]
    share, down, right, turn = torch.rand(4, generator=generator(seed)).tolist()
    share = LEAST + (1 - LEAST) * share
    h, w = max(1, round(share * height)), max(1, round(share * width))
    top, left = round(down * (height - h)), round(right * (width - w))
    part = picture[None, :, top : top + h, left : left + w]
    part = F.interpolate(part.float(), (height, width), mode="bilinear", align_corners=False).to(picture.dtype)[0]
    return part.flip(2) if turn < 0.5 else part
