"""The k-th highest of many entries, without a full sort, which takes longer and needs memory for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from jaxtyping import Shaped
from torch import Tensor

LARGE = 2**20  # entries of a tensor above which they are not all ranked at once


def highest_each(flat: Shaped[Tensor, " N"], counts: Sequence[int]) -> dict[int, Tensor]:
    """By k, the k-th highest of the entries, for ascending counts k."""
    if flat.numel() > 4 * LARGE or not _ranked_by_numpy(flat):  # numpy ranks a copy, and nothing else is made
        return {k: _highest(flat, k) for k in counts}
    cuts, part = {}, flat.detach().numpy()
    for k in counts:
        place = flat.numel() - k
        part = numpy.partition(part, place)
        cuts[k] = torch.tensor(part[place], dtype=flat.dtype)
        part = part[:place]  # the next cut is no higher
    return cuts


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a matrix are ranked together."""
    return max(1, LARGE // matrix.shape[1])


def highest_of_rows(matrix: Shaped[Tensor, "rows cols"], k: int) -> Shaped[Tensor, " rows"]:
    """The k-th highest entry of each row, 1 <= k <= cols."""
    return torch.cat([_kth_highest(part, k) for part in matrix.split(rows_at_once(matrix))])


def _kth_highest(matrix: Shaped[Tensor, "rows cols"], k: int) -> Shaped[Tensor, " rows"]:
    """The k-th highest entry of each row; on the CPU numpy selects several times faster than torch."""
    place = matrix.shape[1] - k
    if _ranked_by_numpy(matrix):
        return torch.from_numpy(numpy.partition(matrix.detach().numpy(), place, axis=1)[:, place].copy())
    return matrix.kthvalue(place + 1, dim=1).values


def _ranked_by_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _highest(flat: Shaped[Tensor, " N"], k: int) -> Tensor:
    """The k-th highest of the entries.

    Of many entries, a sample gives two bounds for the value, and only the entries between them are ranked: this takes a
    twentieth of the memory that ranking all entries takes.
    """
    if flat.numel() > LARGE and flat.is_floating_point():
        sample = flat[:: -(-flat.numel() // 65_536)].sort(descending=True).values
        place, off = k * len(sample) // flat.numel(), len(sample) // 64  # eight standard deviations of a draw
        high = sample[place - off] if place >= off else flat.new_tensor(float("inf"))
        low = sample[place + off] if place + off < len(sample) else flat.new_tensor(float("-inf"))
        rank, near = k, []
        for part in flat.split(LARGE // 4):
            rank -= int((part > high).sum())
            near.append(part[(part <= high) & (part >= low)])
        between = torch.cat(near)
        if 1 <= rank <= len(between):  # sorted or periodic entries may mislead the sample
            return _kth_highest(between[None], rank)[0]
    return _kth_highest(flat[None], k)[0]
