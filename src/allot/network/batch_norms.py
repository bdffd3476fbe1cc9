"""Batch norms whose batch is divided: over processes, or into pieces that go through the net one after another.

    mean, var    of the whole batch: counts, means and squared deviations of the parts, pooled exactly
    backward     dx = gamma / sigma ( dy - mean(dy) - xhat mean(dy xhat) ), means over the whole batch as well

so that a divided batch gives the result of the whole batch. For pieces that follow one another, the statistics are
known beforehand from a pass without gradients; dy of the other pieces is not, and means over each piece replace them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from allot.processes import all_gather, all_reduce, world_size

Statistics = tuple[Tensor, Tensor]  # mean and biased variance, both [C]
_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


class Norms(TorchFunctionMode):
    """While open, batch norms in train mode normalise by the whole batch, however it is divided.

    Args:
        statistics: of the whole batch, in the order in which batch norms run, for a piece of it; running statistics
            stay.
    Attributes:
        seen: the statistics, in that order, where none were passed.
    """

    def __init__(self, statistics: list[Statistics] | None = None) -> None:
        super().__init__()
        self.statistics, self.calls = statistics, 0
        self.seen: list[Statistics] = [] if statistics is None else statistics
        self.counts: list[float] = []  # values per channel that went into `seen`
        self.repeats = False

    def again(self) -> Norms:
        """Norms for a second run of the next modules, with the statistics of the first run."""
        other = Norms(self.statistics)
        other.seen, other.counts, other.calls, other.repeats = self.seen, self.counts, self.calls, True
        return other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        arguments = _DEFAULTS | dict(zip(_NAMES, args, strict=False)) | kwargs
        if not arguments["training"]:
            return func(*args, **kwargs)
        x, eps = arguments["input"], arguments["eps"]
        gamma, beta = arguments["weight"], arguments["bias"]
        self.calls += 1
        if self.statistics is not None:
            return _normalised(x, *_with_piece_gradient(x, *self.statistics[self.calls - 1]), gamma, beta, eps)
        if self.repeats:
            return _Whole.apply(x, *self.seen[self.calls - 1], gamma, beta, eps, self.counts[self.calls - 1])
        count, mean, deviation = pool_moments(x)
        if count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        self.seen.append((mean.to(x.device), (deviation / count).to(x.device)))
        self.counts.append(count)
        _update_running(arguments, mean, deviation / (count - 1))
        return _Whole.apply(x, mean, deviation / count, gamma, beta, eps, count)


def pool_moments(x: Tensor) -> tuple[float, Tensor, Tensor]:
    """(count, mean, squared deviations) per channel of `x` `[B, C, ...]` over the whole batch; float64 `[C]`."""
    var, mean = (part.double() for part in _moments(x.detach()))
    if world_size() == 1:
        count_here = x.numel() / x.shape[1]
        return count_here, mean, count_here * var
    moments = torch.full_like(mean, x.numel() / x.shape[1])
    parts = all_gather(torch.stack([moments, mean, moments * var]))  # [processes, 3, C]
    counts, means, deviations = parts.unbind(1)
    count = float(counts[:, 0].sum())
    mean = (counts * means).sum(0) / count
    return count, mean, (deviations + counts * (means - mean).square()).sum(0)


class _Whole(torch.autograd.Function):
    """Batch norm of a part of a batch by the statistics of the whole batch, differentiated through the statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, n: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, gamma)
        ctx.eps, ctx.count, ctx.shifted = eps, n, beta is not None
        return _normalised(x, mean, var, gamma, beta, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradients of this process; those of gamma and beta are its part of the sum."""
        (dy,) = gradients
        x, mean, var, gamma = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        dims = [d for d in range(x.dim()) if d != 1]
        inverse = (var + ctx.eps).rsqrt().to(wide).view(shape)
        xhat = (x.to(wide) - mean.to(wide).view(shape)) * inverse
        dy = dy.to(wide)
        sums_here = [dy.sum(dims, dtype=torch.float64), (dy * xhat).sum(dims, dtype=torch.float64)]
        first, second = ((part / ctx.count).to(wide).view(shape) for part in all_reduce(sums_here))
        dx = (dy - first - xhat * second) * inverse
        if gamma is not None:
            dx = dx * gamma.to(wide).view(shape)
        dgamma = sums_here[1].to(gamma.dtype) if gamma is not None else None
        return dx.to(x.dtype), None, None, dgamma, sums_here[0].to(wide) if ctx.shifted else None, None, None


def _normalised(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta, computed in float32 or wider, in the dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scale = (var + eps).rsqrt()
    scale = scale if gamma is None else scale * gamma.to(scale.dtype)
    shift = -mean * scale if beta is None else beta.to(scale.dtype) - mean * scale
    y = x.to(wide) * scale.to(wide).view(shape)
    return y.add_(shift.to(wide).view(shape)).to(x.dtype)  # in place: a whole batch of activations is large


def _with_piece_gradient(x: Tensor, mean: Tensor, var: Tensor) -> Statistics:
    """The statistics of the whole batch as values, with the gradients of this piece's statistics."""
    var_here, mean_here = _moments(x)
    return mean + (mean_here - mean_here.detach()), var + (var_here - var_here.detach())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of each channel, in float32 or wider."""
    dims = [d for d in range(x.dim()) if d != 1]
    return torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0)


def _update_running(arguments: dict[str, Any], mean: Tensor, unbiased: Tensor) -> None:
    """Update running statistics in place, as torch does."""
    with torch.no_grad():
        for name, value in (("running_mean", mean), ("running_var", unbiased)):
            running = arguments[name]
            if running is not None:
                running.mul_(1 - arguments["momentum"]).add_(arguments["momentum"] * value.to(running))
