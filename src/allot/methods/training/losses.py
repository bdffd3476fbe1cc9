"""How far the sparse net's outputs are from the dense net's.

    kl    T^2 KL( softmax(z_dense / T) || softmax(z / T_s) ),  mean over everything but the classes
    mse   mean (z - z_dense)^2 / mean z_dense^2

T_s is T unless it is given: with T_s below T the optimum is z = z_dense T_s / T, the same answers with less confidence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from allot.errors import UsageError
from allot.processes import all_reduce_number, world_size
from allot.run.outputs import classes, wide


def compared(
    student: list[Tensor], teacher: list[Tensor], loss: str, T: float, T_s: float, wholes: list[float] | None = None
) -> Float[Tensor, ""]:
    """Sum of the losses of pairs of tensors, in float32 or better.

    Args:
        loss: a key of `LOSSES`.
        wholes: of a part of a batch, the sum of the sizes (`size`) of all parts, tensor by tensor: the losses of all
            parts then add up to that of the whole batch.
    Raises:
        UsageError: the tensors of one net have no counterpart of their shape in those of the other.
    """
    ours, theirs = ([list(tensor.shape) for tensor in tensors] for tensors in (student, teacher))
    if ours != theirs:
        raise UsageError(
            f"the sparse net gives outputs of shapes {ours}, the dense one {theirs}: shapes that do not depend on what "
            "is found are compared, like scores and boxes before the best of them are picked (outputs=)."
        )
    sizes: list[float | None] = [*wholes] if wholes else [None] * len(teacher)
    losses = [
        LOSSES[loss](ours, theirs, T, T_s, whole) for ours, theirs, whole in zip(student, teacher, sizes, strict=True)
    ]
    return torch.stack(losses).sum()


def size(teacher: Tensor, loss: str) -> float:
    """The divisor of the loss of a part of a batch: the number of its rows, or its summed squares."""
    if loss == "kl":
        return teacher.numel() / teacher.shape[classes(teacher)]
    theirs = wide(teacher)
    scale = float(theirs.abs().amax().clamp_min(1e-30))
    return float((theirs / scale).square().mean().double() * scale**2 * teacher.numel())


def whole_of(teacher: Tensor) -> float | None:
    """The `size` of the batch of which `teacher` is this process's share; None where it is the whole batch."""
    return None if world_size() == 1 else all_reduce_number(size(teacher, "mse"))


def relative_error(
    student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"], whole: float | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference over the mean square of `teacher`, which counts as at least 1e-12.

    Args:
        whole: of a part of a batch, the summed squares of all parts.
    """
    theirs = wide(teacher)
    scale = theirs.abs().amax().clamp_min(1e-6)  # squares of large outputs are beyond float32
    if whole is not None:
        over = max(whole, 1e-12 * theirs.numel()) / float(scale.double().square())
        return ((wide(student) - theirs) / scale).square().sum() / over
    least = float(1e-12 / scale.double().square())
    return ((wide(student) - theirs) / scale).square().mean() / (theirs / scale).square().mean().clamp_min(least)


def _kl(student: Tensor, teacher: Tensor, T: float, T_s: float, whole: float | None = None) -> Tensor:
    dim = classes(student)
    theirs = (wide(teacher) / T).log_softmax(dim)
    ours = (wide(student) / T_s).log_softmax(dim)
    rows = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim)
    return T**2 * (rows.mean() if whole is None else rows.sum() / whole)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": _kl,
    "mse": lambda student, teacher, T, T_s, whole=None: relative_error(student, teacher, whole),
}
