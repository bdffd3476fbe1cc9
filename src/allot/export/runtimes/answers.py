"""Whether a model that was cut, or written and opened again, answers as the one it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allot.errors import UsageError, VerificationError
from allot.network.call import attempt, write_into
from allot.network.channels import ChannelPlan, slimmed
from allot.network.trees import floats_in
from allot.run.driver import repeatable
from allot.run.problem import Candidate, Problem

TOLERANCE = 1e-4  # of the largest output: runtimes add in another order
SLIM_TOLERANCE = 1e-5  # the same, where PyTorch runs both


def off(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference over the largest wanted value; infinite where shapes differ or nothing is there to compare.

    What is infinite, or nan, in both is the same; nan where one of them has a number.
    """
    if not any(b.numel() for b in wanted) or [a.shape for a in found] != [b.shape for b in wanted]:
        return math.inf
    pairs = [(_real(a), _real(b)) for a, b in zip(found, wanted, strict=True) if b.numel()]
    same = [(a == b) | (a.isnan() & b.isnan()) for a, b in pairs]
    scale = max((float(b[b.isfinite()].abs().max()) for _, b in pairs if bool(b.isfinite().any())), default=1.0) or 1.0
    apart = [torch.where(equal, 0.0, a - b).abs().max() for equal, (a, b) in zip(same, pairs, strict=True)]
    return float(torch.stack(apart).max()) / scale  # nan in any is nan


def allowed(outputs: Sequence[Tensor], tolerance: float = TOLERANCE) -> float:
    """How far off outputs may be, as a share of the largest: half precision adds up to what it can."""
    return max(tolerance, *(8 * float(torch.finfo(t.dtype).eps) for t in outputs if t.is_floating_point()), 0.0)


def check_answers(
    what: str, found: Sequence[Tensor], wanted: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], near: float
) -> float:
    """How far off answers are, at most `near`.

    Args:
        what: what answered, and whose answers are wanted: "FILE answers otherwise than the model".
        again: what the model answers where it draws other numbers at random.
    Raises:
        UsageError: nothing is there to compare, or the model answers otherwise with other draws.
        VerificationError: they are off by more.
    """
    if not any(tensor.numel() for tensor in wanted):
        raise UsageError("the model returns no tensor with numbers in it for such inputs: there is nothing to compare.")
    if (error := off(found, wanted)) <= near:
        return error
    if not off(again(), wanted) <= near:
        raise UsageError("the model draws at random in eval mode, and what was written draws otherwise: take that out.")
    raise VerificationError(f"{what}: off by {error:.2g} of the largest.")


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double().cpu()


def check_slim(problem: Problem, candidate: Candidate) -> None:
    """Hold the smaller net to the masked one on real inputs: groups were proven on random weights.

    Raises:
        VerificationError: it answers otherwise.
    """
    inputs = problem.calibration.batch(0)[0] if problem.calibration else problem.example
    tensors = candidate.effective(problem)
    plan = ChannelPlan.of(problem.model, problem.scope.groups, candidate.channels)
    slim = slimmed(problem.model, plan).eval()
    write_into(slim, {name: plan.cut(name, value) for name, value in tensors.items()})
    answers = []
    for model, own in ((problem.model, tensors), (slim, {})):
        with repeatable(problem.model, problem.seed, "slim"):
            answers.append(floats_in(attempt(model, inputs, own)))
    wanted, found = answers
    if wanted and not any(tensor.numel() for tensor in (*wanted, *found)):
        return  # a detector that finds nothing in these samples, whole or cut
    if not (error := off(found, wanted)) <= allowed(wanted, SLIM_TOLERANCE):
        raise VerificationError(
            f"the smaller net answers otherwise than the masked one, off by {error:.2g} of the largest output: its "
            "channels hang together in a way that was not seen. Leave layers out (--exclude) until it agrees."
        )
