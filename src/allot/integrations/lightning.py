"""Zeros kept in a model that the Trainer of Lightning fine-tunes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from allot.errors import UsageError, with_cause
from allot.integrations.held_zeros import HeldZeros


def _callback() -> Any:
    """The class `Callback` of lightning, or of pytorch_lightning, its name of before.

    Raises:
        UsageError: neither is installed, or cannot be imported.
    """
    reasons = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except Exception as error:  # noqa: BLE001 - a broken installation raises anything
            reasons.append(with_cause(error))
    raise UsageError(f"lightning cannot be imported: pip install lightning. ({reasons[0]})")


class KeepZeros(_callback()):  # type: ignore[misc]
    """A callback: pruned weights stay zero while `Trainer` fits, and `sparsity` is logged once an epoch.

    Classes and keys stay plain, so that checkpoints open without allot. Not for parameters that are divided over
    processes (FSDP): there is no whole weight to mask.

    Args:
        model: the module that was pruned: the LightningModule, or a module that it holds.
        masks: parameter name in `model` -> bool mask, like `result.masks`. None: as `HeldZeros`.
    Raises:
        UsageError: lightning is not installed; or as `HeldZeros`.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.zeros = HeldZeros(model, masks)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the zeros and mask gradients."""
        self.zeros.hold()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the zeros again: a checkpoint may have been loaded."""
        self.zeros.apply()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Set the zeros again."""
        self.zeros.apply()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the sparsity."""
        pl_module.log("sparsity", self.zeros.sparsity)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave gradients alone again."""
        self.zeros.release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave gradients alone again."""
        self.zeros.release()
