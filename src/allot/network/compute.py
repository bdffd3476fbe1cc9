"""How a model is run in training: choices about memory and speed that change results little or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from allot.budget.units import memory
from allot.errors import UsageError, check_flag, check_number, first_line, unknown
from allot.network.layers import is_batch_norm

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
CACHED = 64 * 2**20  # bytes of the dense net's outputs


@dataclass(frozen=True)
class Compute:
    """Choices about memory and speed, for training against the dense model; scores and evaluation ignore them.

    Args:
        micro_batch: most samples at a time whose activations are kept for gradients; 0: the whole batch. Gradients
            add up to those of the whole batch; of nets with batch norm see `allot.network.batch_norms`.
        amp: "bf16" or "fp16": the model computes in this precision where autocast says so; weights, gradients of
            weights, optimiser and statistics stay as they are. "": none. The loss of fp16 is scaled, see
            `Distance.loss_of`.
        channels_last: whether calibration inputs `[B, C, H, W]` are laid out with channels last, which convolutions
            then pass on.
        compile: whether the model is compiled by `torch.compile` as it runs; it is left as it was.
        checkpoint: whether activations inside the model's repeated blocks are computed again for the gradients instead
            of being kept: the same numbers, about a third more time.
        cached: most bytes of the dense model's outputs that are kept, as a number or like "256MB": on the CPU, and in
            the saved state of a run. Outputs that need more are computed again in every pass over the samples.
    Raises:
        UsageError: a value out of its range.

    >>> Compute(micro_batch=4).pieces(10), Compute(micro_batch=4).to_json()
    ([(0, 3), (3, 6), (6, 10)], {'micro_batch': 4})
    """

    micro_batch: int = 0
    amp: str = ""
    channels_last: bool = False
    compile: bool = False
    checkpoint: bool = False
    cached: int = CACHED

    def __post_init__(self) -> None:
        check_number("micro_batch", self.micro_batch, 0, whole=True)
        amp: object = self.amp
        if amp is None or amp is False:  # what YAML makes of `amp:` and of `amp: no`
            object.__setattr__(self, "amp", "")
        elif amp != "" and (not isinstance(amp, str) or amp not in PRECISIONS):
            raise unknown("amp", str(amp), PRECISIONS)
        for name in ("channels_last", "compile", "checkpoint"):
            check_flag(name, getattr(self, name))
        if self.compile and self.checkpoint:
            raise UsageError("compile and checkpoint: one of them is accepted; a compiled model decides by itself.")
        if isinstance(self.cached, str):
            object.__setattr__(self, "cached", memory("cached", self.cached))
        check_number("cached", self.cached, 0, whole=True)

    @classmethod
    def of(cls, given: Compute | Mapping[str, Any] | None) -> Compute:
        """The choices, from a mapping of those that differ from the defaults.

        Raises:
            UsageError: an unknown choice, or a value out of its range.
        """
        if isinstance(given, Compute):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise UsageError(f"compute={given!r}: a Compute or a mapping like {{micro_batch: 8}} is accepted.")
        names = [field.name for field in fields(cls)]
        for name in given or {}:
            if name not in names:
                raise unknown("choice in compute", str(name), names)
        return cls(**(given or {}))

    def to_json(self) -> dict[str, Any]:
        """The choices that differ from the defaults."""
        defaults = Compute()
        return {name: value for name, value in asdict(self).items() if value != getattr(defaults, name)}

    def identity(self) -> dict[str, Any]:
        """The choices that change results by more than rounding: a resumed run has to keep them."""
        return {name: value for name, value in self.to_json().items() if name in ("micro_batch", "amp")}

    @property
    def lean(self) -> bool:
        """Whether masks are applied inside the call, which saves memory and costs time (`network.applied_masks`)."""
        return (self.checkpoint or bool(self.micro_batch)) and not self.compile

    def pieces(self, samples: int) -> list[tuple[int, int]]:
        """(first, last + 1) of each micro-batch of a batch of `samples`; their sizes differ by one at most."""
        count = -(-samples // self.micro_batch) if self.micro_batch else 1
        return [(samples * i // count, samples * (i + 1) // count) for i in range(count)]

    @contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """While open, the model computes as `amp` says."""
        if not self.amp:
            yield
            return
        with torch.autocast(device.type, PRECISIONS[self.amp]):
            yield

    def check(self, model: nn.Module) -> None:
        """Raises:
        UsageError: the batches of the model cannot be split (`check_divisible`); the model's device cannot
            compute as `amp` says, or the model has no weights in float32; or it has
            batch norms, whose statistics in pieces are not compiled.
        """
        if self.compile and self.micro_batch and any(is_batch_norm(m) for m in model.modules()):
            raise UsageError("compile and micro_batch: one of them is accepted for a model with batch norm.")
        if self.micro_batch:
            check_divisible(model)
        if not self.amp:
            return
        reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        if reference.dtype != torch.float32:
            raise UsageError(f"amp={self.amp}: the model computes in {str(reference.dtype)[6:]}; of float32 only.")
        device = reference.device
        problem = None
        if device.type == "cuda" and self.amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            problem = "it has no bfloat16"
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), self.precision(device):
                weight = torch.ones(4, 4, device=device, requires_grad=True)
                nn.functional.linear(torch.ones(4, 4, device=device), weight).float().sum().backward()
        except (RuntimeError, TypeError) as error:
            problem = first_line(error)
        if problem:
            raise UsageError(f"amp={self.amp} cannot be computed on {device} here ({problem}): leave it out.")


def check_divisible(model: nn.Module) -> None:
    """Raises:
    UsageError: the model's answers depend on which samples are together even in eval mode, or a SyncBatchNorm.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise UsageError(f"{name} is a SyncBatchNorm: use a BatchNorm, whose statistics are pooled here as well.")
        if is_batch_norm(module) and module.running_mean is None:
            raise UsageError(
                f"{name} is a batch norm without running statistics: what the model answers depends on which samples "
                "are together, and its batches cannot be parted (micro_batch, several processes)."
            )
