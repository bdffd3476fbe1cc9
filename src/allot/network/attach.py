"""Masks in the user's own training loop: `attach` and `fold`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from allot.errors import UsageError, unknown
from allot.network.applied_masks import masked
from allot.network.arguments import typed
from allot.network.call import refuse_two_values
from allot.network.layers import Place, places_by_parameter


class Mask(nn.Module):
    """A parametrization: weight -> weight with zeros where the persistent buffer `mask` is False."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool().clone())
        self.mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight; gradients reach kept weights only."""
        return masked(weight, self.mask)


@typed
def attach(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """`model` itself, which computes with masked weights from now on: train it, save it, then `fold` it.

    Args:
        masks: parameter name -> bool mask of its shape. A tied weight goes by one of its names.
    Raises:
        UsageError: a name that the model does not have, a shape that differs, two masks for one tied weight, or a
            weight that carries a mask or another parametrization already.

    >>> model = attach(nn.Linear(2, 1), {"weight": Tensor([[1, 0]]).bool()})
    >>> model.weight[0, 1].item()
    0.0
    """
    for name, places in weights_to_mask(model, masks).items():
        by_module = {id(place.module): place for place in places}  # a shared module is one module
        for place in by_module.values():
            mask = Mask(masks[name].to(place.parameter.device))
            parametrize.register_parametrization(place.module, place.attribute, mask)
    return model


def weights_to_mask(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, list[Place]]:
    """The name of each mask -> the places that hold its weight.

    Raises:
        UsageError: as `attach`.
    """
    by_name = {place.name: places for places in places_by_parameter(model).values() for place in places}
    for name, mask in masks.items():
        if name not in by_name:
            raise _parametrized_error(model, name) or unknown("parameter", name, by_name)
        shape = by_name[name][0].parameter.shape
        if mask.shape != shape:
            raise UsageError(f"the mask of {name} has shape {list(mask.shape)}; the weight has {list(shape)}.")
    refuse_two_values(masks, {name: id(by_name[name]) for name in masks})
    return {name: by_name[name] for name in masks}


@typed
def fold(model: nn.Module) -> nn.Module:
    """`model` itself, with the zeros of attached masks in plain weights, plain classes and plain keys.

    Other parametrizations stay.

    >>> model = attach(nn.Linear(2, 1), {"weight": Tensor([[1, 0]]).bool()})
    >>> list(fold(model).state_dict()), model.weight[0, 1].item()
    (['bias', 'weight'], 0.0)
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # torch removes a property from the class, which copies of the module share: a new class leaves copies alone
            original = type(module)
            module.__class__ = type(original.__name__, original.__bases__, dict(original.__dict__))
            for attribute, chain in list(module.parametrizations.items()):  # type: ignore[union-attr,operator]
                if all(isinstance(part, Mask) for part in chain):
                    parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    return model


def _parametrized_error(model: nn.Module, name: str) -> UsageError | None:
    """The error for a parametrized weight of this name; None where no weight of this name is parametrized."""
    module_name, _, attribute = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(module_name)
    if module is None or not parametrize.is_parametrized(module, attribute):
        return None
    if all(isinstance(part, Mask) for part in module.parametrizations[attribute]):
        return UsageError(f"{name} carries a mask already: fold the model first.")
    return UsageError(f"{name} is parametrized: remove the parametrization first.")
