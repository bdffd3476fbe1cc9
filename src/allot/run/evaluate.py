"""Scores on labelled data, and of causal language models on text; or by a function of the user.

Without a function and without labels, of a model that gives logits [B, T, V] for token ids [B, T], logits at t are
scored against token t + 1:

    token_top1    share of tokens to which the model gives the highest logit
    nll           mean -log p(token), in nats
    perplexity    exp(nll)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from allot.errors import UsageError, check_number, users_errors
from allot.network.arguments import typed_but
from allot.network.call import attempt, dtype_for, filled_copy, modes
from allot.network.compute import check_divisible
from allot.network.kinds import FLOATS
from allot.network.preserved import preserved, refused_writes
from allot.network.trees import map_tensors
from allot.processes import all_gather_object, on_first_process, world_size
from allot.run.calibration import moved
from allot.run.labelled import LabelledData, described, labelled_batches, token_ids
from allot.run.metric import Metric
from allot.run.reading import Readable

LOGITS = 2**22  # in float64 at a time


@dataclass(frozen=True)
class Score:
    """A score: `metric` by name, `score` as a fraction, over `samples` samples.

    Attributes:
        score: top-1 as a fraction; of a function of the user, its first number.
        samples: 0 where a function of all the data got data without a length.
        nll: mean negative log-likelihood of the labels in nats, which measures calibrated confidence; None where a
            label is no class of the model, and where a function of the user scores.
        unreadable: samples that were left out, see `Readable`.
        values: every number of a function of the user, by name; empty otherwise.
        lower: the names for which lower is better.
        chance: the top-1 that the same answers would have, were they independent of the labels; None where `nll` is.
    """

    metric: str
    score: float
    samples: int
    nll: float | None = None
    unreadable: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    lower: tuple[str, ...] = ()
    chance: float | None = None

    @property
    def at_chance(self) -> bool:
        """Whether the answers are no better than chance: kappa, the part of the way from chance to perfect, is near 0.

        Two standard errors count as near, and so does 1/20. False where two standard errors are above 1/4, as of few
        samples.

        >>> Score("top1", 0.12, 1000, chance=0.1).at_chance, Score("top1", 0.3, 1000, chance=0.1).at_chance
        (True, False)
        """
        if self.chance is None or not self.samples or self.chance >= 1:
            return False
        kappa = (self.score - self.chance) / (1 - self.chance)
        error = 2 * math.sqrt(self.chance / (1 - self.chance) / self.samples)
        return error <= 1 / 4 and kappa <= max(error, 1 / 20)

    @property
    def perplexity(self) -> float | None:
        """exp(nll) of a language model; None for other models. Lower is better, so perplexity is not the score."""
        return math.exp(min(self.nll, 700.0)) if self.metric == "token_top1" and self.nll is not None else None

    def __repr__(self) -> str:
        """In one line, without what is not known.

        >>> Score("top1", 0.92221, 797, nll=0.31), Score("dice", 0.5, 0, values={"dice": 0.5, "loss": 2})
        (Score(metric='top1', score=0.9222, nll=0.3100, samples=797), Score(metric='dice', score=0.5000, loss=2.0000))
        """
        others = {name: value for name, value in self.values.items() if name != self.metric}
        numbers = {"score": self.score, **others, "perplexity": self.perplexity, "nll": self.nll}
        parts = [f"{name}={value:.4f}" for name, value in numbers.items() if value is not None]
        counts = {"samples": self.samples, "unreadable": self.unreadable}
        parts += [f"{name}={count}" for name, count in counts.items() if count]
        return f"Score(metric={self.metric!r}, {', '.join(parts)})"

    def to_json(self) -> dict[str, Any]:
        """`{"metric", "score", "samples"}`; of a language model `perplexity`, and `unreadable` where samples were.

        Of a function of the user also `values` and `lower_is_better`, the names for which lower is better.
        """
        content: dict[str, Any] = {"metric": self.metric, "score": self.score, "samples": self.samples}
        if self.perplexity is not None:
            content["perplexity"] = self.perplexity
        if self.values:
            content |= {"values": dict(self.values), "lower_is_better": list(self.lower)}
        return content | ({"unreadable": self.unreadable} if self.unreadable else {})


@typed_but("metric")
@users_errors("allot.evaluate")
def evaluate(
    model: nn.Module,
    data: LabelledData,
    *,
    metric: Callable[..., Any] | str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    on_batch: Callable[[int, int | None], None] | None = None,
) -> Score:
    """Top-1 accuracy of a classifier, or of the next token of a causal language model, in eval mode; or any score.

    Every label counts: of labels [B, H, W], every pixel. Of labels with several dimensions, -100 and, where it is no
    class, 255 mark what is not labelled. With N processes, each reads every N-th sample, or every N-th batch of a
    DataLoader.

    Args:
        model: maps inputs to logits `[B, classes]`, or `[B, classes, H, W]` for labels `[B, H, W]` (or with the
            classes last), or token ids to logits `[B, T, V]`, or to an object with `.logits` or a dict with "out";
            to anything where `metric` scores. Left as it was.
        data: a Dataset, DataLoader or iterable of `(inputs, label)` or of dicts with a label, labels whole numbers; or
            of token ids `[T]` or dicts with such `input_ids`, without labels. Labels of any kind where `metric` scores.
        metric: a function `(outputs, targets)`, called with what the model gives for a batch and its labels (its
            inputs, where samples have no label), or `(model, data)`, called once; or its place, "file.py:function". It
            returns a number or `{name: number}`, see `allot.run.metric`.
        tensors: used in place of the model's own, by name.
        batch_size: most samples at a time; fewer of text and of pixels.
        workers: threads that read the samples of a Dataset.
        on_batch: called with samples done and samples in all (None where unknown).
    Raises:
        UsageError: no labels, labels that are no classes, no samples, inputs that the model does not take, an output
            that is no logits, or text for a model whose logits change with tokens that come later; a metric that
            fails, or returns something else.

    >>> evaluate(nn.Identity(), [(torch.tensor([2.0, 0.0]), 0), (torch.tensor([1.0, 0.0]), 1)]).to_json()
    {'metric': 'top1', 'score': 0.5, 'samples': 2}
    >>> evaluate(nn.Identity(), [(1.0, 2.0), (3.0, 3.0)], metric=F.l1_loss).score
    0.5
    """
    check_number("workers", workers, 0, whole=True)
    own = None if metric is None else Metric.of(metric)
    if own and own.whole:
        return _score_of_all(model, data, own, tensors or {})
    if world_size() > 1:
        check_divisible(model)
    reference = next((p for p in model.parameters() if p.dtype in FLOATS), torch.zeros(()))
    counted: Any = data.dataset if isinstance(data, DataLoader) else data
    total = len(counted) if hasattr(counted, "__len__") else None
    sums: Sums = {}
    samples = 0
    device, dtype = reference.device, None
    with preserved(model), torch.no_grad():
        for number, batch in enumerate(labelled_batches(data, batch_size, workers)):
            with nullcontext() if number else refused_writes(model):
                dtype = dtype if number else dtype_for(model, moved(batch.inputs, device, None), tensors)
                inputs = moved(batch.inputs, device, dtype)
                output = attempt(model, inputs, tensors or {})
            if own:
                targets = inputs if batch.targets is None else map_tensors(lambda t: t.to(device), batch.targets)
                found = {name: (batch.samples * x, batch.samples) for name, x in own(output, targets).items()}
            elif batch.targets is None:
                if not sums:
                    _refuse_looking_ahead(model, inputs, _logits(output), tensors or {})
                found = _top1("token_top1", *_next_tokens(inputs, _logits(output)))
            else:
                found = _top1("top1", *_class_rows(_logits(output), batch.targets))
            if sums and sums.keys() != found.keys():
                raise UsageError(f"batches have different scores: {', '.join(sums)}, then {', '.join(found)}.")
            sums = _added(sums, found)
            samples += batch.samples
            if on_batch:
                on_batch(samples * world_size(), total)
    by_process = all_gather_object((sums, samples, list(data.unreadable) if isinstance(data, Readable) else []))
    sums = functools.reduce(_added, (sums for sums, _, _ in by_process))
    samples = sum(count for _, count, _ in by_process)
    unreadable = len({index for _, _, indices in by_process for index in indices})
    if not any(count for _, count in sums.values()):
        raise UsageError("the data to score on is empty.")
    means: dict[str, Any] = {name: value / count for name, (value, count) in sums.items()}
    if own:
        return _own_score(own, means, samples, unreadable)
    nll, answers, labels = (means.pop(name) for name in ("nll", "answers", "labels"))
    ((name, score),) = means.items()
    if math.isnan(nll):
        return Score(name, score, samples, None, unreadable)
    return Score(name, score, samples, nll, unreadable, chance=float(answers @ labels))


Sums = dict[str, tuple[Any, int]]  # name -> sum, a number or a count for each class; number of summands


def _added(left: Sums, right: Sums) -> Sums:
    added = dict(left)
    for name, (value, count) in right.items():
        before, counted = added.get(name, (0.0, 0))
        added[name] = before + value, counted + count
    return added


def _score_of_all(model: nn.Module, data: Any, metric: Metric, tensors: Mapping[str, Tensor]) -> Score:
    """The score of a function of (model, data), called by the first process."""

    def measure() -> dict[str, float]:
        scored = filled_copy(model, tensors) if tensors else model
        with preserved(model), modes(scored, lambda module: False), torch.no_grad():
            return metric(scored, data)

    values = on_first_process(measure)
    counted: Any = data.dataset if isinstance(data, DataLoader) else data
    unreadable = len(data.unreadable) if isinstance(data, Readable) else 0
    samples = len(counted) - unreadable if hasattr(counted, "__len__") else 0
    return _own_score(metric, values, samples, unreadable)


def _own_score(metric: Metric, values: Mapping[str, float], samples: int, unreadable: int) -> Score:
    name, score = next(iter(values.items()))
    return Score(name, score, samples, None, unreadable, values, metric.lower(values))


def _top1(name: str, rows: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Sums:
    """How many labels have the highest logit, their negative log-likelihood, and how often each class is which."""
    are_classes = bool(((labels >= 0) & (labels < rows.shape[1])).all())
    answers, count = rows.argmax(1), len(labels)
    return {
        name: (int((answers == labels).sum()), count),
        "nll": (_nll(rows, labels) if are_classes else math.nan, count),
        "answers": (_histogram(answers, rows.shape[1]), count),
        "labels": (_histogram(labels if are_classes else answers, rows.shape[1]), count),
    }


def _histogram(numbers: Int[Tensor, " N"], size: int) -> Float[Tensor, " size"]:
    return torch.bincount(numbers, minlength=size).double().cpu()


def _logits(output: Any) -> Any:
    """The logits in what a model gives: `.logits` of transformers, "out" of torchvision's segmentation."""
    if isinstance(output, Mapping) and not hasattr(output, "logits"):
        return output.get("logits", output.get("out", output))
    return getattr(output, "logits", output)


def _class_rows(logits: Any, labels: Any) -> tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]:
    """The logits [N, classes] and the label of every sample, pixel or token that has one.

    Raises:
        UsageError: labels that are no classes, or logits that do not fit them.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or not labels.dim():
        raise UsageError(
            f"the labels are {described(labels)}: top-1 needs whole numbers [B], or [B, H, W] for pixels. {_ANYTHING}"
        )
    if isinstance(logits, Tensor) and logits.dim() == labels.dim() > 1 and labels.shape[1] == 1:
        labels = labels.squeeze(1)  # [B, 1, H, W] of [B, H, W]
    places = labels.shape[1:]
    shape = logits.shape if isinstance(logits, Tensor) and logits.dim() == labels.dim() + 1 else torch.Size()
    first, last = (len(shape) > 1 and (*shape[:1], *rest) == labels.shape for rest in (shape[2:], shape[1:-1]))
    if not first and not last:
        gives = list(logits.shape) if isinstance(logits, Tensor) else described(logits)
        wanted = ", ".join(str(size) for size in (len(labels), "classes", *places))
        raise UsageError(
            f"top-1 needs logits [{wanted}] for labels that are {described(labels)}; the model gives {gives}. "
            f"{_ANYTHING}"
        )
    if first and last and places:
        raise UsageError(
            f"logits {list(shape)} for labels {list(labels.shape)}: the classes may be the second dimension or the "
            f"last. {_ANYTHING}"
        )
    rows = (logits.movedim(1, -1) if first else logits).flatten(0, -2)
    if rows.shape[1] < 2:
        raise UsageError(f"the model gives one number for every label, {list(shape)}: no classes. {_ANYTHING}")
    labels = labels.to(logits.device).flatten().long()
    if not places:
        return rows, labels
    labelled = (labels != -100) & ((labels != 255) | (rows.shape[1] > 255))
    return rows[labelled], labels[labelled]


_ANYTHING = "--metric file.py:function (metric= in Python) scores anything."


def _nll(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> float:
    """The sum of -log p(label), in float64 a few rows at a time: a copy of all would double what a vocabulary takes."""
    pieces = zip(*(tensor.split(max(1, LOGITS // logits.shape[1])) for tensor in (logits, labels)), strict=True)
    return sum(float(F.cross_entropy(rows.double(), right, reduction="sum")) for rows, right in pieces)


def _text_mask(inputs: Any, ids: Tensor) -> Tensor:
    """Which tokens are text and not padding, [B, T]."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()


def _next_tokens(inputs: Any, logits: Tensor) -> tuple[Float[Tensor, "N V"], Int[Tensor, " N"]]:
    """Logits, and the tokens that they predict."""
    ids = token_ids(inputs)
    assert ids is not None  # _refuse_looking_ahead has seen to it
    attended = _text_mask(inputs, ids)
    predicted = attended[:, 1:] & attended[:, :-1]
    return logits[:, :-1][predicted], ids[:, 1:][predicted].long()


def _refuse_looking_ahead(model: nn.Module, inputs: Any, logits: Any, tensors: Mapping[str, Tensor]) -> None:
    """Change the last token of a sample: in a causal language model no logits before it change.

    Raises:
        UsageError: they do, or there are none.
    """
    ids = token_ids(inputs)
    if ids is None or not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise UsageError(f"the data has no labels: top-1 needs samples (inputs, label). {_ANYTHING}")
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
