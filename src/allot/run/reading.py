"""Samples of a Dataset in order, read ahead by several threads; unreadable samples are reported and left out.

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

from allot.errors import AllotError, CorruptSample, UsageError

AHEAD = 4  # samples read ahead by each thread
log = logging.getLogger("allot")


class Readable(Dataset[Any]):
    """The samples of `source`; a pass over all of them reports unreadable samples and leaves them out.

    Attributes:
        unreadable: index -> reason, for the unreadable samples found so far; each is logged once, to "allot".
    Raises:
        UsageError: `source` has no length or no `source[i]`.

    >>> samples = Readable([1, 2, 3])
    >>> len(samples), samples[0], samples.unreadable
    (3, 1, {})
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
        except OSError as error:  # raised by PIL and by open
            raise CorruptSample.of(f"sample {index} cannot be read ({error})") from error

    def leave_out(self, index: int, error: CorruptSample) -> None:
        if index not in self.unreadable:
            self.unreadable[index] = error.what
            log.warning("left out: %s", error.what)


def read(source: Any, indices: Iterable[int], workers: int = 0) -> Iterator[Any]:
    """`source[i]` for each index, in order.

    Args:
        workers: threads that read ahead; 0: none, samples are read when they are needed.
    """
    return _read_ahead(lambda index: _sample(source, index), indices, workers)


def read_readable(source: Any, indices: Iterable[int], workers: int = 0) -> Iterator[tuple[int, Any]]:
    """(i, `source[i]`) for each index, in order; of a `Readable`, without unreadable samples.

    Raises:
        UsageError: no sample can be read.
    """
    tolerant = isinstance(source, Readable)
    first: CorruptSample | None = None
    readable = tried = 0

    def attempt(index: int) -> tuple[int, Any]:
        try:
            return index, _sample(source, index)
        except CorruptSample as error:
            if not tolerant:
                raise
            return index, error

    for index, sample in _read_ahead(attempt, indices, workers):
        tried += 1
        if isinstance(sample, CorruptSample):  # reported here, in order, however far was read ahead
            source.leave_out(index, sample)
            first = first or sample
        else:
            readable += 1
            yield index, sample
    if first and not readable:
        raise UsageError(f"none of the {tried} samples can be read; the first: {first.what}.") from first


def _sample(source: Any, index: int) -> Any:
    """`source[index]`; what it raises gets a note that names the sample."""
    try:
        return source[index]
    except AllotError:
        raise
    except Exception as error:
        error.add_note(f"reading sample {index}")
        raise


def _read_ahead(function: Callable[[int], Any], indices: Iterable[int], workers: int) -> Iterator[Any]:
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
