"""Views of pictures: random crops, brought back to size, half of them mirrored.

Statistics of a few hundred pictures fit those pictures; views of them stand for the others. Every view is a function of
(seed, sample, number), so that batches stay a function of (seed, k).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from allot.network.draws import generator, numbered
from allot.run.calibration import Calibration, inputs_of

LEAST = 0.6  # of each side, that a crop has
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


def with_views(calibration: Calibration, count: int) -> Calibration:
    """The calibration with `count` views of every picture beside it."""
    indices = (index for i in calibration.indices for index in range(i * (count + 1), (i + 1) * (count + 1)))
    return replace(calibration, source=Views(calibration.source, count, calibration.seed), indices=tuple(indices))


class Views:
    """The samples of `source`, each followed by views of it: sample i has the places i (count + 1) and after."""

    def __init__(self, source: Any, count: int, seed: int) -> None:
        self.source, self.count, self.seed = source, count, seed

    def __len__(self) -> int:
        return len(self.source) * (self.count + 1)

    def __getitem__(self, place: int) -> Any:
        index, number = divmod(place, self.count + 1)
        inputs = inputs_of(self.source[index])
        if not number:
            return (inputs,)
        return (view(torch.as_tensor(inputs), numbered(numbered(self.seed, index), number)),)


def view(picture: Float[Tensor, "C H W"], seed: int) -> Float[Tensor, "C H W"]:
    """A random crop of a picture, brought back to its size; mirrored or not."""
    height, width = picture.shape[1:]
    share, down, right, turn = torch.rand(4, generator=generator(seed)).tolist()
    share = LEAST + (1 - LEAST) * share
    h, w = max(1, round(share * height)), max(1, round(share * width))
    top, left = round(down * (height - h)), round(right * (width - w))
    crop = picture[None, :, top : top + h, left : left + w]
    crop = F.interpolate(crop.float(), (height, width), mode="bilinear", align_corners=False).to(picture.dtype)[0]
    return crop.flip(2) if turn < 0.5 else crop
