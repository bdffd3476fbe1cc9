"""Calibration: the small set of inputs, labels not needed, as batches that are a function of (seed, k)."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from allot.errors import UsageError, check_number, first_line
from allot.network.arguments import typed
from allot.network.draws import generator, numbered, seeded
from allot.network.trees import floats_in, leaves_of, map_leaves, map_tensors
from allot.processes import rank, world_size
from allot.run.reading import Readable, read, read_readable

SAMPLES, TEXTS = 512, 128  # calibration samples, and blocks of text, where the user gives no number
BATCH, TOKENS = 64, 1024  # samples in a batch, and most tokens: each token has a logit for every word
LISTED = 2**24  # samples of a data set of which a permutation is made
SURE = 32  # inputs; of fewer, so few are watched that comparisons are unsure
LABEL_KEYS = frozenset({"label", "labels", "target", "targets"})


@dataclass(frozen=True)
class Calibration:
    """The inputs that pruning uses.

    Attributes:
        source: a sequence of samples, with labels or without; `source[i]` must return the same sample every time.
        indices: which samples are used, in this order.
        batch_size: most samples per batch.
        seed: decides the order of batches.
        device, dtype: of the batches; dtype applies to floating-point tensors.
        workers: threads that read samples; 0: none. Batches are the same whatever their number.
        channels_last: whether tensors of four dimensions are laid out with channels last.

    >>> calibration = Calibration.of(torch.arange(5.0)[:, None], batch_size=2)
    >>> len(calibration), calibration.batches, calibration.example().tolist()
    (5, 3, [[0.0]])
    """

    source: Any = field(repr=False)
    indices: tuple[int, ...] = field(repr=False)
    batch_size: int = 64
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    workers: int = 0
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not self.indices:
            raise UsageError("the calibration data is empty: at least one sample is needed.")
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size}: a whole number above 0 is accepted.")
        check_number("workers", self.workers, 0, whole=True)

    @classmethod
    @typed
    def of(
        cls,
        data: Data,
        *,
        samples: int = 512,
        batch_size: int = 64,
        seed: int = 0,
        batched: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        workers: int = 0,
        channels_last: bool = False,
    ) -> Calibration:
        """Calibration from a tensor `[N, ...]`, a Dataset, a DataLoader or any iterable.

        Samples are inputs, `(inputs, label, ...)` or dicts; labels are ignored. A model of several inputs takes a
        dict, or a tuple of inputs in a sample's first place: `((a, b), label)`.

        Args:
            samples: how many are used: a draw by `seed` where the data has a length, else the first ones.
            batched: the iterable gives batches, not samples. A DataLoader always does.
            workers: threads that read samples, for data whose samples may be read from several at once.
            channels_last: whether tensors of four dimensions are laid out with channels last.
        Raises:
            UsageError: no data, samples that do not form a batch, or `Readable` samples of which none can be read.
        """
        check_number("workers", workers, 0, whole=True)
        if samples < 1:
            raise UsageError(f"samples={samples}: a whole number above 0 is accepted.")
        samples = min(samples, sys.maxsize)
        with seeded(seed):  # a shuffling DataLoader draws from torch's generator
            source = _indexable(data, samples, batched=batched)
        order: Iterable[int] = _drawn(len(source), seed) if len(source) > samples else range(len(source))
        if isinstance(source, Readable):  # the next in the draw takes the place of one that cannot be read
            order = (i for i, _ in read_readable(source, order, workers))
        indices, device = tuple(itertools.islice(order, samples)), device or torch.device("cpu")
        return cls(source, indices, batch_size, seed, device, dtype, workers, channels_last)

    def __len__(self) -> int:
        return len(self.indices)

    def parted(self) -> tuple[Calibration, Calibration]:
        """(inputs for statistics and training, inputs of the watch set), which share no sample.

        The watch set is drawn by the seed: an eighth of the inputs, 16 at least and 128 at most; of fewer than 32
        inputs an eighth, at least one. A single input is both.

        >>> [len(part) for part in Calibration.of(torch.zeros(512, 1)).parted()]
        [448, 64]
        """
        count = len(self)
        size = min(max(count // 8, 16), 128) if count >= SURE else max(count // 8, 1)
        if count == 1:
            return self, self
        draw = torch.randperm(count, generator=generator(numbered(self.seed, count)))
        watched = set(draw[:size].tolist())
        used, watch = (
            [i for place, i in enumerate(self.indices) if (place in watched) is wanted] for wanted in (False, True)
        )
        return replace(self, indices=tuple(used)), replace(self, indices=tuple(watch))

    @property
    def order(self) -> tuple[Any, ...]:
        """The values that determine the batches of a source: equal orders, equal batches."""
        return self.indices, self.batch_size, self.seed, str(self.device), str(self.dtype), self.channels_last

    @property
    def batches(self) -> int:
        """Number of batches in one pass over the samples; their sizes differ by one at most."""
        return -(-len(self.indices) // self.batch_size)

    @property
    def for_more(self) -> str:
        """What makes batches larger, for an error."""
        alone = "There is one sample" if len(self) == 1 else f"There are {len(self)} samples in all"
        return f"{alone}: give more (--samples, --data)" if len(self) <= self.batch_size else "Use a larger batch_size"

    def batch(self, k: int) -> tuple[Any, int]:
        """Batch k of an endless sequence of passes, each in another order: a function of (seed, k).

        Returns:
            (inputs as the model takes them, number of samples in the batch). With several processes, the inputs are
            this process's part of the batch, see `allot.processes`.
        """
        positions = self.positions(k)
        return self.pick(self.share(positions)), len(positions)

    def positions(self, k: int) -> list[int]:
        """The samples of batch k, as positions in `indices`."""
        epoch, number = divmod(k, self.batches)
        draw = generator(numbered(self.seed, epoch))
        return torch.randperm(len(self.indices), generator=draw).tensor_split(self.batches)[number].tolist()

    def share(self, positions: Sequence[int]) -> list[int]:
        """The positions of a batch that belong to this process, contiguous; counts differ by one at most.

        Raises:
            UsageError: fewer positions than processes.
        """
        if len(positions) < world_size():
            raise UsageError(
                f"a batch of {len(positions)} samples cannot be shared out over {world_size()} processes: use a larger "
                "--batch-size or more --samples, or fewer processes."
            )
        low, high = (len(positions) * (rank() + i) // world_size() for i in (0, 1))
        return list(positions[low:high])

    def pick(self, positions: Sequence[int]) -> Any:
        """The samples at these positions of `indices`, as one batch of inputs."""
        return self.take([self.indices[i] for i in positions])

    def example(self) -> Any:
        """A batch of the first sample."""
        return self.take([self.indices[0]])

    def repeats(self) -> bool:
        """Whether up to 64 samples are the same when they are read twice more; augmented samples are not."""

        def read_samples() -> list[Any]:
            return [self._batched([sample]) for sample in read(self.source, self.indices[:64], self.workers)]

        with torch.random.fork_rng(devices=[]):  # later draws are the same with and without this check
            first = read_samples()
            return all(
                _equal(sample, again) for _ in range(2) for sample, again in zip(first, read_samples(), strict=True)
            )

    def take(self, indices: Sequence[int]) -> Any:
        """These samples of the source as one batch of inputs, on the device.

        Raises:
            UsageError: the samples are not tensors, arrays or numbers, or differ in shape.
        """
        return self._batched(list(read(self.source, indices, self.workers if len(indices) > 1 else 0)))

    def _batched(self, samples: Sequence[Any]) -> Any:
        inputs = [inputs_of(sample) for sample in samples]
        try:
            batch = default_collate(inputs)
            _refuse_texts(batch)
        except (TypeError, RuntimeError, ValueError, KeyError) as error:
            raise UsageError(
                f"calibration samples do not form a batch: {first_line(error).rstrip('.')}. "
                "Tensors or arrays of one shape are accepted."
            ) from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in floats_in(batch)):
            raise UsageError("the calibration inputs hold nan or infinite values: leave these samples out.")
        batch = moved(batch, self.device, self.dtype)
        return map_tensors(_channels_last, batch) if self.channels_last else batch


def texts_at_a_time(length: int, most: int) -> int:
    """How many blocks of `length` tokens make a batch of at most `TOKENS`; one at least, at most `most`.

    >>> texts_at_a_time(512, 64), texts_at_a_time(8, 64), texts_at_a_time(4096, 64)
    (2, 64, 1)
    """
    return max(1, min(most, TOKENS // max(length, 1)))


Data: TypeAlias = Tensor | Dataset[Any] | Iterable[Any] | Calibration  # what `Calibration.of` reads


def readable_again(data: Any, most: int | None = None) -> Any:
    """Data that several runs can read: of an iterator a list of its samples, the first `most`; other data as they are.

    >>> readable_again(iter("abc"), 2), readable_again("abc")
    (['a', 'b'], 'abc')
    """
    return list(itertools.islice(data, most)) if isinstance(data, Iterator) else data


def inputs_of(sample: Any) -> Any:
    """The inputs in a sample: the first item of a tuple or list, a dict without its labels, or the sample itself."""
    if isinstance(sample, tuple | list):
        if not sample:
            raise UsageError("a calibration sample is an empty tuple.")
        sample = sample[0]
    if isinstance(sample, Mapping):
        return {key: value for key, value in sample.items() if key not in LABEL_KEYS and value is not None}
    return tuple(sample) if isinstance(sample, list) else sample


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """`batch` with every tensor on `device` and every floating-point one in `dtype`; lists become tuples."""
    return map_tensors(lambda t: t.to(device, dtype if dtype and t.is_floating_point() else None), batch, lists=tuple)


def cut(batch: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a batch of inputs."""
    return map_tensors(lambda tensor: tensor[start:stop], batch)


def _channels_last(tensor: Tensor) -> Tensor:
    """`tensor` with channels last in memory, where it has four dimensions."""
    if tensor.dim() != 4:
        return tensor
    # of one channel both layouts are the same memory; only its strides tell a convolution which is meant
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)


def _drawn(length: int, seed: int) -> Iterator[int]:
    """The indices below `length`, each once, in an order by the seed; without a list of them where they are many."""
    if length <= LISTED:
        yield from torch.randperm(length, generator=generator(seed)).tolist()
        return
    draw, seen = random.Random(seed), set[int]()
    while len(seen) < length:
        if (index := draw.randrange(length)) not in seen:
            seen.add(index)
            yield index


def check_samples(what: str, data: Any) -> None:
    """Look whether `data` can hold samples at all.

    Args:
        what: what the error calls the data.
    Raises:
        UsageError: it is no tensor, Dataset or iterable.
    """
    holds = hasattr(data, "__getitem__") or isinstance(data, Iterable)
    if not holds or isinstance(data, str | bytes | Mapping | type | nn.Module):
        advice = ""
        if isinstance(data, Mapping):
            advice = " Of columns give the rows: [dict(zip(data, row)) for row in zip(*data.values())]."
        if isinstance(data, str) and ":" in data:
            advice = f" Load it first: from allot.sources.load import load_data; data = load_data({data!r})."
        raise UsageError(
            f"{what} of type {type(data).__name__}: a tensor, Dataset, DataLoader or iterable is accepted.{advice}"
        )


def _indexable(data: Any, samples: int, *, batched: bool) -> Any:
    check_samples("calibration data", data)
    if getattr(data, "shape", None) == ():
        raise UsageError(f"calibration data is one number ({data}): a tensor of samples [N, ...] is accepted.")
    if isinstance(data, DataLoader) and data.batch_size is None and data.batch_sampler is None:
        data = data.dataset if not isinstance(data.dataset, IterableDataset) else iter(data)
    elif isinstance(data, DataLoader):
        batched = True
    if batched:
        return list(itertools.islice(_unbatched(data), samples))
    # an IterableDataset inherits __getitem__, and may have a length
    if not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return data
    if isinstance(data, Iterable):
        return list(itertools.islice(data, samples))
    raise UsageError(
        f"calibration data of type {type(data).__name__}: a tensor, Dataset with a length, DataLoader or iterable is "
        "accepted."
    )


def _unbatched(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        inputs = inputs_of(batch)
        _check_batch(inputs)
        yield from (_sample_at(inputs, i) for i in range(_batch_size(inputs)))


def _check_batch(inputs: Any) -> None:
    """Raises:
    UsageError: inputs of a batch that are no tensors [batch, ...], or that differ in length.
    """
    several = isinstance(inputs, Mapping | tuple)
    parts = dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(inputs if several else (inputs,)))
    for name, value in parts.items():
        if not getattr(value, "shape", ()):
            where = f"input {name!r} of a batch" if several else "a batch"
            raise UsageError(
                f"{where} is a {type(value).__name__}: tensors [batch, ...] are accepted. Lists of numbers have to be "
                "tensors in every sample, as of dataset.with_format('torch'), and a collate_fn has to stack them."
            )
    if len({len(value) for value in parts.values()}) > 1:
        shapes = ", ".join(str(list(value.shape)) for value in parts.values())
        raise UsageError(
            f"the inputs of a batch differ in length ({shapes}): tensors [batch, ...] are accepted. A collate_fn has "
            "to stack samples, like torch.stack, and gives (inputs, labels)."
        )


def _batch_size(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        return _batch_size(next(iter(inputs.values())))
    return _batch_size(inputs[0]) if isinstance(inputs, tuple) else len(inputs)


def _sample_at(inputs: Any, i: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: value[i] for key, value in inputs.items()}
    # one more tuple around several inputs: the first item of a sample is its inputs
    return (tuple(value[i] for value in inputs),) if isinstance(inputs, tuple) else inputs[i]


def _refuse_texts(batch: Any) -> None:
    """Collation passes texts through unchanged, and no model computes with texts."""
    for leaf in leaves_of(batch):
        if isinstance(leaf, str | bytes):
            raise TypeError(f"a sample holds the text {leaf!r}")


def _equal(left: Any, right: Any) -> bool:
    leaves, others = list(leaves_of(left)), list(leaves_of(right))
    pairs = zip(leaves, others, strict=False)
    same = (torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other) for one, other in pairs)
    return len(leaves) == len(others) and all(same)


class Noisy:
    """Samples of `source` with Gaussian noise on their inputs, the same every time: a function of (seed, index).

    Args:
        share: standard deviation of the noise over that of the tensor that it is added to.
    """

    def __init__(self, source: Any, share: float, seed: int) -> None:
        self.source, self.share, self.seed = source, share, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        draw = generator(numbered(self.seed, index))

        def noised(value: Any) -> Any:
            value = torch.as_tensor(value) if hasattr(value, "dtype") else value
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            noise = torch.randn(value.shape, generator=draw).to(value)
            return value + self.share * value.std(correction=0) * noise

        return (map_leaves(noised, inputs_of(self.source[index])),)
