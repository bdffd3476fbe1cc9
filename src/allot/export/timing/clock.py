"""Times compared side by side: a busy machine slows all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

PAYS = 1.05  # a smaller speed-up is not called faster: two measurements of one net differ that much
AS_DENSE = "computes as dense"  # the verdict on a form that multiplies the same dense tensors: it is not timed
FEWEST = 3  # rounds, where a call takes seconds
Run = Callable[[], Any]


@dataclass(frozen=True)
class Speedup:
    """A sparse net timed beside a dense net.

    Attributes:
        dense, sparse: median seconds.
        spread: the range of the speed-up in half of the rounds.
    """

    dense: float
    sparse: float
    spread: tuple[float, float]

    @property
    def faster(self) -> float:
        """The speed-up over dense."""
        return self.dense / self.sparse

    @property
    def pays(self) -> bool:
        """Whether the sparse net is faster by more than noise: at least `PAYS` times, and in three rounds of four."""
        return self.verdict == "faster"

    @property
    def verdict(self) -> str:
        """The verdict on the speed-up, or "unclear" if fewer than three rounds of four agree."""
        word = verdict(self.faster)
        agree = {"faster": self.spread[0] > 1, "slower": self.spread[1] < 1}
        return word if agree.get(word, True) else "unclear"


def verdict(times: float) -> str:
    """The word for a speed-up over dense: "faster", "no faster" or "slower".

    >>> verdict(1.2), verdict(1.01)
    ('faster', 'no faster')
    """
    return "faster" if times >= PAYS else "no faster" if times > 1 / PAYS else "slower"


def side_by_side(dense: Run, sparse: Run, *, seconds: float = 2.0, least: int = 7, most: float = math.inf) -> Speedup:
    """The speed-up of sparse over dense, both timed in turn.

    Args:
        seconds, least, most: see `rounds`.
    """
    taken = rounds({"dense": dense, "sparse": sparse}, seconds=seconds, least=least, most=most)
    ratios = [a / b for a, b in zip(taken["dense"], taken["sparse"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return Speedup(statistics.median(taken["dense"]), statistics.median(taken["sparse"]), (low, high))


def timed(runs: Mapping[str, Run], *, seconds: float = 2.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each run, timed in turn, so that a busy machine slows all of them alike.

    Args:
        runs: name -> the function that is timed.
        seconds: total time of measurement; at least `least` rounds.
    """
    return {name: statistics.median(times) for name, times in rounds(runs, seconds=seconds, least=least).items()}


def rounds(runs: Mapping[str, Run], *, seconds: float, least: int, most: float = math.inf) -> dict[str, list[float]]:
    """Seconds of each run in every round, until the accelerators have finished.

    Each run is called twice, and the second call counts: a net in service finds its weights in the cache, where another
    net has not replaced them. A run that takes more than a fiftieth of `most` is called once, because fetching its
    weights takes a small part of that time.

    Args:
        seconds: total time of measurement; at least `least` rounds.
        most: seconds after which `FEWEST` rounds are enough, as for a language model on a CPU.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while (done := len(next(iter(taken.values())))) < least or time.perf_counter() - started < seconds:
        if done >= FEWEST and time.perf_counter() - started > most:
            break
        for name, run in runs.items():
            seconds_of_call = _timed_call(run)
            taken[name].append(seconds_of_call if seconds_of_call > most / 50 else _timed_call(run))
    return taken


def _timed_call(run: Run) -> float:
    _settle()
    before = time.perf_counter()
    run()
    _settle()
    return time.perf_counter() - before


def _settle() -> None:
    """Wait for all accelerators: calls return before they have finished."""
    for device in range(torch.accelerator.device_count()):
        torch.accelerator.synchronize(device)
