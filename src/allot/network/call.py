"""Running a model with other tensors in place of its own; the model is left as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import AllotError, ModelFailed, UsageError, first_line, unknown
from allot.network.applied_masks import Masking
from allot.network.batch_norms import Norms
from allot.network.checkpointing import checkpointed
from allot.network.compute import Compute
from allot.network.copies import deep_copy
from allot.network.kinds import FLOATS
from allot.network.trees import as_arguments, floats_in, map_leaves, map_tensors
from allot.processes import world_size

log = logging.getLogger("allot")


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
    """The output of `model` for `inputs` with `tensors` in place of its own; the model is left as it was.

    Args:
        tensors: parameter or buffer name -> value; other names keep the model's tensors. A tied weight is named
            once. Buffers that the forward pass updates are updated in the tensors passed in.
        inputs: a tuple is spread over positional arguments, a dict over keywords, anything else is one argument.
        training: which modules run in train mode; None: none of them.
        norms: how batch norms in train mode find the statistics of their batch; None: torch does, or with several
            processes all of them together.
        compute: precision, compiling and checkpointing; None: none of them.
        masking: masks of tensors that are applied where the model uses the tensors; not for compiled models.
        then: function of the output, called while tensors and modes are still in place; its result is returned.
            Gradients belong here: activation checkpointing runs parts of the model again for them.
    Raises:
        UsageError: a name that the model does not have, a shape other than the model's, or two values for one
            tied weight.
    """
    modules = list(model.named_modules())  # once: to walk over hundreds of modules takes milliseconds
    model_tensors = dict(_places(modules))
    if not tensors.keys() <= model_tensors.keys():  # names of modules that have two are rare
        model_tensors |= dict(model.named_parameters(remove_duplicate=False))
        model_tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in model_tensors:
            raise unknown("tensor", name, model_tensors)
        if tensor.shape != model_tensors[name].shape:
            raise UsageError(f"{name} has shape {list(tensor.shape)}; the model has {list(model_tensors[name].shape)}.")
    refuse_two_values(tensors, {name: id(model_tensors[name]) for name in tensors})
    args, kwargs = as_arguments(inputs)
    placed = {f"model.{name}": tensor for name, tensor in _tensors_by_place(modules, tensors, model_tensors).items()}
    norms = norms or (Norms() if training and world_size() > 1 else None)
    compute = compute or Compute()
    if norms and compute.compile:
        compute = replace(compute, compile=False)  # `Norms` counts batch norms, which no graph captures

    def second_run() -> list[AbstractContextManager[Any]]:
        return [*([norms.again()] if norms else ()), *([masking] if masking else ())]

    checkpointing = checkpointed(model, second_run) if compute.checkpoint else nullcontext()
    with modes(model, training or (lambda module: False)), norms or nullcontext(), checkpointing:
        return torch.func.functional_call(
            _WithThen(model, then, compute, masking), placed, args, kwargs, tie_weights=False
        )


@contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Each module in train mode where `training(module)`, else in eval mode; restored on leaving."""
    previous = [(module, module.training) for module in model.modules()]
    try:
        for module, mode in previous:
            if (wanted := training(module)) != mode:  # to set an attribute of a module takes longer than to ask
                module.training = wanted
        yield
    finally:
        for module, mode in previous:
            if module.training != mode:
                module.training = mode


class _WithThen(nn.Module):
    """`then` of the output of `model`."""

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
    """The output of the compiled `model`; a function is compiled, because compiling the module would mark it."""
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    try:
        return _compile()(model, *args, **kwargs)
    except TorchDynamoException as error:
        raise UsageError(f"compile: this model cannot be compiled here: {first_line(error)}") from error


@cache
def _compile() -> Callable[..., Any]:
    return torch.compile(lambda model, *args, **kwargs: model(*args, **kwargs))


def write_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write these values into the parameters and buffers of these names, in place; other names are ignored."""
    model_tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in model_tensors.keys() & tensors.keys():
            model_tensors[name].copy_(tensors[name])


def filled_copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` that holds these values, see `write_into`.

    Raises:
        UsageError: the model holds something that Python cannot copy.
    """
    try:
        copied = deep_copy(model)
    except Exception as error:
        raise UsageError(f"the model cannot be copied: {first_line(error)}.") from error
    write_into(copied, tensors)
    return copied


def _tensors_by_place(
    modules: Iterable[tuple[str, nn.Module]], tensors: Mapping[str, Tensor], model_tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A value for every place that holds a tensor named in `tensors`, and a copy of every other buffer.

    Each module goes by one of its names: functional_call does not restore what it replaced under two.
    """
    values = {id(model_tensors[name]): tensor for name, tensor in tensors.items()}
    by_place: dict[str, Tensor] = {}
    for place, tensor in _places(modules):
        if not isinstance(tensor, nn.Parameter) and id(tensor) not in values:
            values[id(tensor)] = tensor.clone()  # the forward pass may write to it
        if id(tensor) in values:
            by_place[place] = values[id(tensor)]
    return by_place


def _places(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each parameter and buffer of each module."""
    for prefix, module in modules:
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, tensor


def refuse_two_values(values: Mapping[str, Tensor], tensor_of: Mapping[str, int]) -> None:
    """Raises:
    UsageError: two names of one tied weight have different values.
    """
    first_names: dict[int, str] = {}
    for name in values:
        first_name = first_names.setdefault(tensor_of[name], name)
        if values[first_name] is not values[name]:
            raise UsageError(f"{first_name} and {name} are one tied weight: give it once.")


def dtype_for(model: nn.Module, inputs: Any, tensors: Mapping[str, Tensor] | None = None) -> torch.dtype | None:
    """The dtype that floating-point inputs are cast to; None: the model runs on them as they are.

    They are cast to the dtype of the model's first floating-point parameter, and only where that lets the model run.
    """
    dtype = next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.float32)
    others = {tensor.dtype for tensor in floats_in(inputs)} - {dtype}
    if not others:
        return None
    try:
        attempt(model, inputs, tensors or {})
        return None
    except UsageError as error:
        cast = map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs)
        try:
            attempt(model, cast, tensors or {})
        except UsageError:
            return None  # the error of the inputs as they are is the one to show
        names = ", ".join(sorted(str(other)[6:] for other in others))
        log.warning("inputs are cast from %s to %s: %s", names, str(dtype)[6:], error)
        return dtype


def attempt(model: nn.Module, inputs: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The result of `call`, without gradients.

    Raises:
        ModelFailed: the model does not take these inputs.
    """
    try:
        with torch.no_grad():
            return call(model, tensors, inputs)
    except AllotError:
        raise
    except Exception as error:
        shape = map_leaves(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, inputs)
        raise ModelFailed(f"the model does not run on inputs of shape {shape}: {first_line(error)}") from error
