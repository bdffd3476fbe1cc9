"""Scores on labelled data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, default_collate

from allot.calibration import LABEL_KEYS, inputs_of, moved
from allot.errors import AllotError, UsageError
from allot.masks import call


@dataclass(frozen=True)
class Score:
    """A score: `metric` by name, `score` as a fraction, over `samples` samples.

    `nll` is the mean negative log-likelihood of the labels in nats, which tells whether confidence is deserved; None
    where a label is no class of the model.
    """

    metric: str
    score: float
    samples: int
    nll: float | None = None

    def to_json(self) -> dict[str, Any]:
        """`{"metric", "score", "samples"}`."""
        return {"metric": self.metric, "score": self.score, "samples": self.samples}


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    on_batch: Callable[[int, int | None], None] | None = None,
) -> Score:
    """Top-1 accuracy of a classifier in eval mode.

    Args:
        model: maps inputs to logits `[B, classes]` (or an object with `.logits`); left as it was.
        data: a Dataset, DataLoader or iterable of `(inputs, label)` or of dicts with a label; labels whole numbers.
        tensors: used in place of the model's own, by name.
        on_batch: called with samples done and samples in all (None where unknown).
    Raises:
        UsageError: no labels, no samples, inputs that the model does not take, or an output that is no logits.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    counted: Any = data.dataset if isinstance(data, DataLoader) else data
    total = len(counted) if hasattr(counted, "__len__") else None
    right = samples = 0
    nll = 0.0
    with torch.no_grad():
        for inputs, labels in _batches(data, batch_size):
            output = attempt(model, moved(inputs, reference.device, reference.dtype), tensors or {})
            logits = getattr(output, "logits", output)
            if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
                raise UsageError(
                    f"top-1 needs logits [{len(labels)}, classes]; the model gives "
                    f"{list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
                )
            right += int((logits.argmax(1).cpu() == labels.cpu()).sum())
            labels = labels.to(logits.device)
            known = bool(((labels >= 0) & (labels < logits.shape[1])).all())
            nll += float(F.cross_entropy(logits.double(), labels, reduction="sum")) if known else math.nan
            samples += len(labels)
            if on_batch:
                on_batch(samples, total)
    if not samples:
        raise UsageError("the data to score on is empty.")
    return Score("top1", right / samples, samples, None if math.isnan(nll) else nll / samples)


def attempt(model: nn.Module, inputs: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `call` gives, without gradients.

    Raises:
        UsageError: the model does not take these inputs.
    """
    try:
        with torch.no_grad():
            return call(model, tensors, inputs)
    except AllotError:
        raise
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"the model does not run on inputs of shape {_shape(inputs)}: {message}") from error


def _shape(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return list(inputs.shape)
    if isinstance(inputs, Mapping):
        return {key: _shape(value) for key, value in inputs.items()}
    return tuple(_shape(value) for value in inputs) if isinstance(inputs, tuple) else type(inputs).__name__


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Any, Tensor]]:
    loader = data
    if not isinstance(data, DataLoader):
        if not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            samples: Iterator[Any] = (data[i] for i in range(len(data)))
        else:
            samples = iter(data)
        loader = _grouped(samples, batch_size)
    for batch in loader:
        yield inputs_of(batch), _labels(batch)


def _grouped(samples: Iterator[Any], size: int) -> Iterator[Any]:
    group: list[Any] = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield default_collate(group)
            group = []
    if group:
        yield default_collate(group)


def _labels(batch: Any) -> Tensor:
    label = None
    if isinstance(batch, tuple | list) and len(batch) > 1:
        label = batch[1]
    elif isinstance(batch, Mapping):
        label = next((batch[key] for key in sorted(LABEL_KEYS) if key in batch), None)
    if not isinstance(label, Tensor) or label.is_floating_point() or label.dim() != 1:
        raise UsageError("the data has no whole-number labels: samples (inputs, label) are needed to score a model.")
    return label
