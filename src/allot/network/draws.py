"""Random numbers as functions of a seed: the caller's own stream of draws is left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

_APART = 1_000_003  # a prime: seeds and numbers that are near each other give draws that are far apart


def numbered(seed: int, number: int) -> int:
    """One seed for the draw of this number in a run of this seed."""
    return seed * _APART + number


def generator(seed: int) -> torch.Generator:
    """A generator of its own, on the CPU; equal seeds, equal draws.

    >>> torch.equal(torch.rand(3, generator=generator(7)), torch.rand(3, generator=generator(7)))
    True
    """
    return torch.Generator().manual_seed(seed % 2**63)


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """While open, torch draws by this seed; afterwards as if nothing had been drawn.

    Args:
        devices: CUDA devices that draw as well.
    """
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed notes a trace for every kind of device
        if cuda:
            torch.cuda.manual_seed_all(seed % 2**63)
        yield
