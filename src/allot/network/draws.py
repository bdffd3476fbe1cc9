"""Random numbers as functions of a seed; the caller's random stream does not move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

_PRIME = 1_000_003  # nearby seeds and numbers give different streams


def numbered(seed: int, number: int) -> int:
    """The seed of draw `number` in a run with this seed."""
    return seed * _PRIME + number


def generator(seed: int) -> torch.Generator:
    """A new generator on the CPU; equal seeds give equal draws.

    >>> torch.equal(torch.rand(3, generator=generator(7)), torch.rand(3, generator=generator(7)))
    True
    """
    return torch.Generator().manual_seed(seed % 2**63)


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """While open, torch draws by this seed; afterwards torch's random state is as before.

    Args:
        devices: CUDA devices that draw as well.
    """
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed notes a trace for every kind of device
        if cuda:
            torch.cuda.manual_seed_all(seed % 2**63)
        yield
