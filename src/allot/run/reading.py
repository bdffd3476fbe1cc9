"""Samples of a Dataset in order, read ahead by several threads; those that cannot be read reported and left out.

Threads, not processes: decoding pictures lets other threads run, nothing has to be pickled, and the samples come in the
same order whatever their number.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.utils.data import Dataset

from allot.errors import CorruptSample, UsageError

AHEAD = 4  # samples read ahead by each thread
log = logging.getLogger("allot")


class Readable(Dataset[Any]):
    """The samples of `source` that can be read: wherever all are gone through, the others are reported and left out.

    Attributes:
        unreadable: index -> what is wrong, of those found so far; each is logged once, to "allot".
    Raises:
        UsageError: `source` has no length or no places.
    """

    def __init__(self, source: Any) -> None:
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            raise UsageError(
                f"samples of a {type(source).__name__} cannot be left out: a Dataset with a length is accepted."
            )
        self.source = source
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.source[index]
        except CorruptSample:
            raise
        except OSError as error:  # what PIL and open raise
            raise CorruptSample.of(f"sample {index} cannot be read ({error})") from error

    def leave_out(self, index: int, error: CorruptSample) -> None:
        """Note that the sample cannot be read, and say so the first time."""
        if index not in self.unreadable:
            self.unreadable[index] = error.what
            log.warning("left out: %s", error.what)


def read(source: Any, indices: Iterable[int], workers: int = 0) -> Iterator[Any]:
    """`source[i]` for each index, in order.

    Args:
        workers: threads that read ahead; 0: none, samples are read when they are asked for.
    """
    return _ahead(source.__getitem__, indices, workers)


def read_readable(source: Any, indices: Iterable[int], workers: int = 0) -> Iterator[tuple[int, Any]]:
    """(i, `source[i]`) for each index, in order; of `Readable` samples, without those that cannot be read.

    Raises:
        UsageError: not one can be read.
    """
    tolerant = isinstance(source, Readable)
    first: CorruptSample | None = None
    found = tried = 0

    def looked(index: int) -> tuple[int, Any]:
        try:
            return index, source[index]
        except CorruptSample as error:
            if not tolerant:
                raise
            return index, error

    for index, sample in _ahead(looked, indices, workers):
        tried += 1
        if isinstance(sample, CorruptSample):  # said here, in order, whatever was read ahead
            source.leave_out(index, sample)
            first = first or sample
        else:
            found += 1
            yield index, sample
    if first and not found:
        raise UsageError(f"none of the {tried} samples can be read; the first: {first.what}.") from first


def _ahead(function: Callable[[int], Any], indices: Iterable[int], workers: int) -> Iterator[Any]:
    if not workers:
        yield from map(function, indices)
        return
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for index in indices:
            waiting.append(pool.submit(function, index))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
