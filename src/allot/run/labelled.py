"""Labelled data read in batches: inputs, targets, and how many samples they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, default_convert

from allot.errors import UsageError, first_line
from allot.network.trees import tensors_in
from allot.processes import rank, world_size
from allot.run.calibration import LABEL_KEYS, check_samples, inputs_of, texts_at_a_time
from allot.run.reading import read_readable

LabelledData: TypeAlias = Dataset[Any] | Iterable[Any]  # of (inputs, label), or of what a metric takes
ENTRIES = 2**21  # of targets in a batch at most: a pixel has a logit for every class


@dataclass(frozen=True)
class Batch:
    """A batch of inputs and its targets.

    Attributes:
        inputs: as the model takes them.
        targets: a DataLoader's own; of samples, what `default_collate` makes of their labels. Where the labels of the
            first batch do not stack, as boxes of several pictures, always a list with one entry a sample. None where
            samples have no label.
        samples: how many there are.
    """

    inputs: Any
    targets: Any
    samples: int


def labelled_batches(data: Any, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """The batches of a DataLoader, or those made of the samples of a Dataset or iterable.

    With N processes, each reads every N-th sample, or every N-th batch of a DataLoader.

    Args:
        batch_size: most samples in a batch; fewer of text, and of samples with many labels, like pixels.
        workers: threads that read the samples of a Dataset.
    Raises:
        UsageError: samples that do not form a batch.

    >>> samples = [(1.0, [5]), (2.0, [6, 7])]  # labels of two lengths
    >>> next(labelled_batches(samples, 2)).targets
    [[5], [6, 7]]
    """
    check_samples("labelled data", data)
    if isinstance(data, DataLoader):
        for batch in itertools.islice(data, rank(), None, world_size()):
            inputs = inputs_of(batch)
            yield Batch(inputs, label_of(batch), _length(inputs))
    elif not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        indices = range(rank(), len(data), world_size())
        yield from _collated((sample for _, sample in read_readable(data, indices, workers)), batch_size)
    else:
        yield from _collated(itertools.islice(data, rank(), None, world_size()), batch_size)


def label_of(sample: Any) -> Any:
    """The label in a sample or batch: the second item of a tuple, an entry of a dict; None where there is none."""
    if isinstance(sample, tuple | list) and len(sample) > 1:
        return sample[1]
    if isinstance(sample, Mapping):
        return next((sample[key] for key in sorted(LABEL_KEYS) if sample.get(key) is not None), None)
    return None


def token_ids(inputs: Any) -> Tensor | None:
    """The ids [T] of a sample of text, or [B, T] of a batch; None where there are none."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() in (1, 2) else None


def described(labels: Any) -> str:
    """What labels are, in words.

    >>> described([{"boxes": 1, "labels": 2}]), described("cat"), described(None)
    ("a list of 1, the first a dict with 'boxes' and 'labels'", 'a text', 'missing')
    """
    if isinstance(labels, Tensor):
        whole = "true or false" if labels.dtype == torch.bool else "whole numbers"
        fractional = labels.is_floating_point() or labels.is_complex()
        return f"{'floating-point numbers' if fractional else whole} {list(labels.shape)}"
    if isinstance(labels, Mapping):
        return f"a dict with {' and '.join(repr(key) for key in labels)}"
    if isinstance(labels, tuple | list):
        first = f", the first {described(labels[0])}" if labels else ""
        return f"a {type(labels).__name__} of {len(labels)}{first}"
    return "missing" if labels is None else f"a {'text' if isinstance(labels, str) else type(labels).__name__}"


def _length(inputs: Any) -> int:
    """Samples in a batch of inputs."""
    first = next(tensors_in(inputs), None)
    return len(first) if first is not None and first.dim() else 1


def _collated(samples: Iterator[Any], size: int) -> Iterator[Batch]:
    stacked: bool | None = None  # decided by the first batch: a metric gets targets of one form
    for group in _groups(samples, size):
        labels = [label_of(sample) for sample in group]
        inputs = _stack([inputs_of(sample) for sample in group], "inputs")
        if all(label is None for label in labels):
            yield Batch(inputs, None, len(group))
            continue
        if stacked is None:
            stacked = _stacks(labels)
        yield Batch(inputs, _stack(labels, "labels") if stacked else default_convert(labels), len(group))


def _groups(samples: Iterator[Any], most: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    size = most
    for sample in samples:
        if not group:
            size = _at_a_time(sample, most)
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _at_a_time(sample: Any, most: int) -> int:
    """How many samples like this one are scored at a time."""
    label, ids = label_of(sample), token_ids(inputs_of(sample))
    if label is None:
        return texts_at_a_time(len(ids), most) if ids is not None and ids.dim() == 1 else most
    entries = sum(tensor.numel() for tensor in tensors_in(default_convert(label)))
    return max(1, min(most, ENTRIES // max(entries, 1)))


def _stacks(labels: Sequence[Any]) -> bool:
    try:
        default_collate(list(labels))
    except (TypeError, RuntimeError, ValueError, KeyError):
        return False
    return True


def _stack(parts: Sequence[Any], what: str) -> Any:
    try:
        return default_collate(list(parts))
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(
            f"the {what} of {len(parts)} samples do not form a batch: {first_line(error).rstrip('.')}. Give a "
            "DataLoader with a collate_fn of your own, or samples of one shape."
        ) from error
