"""Times compared side by side: all slow down alike on a busy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

PAYS = 1.05  # times as fast as dense, below which nothing is called faster: so far apart come two looks at the same net


def timed(runs: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each, taken in turn, so that a busy machine slows all alike.

    Args:
        runs: name -> what is timed.
        seconds: how long, in all; `least` rounds in any case.
    """
    for run in runs.values():
        run()  # the first one allocates
    taken: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while len(next(iter(taken.values()))) < least or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - before)
    return {name: statistics.median(some) for name, some in taken.items()}
