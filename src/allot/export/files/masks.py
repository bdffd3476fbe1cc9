"""Masks in as few bytes as their counts allow; `allot.export.files.formats` describes the bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allot.budget.costs import low_bits, mask_bits

Bits = np.ndarray[Any, np.dtype[np.uint8]]


def mask_bytes(total: int, kept: int) -> int:
    """Bytes of a mask that keeps `kept` of `total` weights.

    >>> mask_bytes(80, 40)
    10
    """
    return -(-int(mask_bits(total, kept)) // 8)


def packed(mask: Tensor) -> Tensor:
    """A mask as bytes: a bit a weight, or positions.

    >>> packed(torch.tensor([True, False, True]))
    tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(_packed(mask.flatten().numpy()))


def filled(shape: list[int], mask: Tensor, values: Tensor) -> Tensor | None:
    """The weights with these values where the mask keeps one, else zeros; None if mask and values disagree.

    >>> filled([3], torch.tensor([160], dtype=torch.uint8), torch.tensor([1.0, 2.0]))
    tensor([1., 0., 2.])
    """
    total = math.prod(shape)
    flat = torch.zeros(total, dtype=values.dtype)
    if mask.numel() == -(-total // 8):
        bits = np.unpackbits(mask.numpy())
        if bits[total:].any() or int(np.count_nonzero(bits)) != len(values):
            return None
        flat[torch.from_numpy(bits[:total]).bool()] = values
        return flat.view(shape)
    positions = _positions(mask.numpy(), total, len(values))
    if positions is None:
        return None
    flat[torch.from_numpy(positions)] = values
    return flat.view(shape)


def _packed(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Bits:
    total, kept = mask.size, int(np.count_nonzero(mask))
    if mask_bytes(total, kept) == -(-total // 8):
        return np.packbits(mask)
    positions, low = np.flatnonzero(mask), low_bits(total, kept)
    lowest = (positions[:, None] >> np.arange(low - 1, -1, -1)) & 1  # [kept, low]
    unary = np.zeros(kept + ((total - 1) >> low) + 1, dtype=bool)
    unary[(positions >> low) + np.arange(kept)] = True
    return np.packbits(np.concatenate([lowest.astype(bool).ravel(), unary]))


def _positions(mask: Bits, total: int, kept: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Positions of the weights of a mask that lists them; None if it is no mask of `kept` of `total`."""
    if mask.size != mask_bytes(total, kept):
        return None
    bits, low = np.unpackbits(mask), low_bits(total, kept)
    ones = np.flatnonzero(bits[kept * low :])
    if ones.size != kept:
        return None
    lowest = bits[: kept * low].reshape(kept, low) @ (1 << np.arange(low - 1, -1, -1))
    positions = ((ones - np.arange(kept)) << low) + lowest
    ascending = bool((np.diff(positions) > 0).all()) and (not positions.size or positions[-1] < total)
    return positions if ascending else None
