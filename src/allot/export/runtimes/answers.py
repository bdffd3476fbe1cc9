"""Whether a model that was cut, or written and opened again, gives the outputs of its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from allot.errors import UsageError, VerificationError

TOLERANCE = 1e-4  # of the largest output: runtimes add in another order
SLIM_TOLERANCE = 1e-5  # the same, if PyTorch runs both
PIECE = 2**22  # numbers compared at a time: a text has a logit for every word of the vocabulary at every place


def off(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference over the largest wanted value; infinite if shapes differ or there is nothing to compare.

    Infinity equals infinity, and nan equals nan; the result is nan if nan stands against a number.

    >>> off([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 2.0])])
    0.5
    """
    if not any(b.numel() for b in wanted) or [a.shape for a in outputs] != [b.shape for b in wanted]:
        return math.inf
    scale, largest = 0.0, []
    for output, target in zip(outputs, wanted, strict=True):
        for a, b in zip(_pieces(output), _pieces(target), strict=True):
            if bool(b.isfinite().any()):
                scale = max(scale, float(b[b.isfinite()].abs().max()))
            largest.append(torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs().max())
    return float(torch.stack(largest).max()) / (scale or 1.0)  # nan in any is nan


def allowed(outputs: Sequence[Tensor], tolerance: float = TOLERANCE) -> float:
    """Largest allowed difference of outputs, as a share of the largest output; more in half precision."""
    return max(tolerance, *(8 * float(torch.finfo(t.dtype).eps) for t in outputs if t.is_floating_point()), 0.0)


def check_answers(
    problem: str,
    outputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    again: Callable[[], Sequence[Tensor]],
    tolerance: float,
) -> float:
    """The difference of outputs, at most `tolerance`.

    Args:
        problem: the error in words, like "FILE answers otherwise than the model".
        again: outputs of the model with other random draws.
    Raises:
        UsageError: there is nothing to compare, or the outputs of the model depend on random draws.
        VerificationError: the difference is larger.
    """
    if not any(tensor.numel() for tensor in wanted):
        raise UsageError("the model returns no tensor with numbers in it for such inputs: there is nothing to compare.")
    if (error := off(outputs, wanted)) <= tolerance:
        return error
    if not off(again(), wanted) <= tolerance:
        raise UsageError("the model draws at random in eval mode, and what was written draws otherwise: take that out.")
    raise VerificationError(f"{problem}: off by {error:.2g} of the largest.")


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor in float64 on the CPU, `PIECE` at a time."""
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return (piece.double().cpu() for piece in real.flatten().split(PIECE) if piece.numel())
