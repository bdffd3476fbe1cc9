"""How masks meet modules: `call` for methods, `attach` and `fold` for users who train in their own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import AllotError, UsageError, first_line, unknown
from allot.network.batch_norms import Norms
from allot.network.checkpointing import checkpointed
from allot.network.compute import Compute
from allot.network.masking import Masking
from allot.network.trees import map_leaves
from allot.processes import world_size


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
    refuse_two_values(tensors, {name: id(own[name]) for name in tensors})
    args, kwargs = as_arguments(inputs)
    placed = {f"model.{name}": tensor for name, tensor in _placed(model, tensors, own).items()}
    norms = norms or (Norms() if training and world_size() > 1 else None)
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
        raise UsageError(f"compile: this model cannot be compiled here: {first_line(error)}") from error


@cache
def _compile() -> Callable[..., Any]:
    return torch.compile(lambda model, *args, **kwargs: model(*args, **kwargs))


def write_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the parameters and buffers of these names these values, in place; other names are passed over."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])


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


def refuse_two_values(given: Mapping[str, Tensor], tensor_of: Mapping[str, int]) -> None:
    """Raises:
    UsageError: two names of one tied weight have different values.
    """
    first: dict[int, str] = {}
    for name in given:
        other = first.setdefault(tensor_of[name], name)
        if given[other] is not given[name]:
            raise UsageError(f"{other} and {name} are one tied weight: give it once.")


def attempt(model: nn.Module, inputs: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `call` gives, without gradients.

    Raises:
        UsageError: the model does not take these inputs.
    """
    try:
        with torch.no_grad():
            return call(model, tensors, inputs)
    except AllotError:
        raise
    except Exception as error:
        shape = map_leaves(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, inputs)
        raise UsageError(f"the model does not run on inputs of shape {shape}: {first_line(error)}") from error
