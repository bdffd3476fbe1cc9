"""A mask in as few bytes as its counts allow: a bit a weight, or the positions of those kept (Elias and Fano)."""

from __future__ import annotations

from typing import Any

import numpy as np

from allot.budget.costs import low_bits, mask_bits

Bits = np.ndarray[Any, np.dtype[np.bool_]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def packed(mask: Bits) -> Bytes:
    """The smallest mask: see the top of `allot.export.files.formats`."""
    total, positions = mask.size, np.flatnonzero(mask)
    kept, low = positions.size, low_bits(mask.size, positions.size)
    if _mask_bytes(total, kept) == -(-total // 8):
        return np.packbits(mask)
    lowest = (positions[:, None] >> np.arange(low - 1, -1, -1)) & 1  # [kept, low]
    unary = np.zeros(kept + ((total - 1) >> low) + 1, dtype=bool)
    unary[(positions >> low) + np.arange(kept)] = True
    return np.packbits(np.concatenate([lowest.astype(bool).ravel(), unary]))


def positions_in(mask: Bytes, total: int, kept: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Where the weights of a mask are; None where it is no mask of `kept` of `total`."""
    bits = np.unpackbits(mask)
    if mask.size == -(-total // 8):
        positions = np.flatnonzero(bits)
    elif mask.size != _mask_bytes(total, kept):
        return None
    else:
        low = low_bits(total, kept)
        ones = np.flatnonzero(bits[kept * low :])
        if ones.size != kept:
            return None
        lowest = bits[: kept * low].reshape(kept, low) @ (1 << np.arange(low - 1, -1, -1))
        positions = ((ones - np.arange(kept)) << low) + lowest
    ascending = bool((np.diff(positions) > 0).all()) and (not positions.size or positions[-1] < total)
    return positions if positions.size == kept and ascending else None


def _mask_bytes(total: int, kept: int) -> int:
    return -(-int(mask_bits(total, kept)) // 8)
