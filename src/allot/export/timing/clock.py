"""Times compared side by side: all slow down alike on a busy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

PAYS = 1.05  # times as fast as dense, below which nothing is called faster: so far apart come two looks at one net
Run = Callable[[], Any]


@dataclass(frozen=True)
class Speedup:
    """A sparse net timed beside a dense one.

    Attributes:
        dense, sparse: median seconds.
        spread: how many times as fast the sparse one was in half of the rounds, from and to.
    """

    dense: float
    sparse: float
    spread: tuple[float, float]

    @property
    def faster(self) -> float:
        """Times as fast as dense."""
        return self.dense / self.sparse

    @property
    def pays(self) -> bool:
        """Whether it is faster by more than noise: at least `PAYS` times, and in three rounds of four at all."""
        return self.verdict == "faster"

    @property
    def verdict(self) -> str:
        """The same in words: as `verdict` says, or "unclear", where three rounds of four do not agree with it."""
        word = verdict(self.faster)
        agree = {"faster": self.spread[0] > 1, "slower": self.spread[1] < 1}
        return word if agree.get(word, True) else "unclear"


def verdict(times: float) -> str:
    """What so many times as fast as dense is called: "faster", "no faster" or "slower"."""
    return "faster" if times >= PAYS else "no faster" if times > 1 / PAYS else "slower"


def side_by_side(dense: Run, sparse: Run, *, seconds: float = 2.0, least: int = 7) -> Speedup:
    """Both, taken in turn.

    Args:
        seconds: how long, in all; `least` rounds in any case.
    """
    taken = rounds({"dense": dense, "sparse": sparse}, seconds=seconds, least=least)
    ratios = [a / b for a, b in zip(taken["dense"], taken["sparse"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return Speedup(statistics.median(taken["dense"]), statistics.median(taken["sparse"]), (low, high))


def timed(runs: Mapping[str, Run], *, seconds: float = 2.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each, taken in turn, so that a busy machine slows all alike.

    Args:
        runs: name -> what is timed.
        seconds: how long, in all; `least` rounds in any case.
    """
    return {name: statistics.median(some) for name, some in rounds(runs, seconds=seconds, least=least).items()}


def rounds(runs: Mapping[str, Run], *, seconds: float, least: int) -> dict[str, list[float]]:
    """Seconds of each in every round, until its numbers are there.

    Each is called twice, and the second call counts: a net that serves finds its weights where it left them, not where
    another one's have taken their place.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while len(next(iter(taken.values()))) < least or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            run()
            _settle()
            before = time.perf_counter()
            run()
            _settle()
            taken[name].append(time.perf_counter() - before)
    return taken


def _settle() -> None:
    """Wait for all accelerators: they answer before they have computed."""
    for device in range(torch.accelerator.device_count()):
        torch.accelerator.synchronize(device)
