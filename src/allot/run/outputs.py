"""How a model's outputs are read and compared: which tensors, and as logits, probabilities or plain values.

kl     outputs are distributions over classes: logits, or probabilities whose logarithms are logits
mse    outputs are values: squared error
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allot.errors import UsageError, unknown
from allot.network.trees import tensors_in
from allot.run.named import function_at

Outputs = Callable[[Any], Any]
MEASURES = ("kl", "mse")
NAMES = {"kl": "KL", "error": "relative error"}  # of distances
KINDS = {
    "logits": "logits of classes, compared by KL divergence",
    "probabilities": "probabilities of classes, compared by KL divergence",
    "values": "values, compared by squared error",
}


@dataclass(frozen=True)
class Comparison:
    """Which tensors of a model's output are compared, and how; None: seen from the dense net's outputs.

    Args:
        outputs: a function `output -> tensors` (a tensor, or a tuple, list or dict of them), or its place as text,
            "package.module:function" or "file.py:function". None: `.logits` of the output, or all its floating-point
            tensors.
        loss: "kl" or "mse". None: "kl" for one tensor of logits or probabilities, else "mse".
    Raises:
        UsageError: a value out of its range, or no such function.

    >>> Comparison().reading(torch.tensor([[0.2, 0.8], [0.5, 0.5]])).kind
    'probabilities'
    """

    outputs: str | Outputs | None = None
    loss: str | None = None

    def __post_init__(self) -> None:
        if not (self.outputs is None or isinstance(self.outputs, str) or callable(self.outputs)):
            raise UsageError(f"outputs={self.outputs!r}: a function, or package.module:function is accepted.")
        if isinstance(self.outputs, str):
            _function(self.outputs)
        if self.loss is not None and self.loss not in tuple(MEASURES):
            raise unknown("loss", str(self.loss), MEASURES)

    def over(self, other: Comparison) -> Comparison:
        """These choices, and those of `other` where there are none."""
        return Comparison(
            other.outputs if self.outputs is None else self.outputs, other.loss if self.loss is None else self.loss
        )

    def reading(self, dense_output: Any) -> Reading:
        """How outputs like this one, of the dense net for some samples, are read.

        Raises:
            UsageError: outputs that cannot be compared.
        """
        tensors = floating_tensors(dense_output, self.outputs)
        one = tensors[0] if len(tensors) == 1 else None
        loss = self.loss or ("kl" if one is not None and _may_be_classes(one) else "mse")
        if loss == "mse":
            return Reading(self.outputs, "values")
        if any(not has_classes(tensor) for tensor in tensors):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise UsageError(f"the kl loss needs logits [B, classes] of two or more classes, not {shapes}: use mse.")
        return Reading(self.outputs, "probabilities" if all(map(sums_to_one, tensors)) else "logits")

    def to_json(self) -> dict[str, Any]:
        """The choices that were made."""
        outputs = self.outputs if isinstance(self.outputs, str) else getattr(self.outputs, "__name__", None)
        return {name: value for name, value in (("outputs", outputs), ("loss", self.loss)) if value is not None}


@dataclass(frozen=True)
class Reading:
    """How outputs are read, a key of `KINDS`; logarithms stand for probabilities."""

    outputs: str | Outputs | None
    kind: str

    @property
    def loss(self) -> str:
        """The measure of the difference, one of `MEASURES`."""
        return "mse" if self.kind == "values" else "kl"

    def tensors(self, output: Any) -> list[Tensor]:
        """The tensors of an output that are compared.

        Raises:
            UsageError: outputs that cannot be compared.
        """
        tensors = floating_tensors(output, self.outputs)
        if self.kind == "probabilities":
            return [wide(tensor).clamp_min(1e-12).log() for tensor in tensors]
        return tensors


def floating_tensors(output: Any, outputs: str | Outputs | None) -> list[Tensor]:
    """The floating-point tensors of a model's output, by a function `outputs` where there is one.

    Raises:
        UsageError: no such function, one that fails, or no floating-point tensor.
    """
    if isinstance(outputs, str):
        outputs = _function(outputs)
    if callable(outputs):
        try:
            output = outputs(output)
        except Exception as error:
            raise UsageError(f"outputs failed on a model output of type {type(output).__name__}: {error!r}") from error
        return _chosen_tensors(output)
    output = getattr(output, "logits", output)
    tensors = list(tensors_in(output))
    if tensors and all(tensor.is_floating_point() for tensor in tensors):
        return tensors
    raise UsageError(  # whole numbers are what was found, like labels of boxes, whose number differs from net to net
        f"a model output, {_described(output)}, cannot be compared: give outputs, a function from it to floating-point "
        "tensors (--outputs file.py:function; for one method --set options.METHOD.outputs=package.module:function)."
    )


def _function(place: str) -> Outputs:
    """Raises:
    UsageError: no such function.
    """
    try:
        function: Outputs = function_at(place)
    except UsageError as error:
        raise UsageError(f"outputs={place!r}: {error}") from error
    return function


def classes(logits: Tensor) -> int:
    """The dimension of the classes: the last one of `[B, classes]` and `[B, T, classes]`, 1 of `[B, classes, H, W]`."""
    return 1 if logits.dim() > 3 else -1


def has_classes(tensor: Tensor) -> bool:
    """Whether there is a dimension of two or more classes."""
    return tensor.dim() >= 2 and tensor.shape[classes(tensor)] >= 2


def sums_to_one(tensor: Tensor) -> bool:
    """Whether these are probabilities of classes."""
    if not has_classes(tensor) or not tensor.numel() or not bool((tensor >= 0).all()):
        return False
    return bool(((wide(tensor).sum(classes(tensor)) - 1).abs() < 1e-2).all())


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where that is its dtype.

    >>> wide(torch.zeros(2, dtype=torch.float16)).dtype
    torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _may_be_classes(tensor: Tensor) -> bool:
    """Whether a tensor has classes whose scores are unbounded, or sum to one."""
    if not has_classes(tensor):
        return False
    within = bool(((tensor >= 0) & (tensor <= 1)).all())
    return not within or sums_to_one(tensor)


def _chosen_tensors(output: Any) -> list[Tensor]:
    """The tensors that a function chose: all that it returned has to be floating-point tensors."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return [output]
    if isinstance(output, tuple | list | Mapping) and output:
        parts = output.values() if isinstance(output, Mapping) else output
        return [tensor for part in parts for tensor in _chosen_tensors(part)]
    kind = f"{str(output.dtype)[6:]} values" if isinstance(output, Tensor) else type(output).__name__
    raise UsageError(f"outputs gave {kind}: floating-point tensors, or a tuple, list or dict of them, are accepted.")


def _described(output: Any) -> str:
    """An output in words: type, shape, and its first parts."""
    if isinstance(output, Tensor):
        return f"{str(output.dtype)[6:]} {list(output.shape)}"
    if isinstance(output, Mapping):
        return (
            f"a {type(output).__name__} of {', '.join(f'{key}: {_described(output[key])}' for key in list(output)[:4])}"
        )
    if isinstance(output, tuple | list) and output:
        return f"a {type(output).__name__} of {len(output)}, the first {_described(output[0])}"
    return f"a {type(output).__name__}"
