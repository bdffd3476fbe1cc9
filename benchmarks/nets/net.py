"""A trained net as the benchmarks see it: the model, inputs that pruning may use, and a score on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64


@dataclass(frozen=True)
class Net:
    """A trained net with its data.

    Attributes:
        name: in tables.
        model: eval mode, float32, CPU.
        calibration: inputs that pruning may use, `[N, ...]`.
        measure: scores of a model on the held-out inputs by name; the dense model is compared with itself.
        metrics: what the names mean, in the order of the table; the first one decides.
        rules: keyword arguments of `allot.Rules`.
    """

    name: str
    model: nn.Module
    calibration: Tensor
    measure: Callable[[nn.Module], dict[str, float]]
    metrics: Mapping[str, str]
    rules: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Tensor, size: int = BATCH) -> tuple[Tensor, ...]:
    """The model's outputs for all inputs, each `[N, ...]`; in eval mode, the mode before is set again."""
    training = model.training
    model.eval()
    batches = [model(part) for part in inputs.split(size)]
    model.train(training)
    if isinstance(batches[0], Tensor):
        return (torch.cat(batches),)
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def agreement(logits: Tensor, dense: Tensor) -> dict[str, float]:
    """Percent of rows whose highest entry is that of the dense net, and the mean KL(dense || sparse) in nats.

    >>> rows = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    >>> agreement(rows, rows)
    {'agreement': 100.0, 'kl': 0.0}
    """
    same = (logits.argmax(1) == dense.argmax(1)).double().mean()
    kl = F.kl_div(logits.double().log_softmax(1), dense.double().log_softmax(1), log_target=True, reduction="batchmean")
    return {"agreement": 100 * float(same), "kl": float(kl)}
