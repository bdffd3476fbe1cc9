"""Zeros kept in a model that the Trainer of Hugging Face fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from allot.integrations.held_zeros import HeldZeros
from allot.run.named import optional

_transformers = optional("transformers", "transformers", "hf")


class KeepZeros(_transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """A callback: pruned weights stay zero while `Trainer` trains, and its log shows the `sparsity`.

    Classes and keys stay plain, so that checkpoints open without allot, and `load_best_model_at_end` works. Not for
    parameters that are divided over processes (FSDP, ZeRO-3): there is no whole weight to mask.

    Args:
        model: the model that is given to `Trainer`.
        masks: parameter name -> bool mask, like `result.masks`. None: as `HeldZeros`.
    Raises:
        UsageError: transformers is not installed; or as `HeldZeros`.

    >>> from allot import prune
    >>> result = prune(nn.Linear(4, 4), None, "sparsity=0.5", repair="none")
    >>> KeepZeros(result.model()).zeros.sparsity
    0.5
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        self.zeros = HeldZeros(model, masks)

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Set the zeros and mask gradients."""
        self.zeros.hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Set the zeros again."""
        self.zeros.apply()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """Put the sparsity into the log, and into `state.log_history`."""
        if logs is not None:
            logs["sparsity"] = self.zeros.sparsity
            if state.log_history:
                state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Set the zeros in the weights that come out, and leave gradients alone again."""
        self.zeros.apply()
        self.zeros.release()
