"""Fidelity: how close the outputs of a sparse net come to those of the dense net, on inputs that no method sees.

    kl        KL( softmax(z_dense) || softmax(z) ),   mean over positions       outputs are classes
    error     |y - y_dense|^2 / |y_dense - mean|^2,   mean over outputs         others; 1: no better than a constant

by sample, so that two nets are compared sample by sample: with d_i the difference of sample i, net B is worse than
net A where mean(d) is above its standard error, sd(d) / sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from allot.errors import UsageError, first_line
from allot.network.call import call
from allot.network.draws import seeded
from allot.processes import single_process
from allot.run.calibration import Calibration
from allot.run.outputs import NAMES, Comparison, Reading, classes, sums_to_one, wide

KEPT = 64 * 2**20  # bytes of the dense net's outputs that are always kept; more where the net itself is larger
NUMBERS = 2**24  # most numbers in the outputs of one pass


@dataclass(frozen=True)
class Fidelity:
    """The distance of a net's outputs from the dense net's.

    Attributes:
        kind: "kl" or "error".
        values: of each sample; infinite where outputs are not finite.
        agreement: share of samples, or of their positions, with the same top class; None where there are no classes.
    """

    kind: str
    values: Float[Tensor, " samples"]
    agreement: float | None

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def is_worse_than(self, other: Fidelity) -> bool:
        """Whether the mean is above that of `other` by more than the standard error of the difference.

        Of a single sample, which has no standard error: whether the distance is more than twice that of `other`.

        >>> near, far = (Fidelity("kl", torch.tensor(values), None) for values in ([0.1, 0.2], [0.3, 0.5]))
        >>> far.is_worse_than(near), near.is_worse_than(far), near.is_worse_than(near)
        (True, False, False)
        """
        if not bool(torch.isfinite(self.values).all()):
            return bool(torch.isfinite(other.values).all())
        if not bool(torch.isfinite(other.values).all()):
            return False
        difference = self.values - other.values
        if len(difference) == 1:
            return float(difference) > float(other.values)
        return float(difference.mean()) > float(difference.std()) / math.sqrt(len(difference))

    def change(self, before: Fidelity) -> str:
        """In words: what the distance was, and what it is.

        >>> Fidelity("kl", torch.tensor([0.3]), 0.5).change(Fidelity("kl", torch.tensor([0.02]), 1.0))
        'KL 0.02 -> 0.3'
        """
        return f"{NAMES[self.kind]} {before.mean:.3g} -> {self.mean:.3g}"

    def to_json(self) -> dict[str, float | None]:
        """`{kl | error, agreement}`; null for a distance that is not finite."""
        mean = self.mean
        agreement = {} if self.agreement is None else {"agreement": self.agreement}
        return {self.kind: mean if math.isfinite(mean) else None, **agreement}


class Watch:
    """The watch set: calibration inputs on which nets are compared with the dense net, and which serve nothing else.

    Args:
        model: the dense net.
        inputs: the samples that are watched.
        comparison: how outputs are compared.
    """

    def __init__(self, model: nn.Module, inputs: Calibration, comparison: Comparison) -> None:
        self.model, self.inputs, self.comparison = model, inputs, comparison

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def reading(self) -> Reading | None:
        """How outputs are read, as seen from the dense net's; None where they cannot be compared."""
        return self._dense.reading if isinstance(self._dense, _DenseAnswers) else None

    @property
    def kind(self) -> str:
        """A key of `KINDS`: what the model's outputs are compared as; empty where they cannot be compared."""
        return self.reading.kind if self.reading else ""

    @property
    def reason(self) -> str:
        """Why outputs cannot be compared; empty where they can."""
        return self._dense if isinstance(self._dense, str) else ""

    @property
    def images(self) -> int:
        """Samples that a measurement pushes forward."""
        return len(self) * (1 if isinstance(self._dense, _DenseAnswers) and self._dense.kept else 2)

    def dense_outputs(self) -> list[Tensor]:
        """What the dense net answers to the first samples, as it is compared; empty where that cannot be."""
        dense = self._dense
        if isinstance(dense, str):
            return []
        return dense.kept[0] if dense.kept else self._read(dense.reading, {}, dense.batches[0])

    def fidelity(self, tensors: Mapping[str, Tensor]) -> Fidelity | None:
        """The fidelity of the net with `tensors` in place; None where outputs cannot be compared."""
        dense = self._dense
        if isinstance(dense, str):
            return None
        distances, agreements = [], []
        for number, places in enumerate(dense.batches):
            theirs = dense.kept[number] if dense.kept else self._read(dense.reading, {}, places)
            ours = self._read(dense.reading, tensors, places)
            if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
                return None
            pairs = list(zip(ours, theirs, strict=True))
            parts = [distance(*pair, scale) for pair, scale in zip(pairs, dense.scales, strict=True)]
            distances.append(torch.stack(parts).mean(0).cpu())
            agreements += [_agreement(*pairs[i]).cpu() for i in dense.of_classes]
        agreement = float(torch.cat(agreements).mean()) if agreements else None
        kind = "kl" if dense.reading.loss == "kl" else "error"
        return Fidelity(kind, torch.cat(distances), agreement)

    def _read(self, reading: Reading, tensors: Mapping[str, Tensor], places: Sequence[int]) -> list[Tensor]:
        return reading.tensors(self._outputs(tensors, places))

    def _outputs(self, tensors: Mapping[str, Tensor], places: Sequence[int]) -> Any:
        with torch.no_grad(), single_process(), seeded(self.inputs.seed, [self.inputs.device]):  # a net may draw
            return call(self.model, tensors, self.inputs.pick(places))

    @cached_property
    def _dense(self) -> _DenseAnswers | str:
        """What the dense net answers, or why its outputs cannot be compared."""
        try:
            first = min(8, len(self))
            outputs = self._outputs({}, range(first))
            reading = self.comparison.reading(outputs)
            numbers = sum(tensor.numel() for tensor in reading.tensors(outputs)) // first
            size = max(1, min(self.inputs.batch_size, NUMBERS // max(numbers, 1)))
            batches = [list(range(start, min(start + size, len(self)))) for start in range(0, len(self), size)]
            room = max(KEPT, sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers())))
            return _DenseAnswers.of(reading, batches, lambda places: self._read(reading, {}, places), room)
        except UsageError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - a model may not run several samples at once; pruning may go on
            return f"the model does not run on these samples: {first_line(error)}"


@dataclass(frozen=True)
class _DenseAnswers:
    """The dense net's answers on the watch set.

    Attributes:
        batches: the samples that are pushed together.
        kept: outputs of each batch; None where they are too large.
        scales: of each output, its squared deviation from the mean a sample; None for classes.
        of_classes: which outputs are classes.
    """

    reading: Reading
    batches: list[list[int]]
    kept: list[list[Tensor]] | None
    scales: list[Tensor | None]
    of_classes: list[int]

    @classmethod
    def of(
        cls, reading: Reading, batches: list[list[int]], answer: Callable[[list[int]], list[Tensor]], room: int
    ) -> _DenseAnswers:
        """What `answer` gives to each batch; all outputs are kept, or none where they take more than `room` bytes.

        Raises:
            UsageError: outputs whose shapes depend on the sample, or that do not count samples.
        """
        kept: list[list[Tensor]] | None = []
        shapes, size, seen, samples = None, 0, 0, sum(map(len, batches))
        sums: list[Tensor] = []
        squares: list[Tensor] = []
        of_classes: list[int] = []
        for places in batches:
            outputs = answer(places)
            seen += len(places)
            if any(tensor.dim() == 0 or len(tensor) != len(places) for tensor in outputs):
                raise UsageError("the first dimension of the model's outputs does not count samples: give --outputs.")
            shapes = shapes or [tensor.shape[1:] for tensor in outputs]
            if shapes != [tensor.shape[1:] for tensor in outputs]:
                raise UsageError("the shapes of the model's outputs depend on the sample: give --outputs.")
            size += sum(tensor.numel() * tensor.element_size() for tensor in outputs)
            if size * samples > room * seen:  # as many bytes as all samples will have
                kept = None
            kept = None if kept is None else [*kept, outputs]
            if reading.loss == "kl":
                of_classes = list(range(len(outputs)))
                continue
            parts = [tensor.double() for tensor in outputs]
            sums = [y.sum(0) + (sums[i] if sums else 0) for i, y in enumerate(parts)]
            squares = [y.square().sum() + (squares[i] if squares else 0) for i, y in enumerate(parts)]
            probable = [i for i, tensor in enumerate(outputs) if sums_to_one(tensor)]
            of_classes = probable if places[0] == 0 else [i for i in of_classes if i in probable]
        if reading.loss == "kl":
            return cls(reading, batches, kept, [None] * len(of_classes), of_classes)
        scales: list[Tensor | None] = [
            spread(total, square, samples) for total, square in zip(sums, squares, strict=True)
        ]
        return cls(reading, batches, kept, scales, of_classes)


def spread(total: Tensor, squares: Tensor, samples: int) -> Tensor:
    """The squared deviation from the mean, a sample; the square where all samples are alike, 1 where all are 0."""
    deviation = squares / samples - (total / samples).square().sum()
    if float(deviation) > 1e-9 * float(squares):
        return deviation
    return squares / samples if float(squares) else torch.ones_like(squares)


def distance(ours: Tensor, theirs: Tensor, scale: Tensor | None) -> Float[Tensor, " samples"]:
    """The distance of each sample, see the top of this file; infinite where an output is not finite."""
    if scale is None:
        dim = classes(theirs)
        ours, theirs = (wide(tensor).log_softmax(dim) for tensor in (ours, theirs))
        rows = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim)  # [samples, ...]
        values = (rows.flatten(1).mean(1) if rows.dim() > 1 else rows).double().clamp_min(0)  # rounding may go below
    else:
        values = (ours.double() - theirs.double()).square().reshape(len(ours), -1).sum(1) / scale
    return values.where(torch.isfinite(values), math.inf)


def _agreement(ours: Tensor, theirs: Tensor) -> Float[Tensor, " samples"]:
    """Of each sample, the share of its positions with the same top class."""
    dim = classes(theirs)
    same = (ours.argmax(dim) == theirs.argmax(dim)).double()  # [samples, ...]
    return same.flatten(1).mean(1) if same.dim() > 1 else same
