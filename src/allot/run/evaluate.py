"""Scores on labelled data, and of causal language models on text.

Without labels, of a model that gives logits [B, T, V] for token ids [B, T], logits at t are scored against token t + 1:

    token_top1    share of tokens to which the model gives the highest logit
    nll           mean -log p(token), in nats
    perplexity    exp(nll)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, default_collate

from allot.errors import UsageError, check_number
from allot.network.call import attempt
from allot.network.compute import check_divisible
from allot.processes import all_gather_object, rank, world_size
from allot.run.calibration import LABEL_KEYS, inputs_of, moved, texts_at_a_time
from allot.run.reading import Readable, read_readable

LOGITS = 2**22  # in float64 at a time


@dataclass(frozen=True)
class Score:
    """A score: `metric` by name, `score` as a fraction, over `samples` samples.

    `nll` is the mean negative log-likelihood of the labels in nats, which measures calibrated confidence; None where a
    label is no class of the model. `unreadable` samples were left out, see `Readable`.
    """

    metric: str
    score: float
    samples: int
    nll: float | None = None
    unreadable: int = 0

    @property
    def perplexity(self) -> float | None:
        """exp(nll) of a language model; None for other models. Lower is better, so perplexity is not the score."""
        return math.exp(min(self.nll, 700.0)) if self.metric == "token_top1" and self.nll is not None else None

    def to_json(self) -> dict[str, Any]:
        """`{"metric", "score", "samples"}`; of a language model `perplexity`, and `unreadable` where samples were."""
        content: dict[str, Any] = {"metric": self.metric, "score": self.score, "samples": self.samples}
        if self.perplexity is not None:
            content["perplexity"] = self.perplexity
        return content | ({"unreadable": self.unreadable} if self.unreadable else {})


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    on_batch: Callable[[int, int | None], None] | None = None,
) -> Score:
    """Top-1 accuracy of a classifier, or of the next token of a causal language model, in eval mode.

    With N processes, each reads every N-th sample, or every N-th batch of a DataLoader.

    Args:
        model: maps inputs to logits `[B, classes]`, or token ids to logits `[B, T, V]`, or to an object with `.logits`;
            left as it was.
        data: a Dataset, DataLoader or iterable of `(inputs, label)` or of dicts with a label, labels whole numbers; or
            of token ids `[T]` or dicts with such `input_ids`, without labels.
        tensors: used in place of the model's own, by name.
        batch_size: most samples at a time; fewer of text.
        workers: threads that read the samples of a Dataset.
        on_batch: called with samples done and samples in all (None where unknown).
    Raises:
        UsageError: no labels, no samples, inputs that the model does not take, an output that is no logits, or
            text for a model whose logits change with tokens that come later.

    >>> evaluate(nn.Identity(), [(torch.tensor([2.0, 0.0]), 0), (torch.tensor([1.0, 0.0]), 1)]).to_json()
    {'metric': 'top1', 'score': 0.5, 'samples': 2}
    """
    check_number("workers", workers, 0, whole=True)
    if world_size() > 1:
        check_divisible(model)
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    counted: Any = data.dataset if isinstance(data, DataLoader) else data
    total = len(counted) if hasattr(counted, "__len__") else None
    right = samples = scored = 0
    nll = 0.0
    metric = ""
    with torch.no_grad():
        for batch, labels in _batches(data, batch_size, workers):
            inputs = moved(batch, reference.device, reference.dtype)
            output = attempt(model, inputs, tensors or {})
            logits = getattr(output, "logits", output)
            if labels is None:
                if not metric:
                    _refuse_looking_ahead(model, inputs, logits, tensors or {})
                metric = "token_top1"
                samples += len(logits)
                rows, labels = _next_tokens(inputs, logits)
            elif isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(labels):
                metric = metric or "top1"
                rows, labels = logits, labels.to(logits.device)
                samples += len(labels)
            else:
                raise UsageError(
                    f"top-1 needs logits [{len(labels)}, classes]; the model gives "
                    f"{list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
                )
            right += int((rows.argmax(1) == labels).sum())
            are_classes = bool(((labels >= 0) & (labels < rows.shape[1])).all())
            nll += _nll(rows, labels) if are_classes else math.nan
            scored += len(labels)
            if on_batch:
                on_batch(samples * world_size(), total)
    by_process = all_gather_object(
        (metric, right, samples, nll, scored, list(data.unreadable) if isinstance(data, Readable) else [])
    )
    metrics, *sums = zip(*by_process, strict=True)
    right, samples, nll, scored = (sum(part) for part in sums[:4])
    if not scored:
        raise UsageError("the data to score on is empty.")
    unreadable = len({index for some in sums[4] for index in some})
    return Score(max(metrics), right / scored, samples, None if math.isnan(nll) else nll / scored, unreadable)


def _nll(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> float:
    """The sum of -log p(label), in float64 a few rows at a time: a copy of all would double what a vocabulary takes."""
    pieces = zip(*(tensor.split(max(1, LOGITS // logits.shape[1])) for tensor in (logits, labels)), strict=True)
    return sum(float(F.cross_entropy(rows.double(), right, reduction="sum")) for rows, right in pieces)


def _token_ids(inputs: Any) -> Tensor | None:
    """The ids [T] of a sample of text, or [B, T] of a batch; None where there are none."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() in (1, 2) else None


def _text_mask(inputs: Any, ids: Tensor) -> Tensor:
    """Which tokens are text and not padding, [B, T]."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()


def _next_tokens(inputs: Any, logits: Tensor) -> tuple[Float[Tensor, "N V"], Int[Tensor, " N"]]:
    """Logits, and the tokens that they predict."""
    ids = _token_ids(inputs)
    assert ids is not None  # _refuse_looking_ahead has seen to it
    attended = _text_mask(inputs, ids)
    predicted = attended[:, 1:] & attended[:, :-1]
    return logits[:, :-1][predicted], ids[:, 1:][predicted].long()


def _refuse_looking_ahead(model: nn.Module, inputs: Any, logits: Any, tensors: Mapping[str, Tensor]) -> None:
    """Change the last token of a sample: in a causal language model no logits before it change.

    Raises:
        UsageError: they do, or there are none.
    """
    ids = _token_ids(inputs)
    if ids is None or not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise UsageError(_NO_LABELS)
    first = {key: value[:1] for key, value in inputs.items()} if isinstance(inputs, Mapping) else ids[:1]
    last = int(_text_mask(inputs, ids)[0].nonzero().max())
    other = ids[:1].clone()
    other[0, last] = (other[0, last] + 1) % logits.shape[2]
    changed = attempt(model, {**first, "input_ids": other} if isinstance(first, Mapping) else other, tensors)
    before, after = logits[0, :last], getattr(changed, "logits", changed)[0, :last]
    # the same sums in the same order: equal to the last bit unless a kernel chooses another order
    if last and float((after - before).abs().max()) > 4 * torch.finfo(before.dtype).eps * float(before.abs().max()):
        raise UsageError(
            "next tokens are predicted by causal language models; this model's logits change with tokens that come "
            "later: samples (inputs, label) are needed to score it."
        )


def _batches(data: Any, batch_size: int, workers: int) -> Iterator[tuple[Any, Tensor | None]]:
    if isinstance(data, DataLoader):
        batches: Iterator[Any] = itertools.islice(data, rank(), None, world_size())
    elif not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        indices = range(rank(), len(data), world_size())
        batches = _grouped((sample for _, sample in read_readable(data, indices, workers)), batch_size)
    else:
        batches = _grouped(itertools.islice(data, rank(), None, world_size()), batch_size)
    for batch in batches:
        yield inputs_of(batch), _labels(batch)


def _grouped(samples: Iterator[Any], size: int) -> Iterator[Any]:
    group: list[Any] = []
    for sample in samples:
        ids = _token_ids(inputs_of(sample))
        if not group and ids is not None and ids.dim() == 1 and _label_in(sample) is None:
            size = texts_at_a_time(len(ids), size)
        group.append(sample)
        if len(group) == size:
            yield default_collate(group)
            group = []
    if group:
        yield default_collate(group)


def _label_in(sample: Any) -> Any:
    if isinstance(sample, tuple | list) and len(sample) > 1:
        return sample[1]
    if isinstance(sample, Mapping):
        return next((sample[key] for key in sorted(LABEL_KEYS) if key in sample), None)
    return None


def _labels(batch: Any) -> Tensor | None:
    """The labels of a batch; None where there are none but token ids, whose labels are the tokens that follow."""
    label = _label_in(batch)
    if label is None and _token_ids(inputs_of(batch)) is not None:
        return None
    if not isinstance(label, Tensor) or label.is_floating_point() or label.dim() != 1:
        raise UsageError(_NO_LABELS)
    return label


_NO_LABELS = "the data has no whole-number labels: samples (inputs, label) are needed to score a model."
