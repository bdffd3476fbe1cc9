"""Zeros that stay while a model is trained by a loop that is not ours, in a model that stays as it is.

    g  <-  g * m    of every gradient, before clipping and before the optimiser sees it
    w  <-  w * m    after every step

so that each step is that of `allot.attach`, while classes and keys stay plain: a checkpoint that is written on the way
opens without allot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from allot.errors import UsageError
from allot.network.applied_masks import masked
from allot.network.arguments import typed
from allot.network.attach import weights_to_mask
from allot.network.layers import Scope

logger = logging.getLogger("allot")


class HeldZeros:
    """The zeros of a model's weights, held between `hold` and `release`.

    Args:
        model: the model that is trained, or the part of it that was pruned.
        masks: parameter name -> bool mask, like `result.masks`. None: the zeros that weights hold now,
            but for weights that are wholly zero, like a new head.
    Raises:
        UsageError: a name that the model does not have, a shape that differs, or no zeros to keep.

    >>> model = nn.Linear(2, 1)
    >>> zeros = HeldZeros(model, {"weight": torch.tensor([[True, False]])})
    >>> zeros.hold()
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> model.weight.grad.tolist(), zeros.sparsity
    ([[1.0, 0.0]], 0.5)
    """

    @typed
    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.masks = dict(zeros_of(model) if masks is None else masks)
        self._weights = {name: places[0].parameter for name, places in weights_to_mask(model, self.masks).items()}
        self._handles: list[RemovableHandle] = []

    def hold(self) -> None:
        """Set the zeros, and mask gradients from now on; call it when the model is on its device."""
        self.release()
        for name, weight in self._weights.items():
            mask = self.masks[name] = self.masks[name].bool().to(weight.device)
            if weight.requires_grad:
                self._handles.append(weight.register_hook(lambda gradient, mask=mask: masked(gradient, mask)))
        self.apply()

    def apply(self) -> None:
        """Set the zeros again: after a step of the optimiser, or after weights were loaded."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(masked(weight, self.masks[name]))

    def release(self) -> None:
        """Leave gradients alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights that are held."""
        nonzero = sum(int(torch.count_nonzero(weight)) for weight in self._weights.values())
        return 1 - nonzero / sum(weight.numel() for weight in self._weights.values())


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> mask of the entries that are not zero, of every weight that could be pruned and holds a zero.

    A weight that is wholly zero has no mask, and a warning names it: a new head may begin with zeros.

    Raises:
        UsageError: there is none.

    >>> with torch.no_grad():
    ...     layer = nn.Linear(2, 1)
    ...     _ = layer.weight[0, 1].zero_()
    >>> zeros_of(layer)["weight"].tolist()
    [[True, False]]
    """
    names = [layer.name for layer in Scope.of(model).layers]
    kept = {name: model.get_parameter(name).detach() != 0 for name in names}
    empty = [name for name, mask in kept.items() if not bool(mask.any())]
    if empty:
        logger.warning(
            "%s: every weight is zero, so these train without a mask; masks=result.masks keeps their zeros",
            ", ".join(empty),
        )
    masks = {name: mask for name, mask in kept.items() if name not in empty and not bool(mask.all())}
    if not masks:
        raise UsageError("the model's weights hold no zeros to keep: give result.model(), or masks=result.masks.")
    return masks
