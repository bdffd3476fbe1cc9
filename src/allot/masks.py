"""How masks meet modules: `call` for methods, `attach` and `fold` for users who train in their own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from allot.compute import Compute
from allot.errors import UsageError, unknown
from allot.layers import places_of
from allot.masking import Masking, masked
from allot.norms import Norms
from allot.recompute import checkpointed
from allot.shares import processes


def call(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Any,
    *,
    training: Callable[[nn.Module], bool] | None = None,
    norms: Norms | None = None,
    compute: Compute | None = None,
    masking: Masking | None = None,
    then: Callable[[Any], Any] | None = None,
) -> Any:
    """What `model` gives for `inputs` with `tensors` in place of its own; the model is left as it was.

    Args:
        tensors: parameter or buffer name -> value; what is not named stays the model's own. A tied weight goes by
            one of its names. Buffers that the forward pass updates are updated in the tensors passed in.
        inputs: a tuple is spread over positional arguments, a dict over keywords, anything else is one argument.
        training: which modules run in train mode; None: none of them.
        norms: how batch norms in train mode find the statistics of their batch; by torch, or by all processes' shares
            of it where None.
        compute: precision, compiling and checkpointing; none of them where None.
        masking: how some of the tensors are masked where the model uses them; not for compiled models.
        then: applied to the output while tensors and modes are still in place; what it returns is returned. Gradients
            belong here: activation checkpointing runs parts of the model again when they are taken.
    Raises:
        UsageError: a name that the model does not have, a shape other than the model's, or two values for one
            tied weight.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in own:
            raise unknown("tensor", name, own)
        if tensor.shape != own[name].shape:
            raise UsageError(f"{name} has shape {list(tensor.shape)}; the model has {list(own[name].shape)}.")
    _refuse_two_values(tensors, {name: id(own[name]) for name in tensors})
    args, kwargs = as_arguments(inputs)
    placed = {f"model.{name}": tensor for name, tensor in _placed(model, tensors, own).items()}
    norms = norms or (Norms() if training and processes() > 1 else None)
    compute = compute or Compute()
    if norms and compute.compile:
        compute = replace(compute, compile=False)  # what stands in for batch norms keeps a count, outside of any graph
    again = checkpointed(model, norms, masking) if compute.checkpoint else nullcontext()
    with modes(model, training or (lambda module: False)), norms or nullcontext(), again:
        return torch.func.functional_call(_Then(model, then, compute, masking), placed, args, kwargs, tie_weights=False)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for one batch of inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


@contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Each module in train mode where `training(module)`, else in eval mode; restored on leaving."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training(module)
        yield
    finally:
        for module, mode in before:
            module.training = mode


class _Then(nn.Module):
    """`then` of what `model` gives."""

    def __init__(
        self, model: nn.Module, then: Callable[[Any], Any] | None, compute: Compute, masking: Masking | None
    ) -> None:
        super().__init__()
        self.model, self.then, self.compute, self.masking = model, then, compute, masking

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        with self.compute.precision(device), self.masking or nullcontext():
            run = partial(_compiled, self.model) if self.compute.compile else self.model
            output = run(*args, **kwargs)
        return output if self.then is None else self.then(output)


def _compiled(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `model` gives, compiled; a function is compiled and not the module, which would be marked by it."""
    from torch._dynamo.exc import TorchDynamoException  # seconds, for those who compile

    try:
        return _compile()(model, *args, **kwargs)
    except TorchDynamoException as error:
        raise UsageError(
            f"compile: this model cannot be compiled here: {str(error).strip().splitlines()[0]}"
        ) from error


@cache
def _compile() -> Callable[..., Any]:
    return torch.compile(lambda model, *args, **kwargs: model(*args, **kwargs))


def write_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the parameters and buffers of these names these values, in place; other names are passed over."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])


class Mask(nn.Module):
    """A parametrization: weight -> weight with zeros where the persistent buffer `mask` is False."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool().clone())
        self.mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight; gradients reach kept weights only."""
        return masked(weight, self.mask)


def attach(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """`model` itself, computing with masked weights from now on: train it, save it, then `fold` it.

    Args:
        masks: parameter name -> bool mask of its shape. A tied weight goes by one of its names.
    Raises:
        UsageError: a name that the model does not have, a shape that differs, two masks for one tied weight, or a
            weight that carries a mask or another parametrization already.
    """
    by_name = {place.name: where for where in places_of(model).values() for place in where}
    for name, mask in masks.items():
        if name not in by_name:
            raise _parametrized(model, name) or unknown("parameter", name, by_name)
        shape = by_name[name][0].parameter.shape
        if mask.shape != shape:
            raise UsageError(f"the mask of {name} has shape {list(mask.shape)}; the weight has {list(shape)}.")
    _refuse_two_values(masks, {name: id(by_name[name]) for name in masks})
    for name, mask in masks.items():
        once = {id(place.module): place for place in by_name[name]}  # a shared module is one module
        for place in once.values():
            attached = Mask(mask.to(place.parameter.device))
            parametrize.register_parametrization(place.module, place.attribute, attached)
    return model


def fold(model: nn.Module) -> nn.Module:
    """`model` itself, with the zeros of attached masks in plain weights, plain classes and plain keys.

    Other parametrizations stay.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # torch removes a property of the class, which copies of the module share: a class of its own saves them
            own = type(module)
            module.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
            for attribute, chain in list(module.parametrizations.items()):  # type: ignore[union-attr,operator]
                if all(isinstance(part, Mask) for part in chain):
                    parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    return model


def _placed(model: nn.Module, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A value for every place that holds a tensor named in `tensors`, and a copy of every other buffer.

    Each module goes by one of its names: functional_call does not restore what it replaced under two.
    """
    values = {id(own[name]): tensor for name, tensor in tensors.items()}
    placed: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not isinstance(tensor, nn.Parameter) and id(tensor) not in values:
                values[id(tensor)] = tensor.clone()  # the forward pass may write to it
            if id(tensor) in values:
                placed[f"{prefix}.{attribute}" if prefix else attribute] = values[id(tensor)]
    return placed


def _refuse_two_values(given: Mapping[str, Tensor], tensor_of: Mapping[str, int]) -> None:
    first: dict[int, str] = {}
    for name in given:
        other = first.setdefault(tensor_of[name], name)
        if given[other] is not given[name]:
            raise UsageError(f"{other} and {name} are one tied weight: give it once.")


def _parametrized(model: nn.Module, name: str) -> UsageError | None:
    """The error for a weight that a parametrization stands in for; None where there is none of that name."""
    module_name, _, attribute = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False)).get(module_name)
    if module is None or not parametrize.is_parametrized(module, attribute):
        return None
    if all(isinstance(part, Mask) for part in module.parametrizations[attribute]):
        return UsageError(f"{name} carries a mask already: fold the model first.")
    return UsageError(f"{name} is parametrized: remove the parametrization first.")
