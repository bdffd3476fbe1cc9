"""Parameters that share memory with another tensor of the model, without being one parameter."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.memory import extent, has_memory, storage_of


def check_shared_memory(model: nn.Module) -> None:
    """Refuse parameters that share entries in memory with another parameter or buffer, or with themselves.

    PyTorch takes them for several tensors: each would get a mask of its own, and a state dict loaded into the model
    would leave the values of the last one in all of them. Parts of one storage that do not overlap, as those of a flat
    buffer, are separate tensors.

    Raises:
        UsageError: names such tensors, and the line that makes them one parameter or several.

    >>> model = nn.ModuleDict({"enter": nn.Linear(4, 4), "leave": nn.Linear(4, 4)})
    >>> model["leave"].weight.data = model["enter"].weight.data
    >>> check_shared_memory(model)
    Traceback (most recent call last):
    allot.errors.UsageError: enter.weight and leave.weight are two parameters in the same memory: tie them as one \
parameter, model.leave.weight = model.enter.weight.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    by_storage: dict[int, list[str]] = {}
    tensors = parameters | buffers
    for name, tensor in tensors.items():
        if has_memory(tensor):
            by_storage.setdefault(storage_of(tensor), []).append(name)
            if name in parameters and _overlaps_itself(tensor):
                raise UsageError(
                    f"entries of {name} share memory, as those of an expanded tensor do: give each its own, "
                    f"{_separated(name)}."
                )
    for names in by_storage.values():
        for first, second in itertools.combinations(names, 2):
            if first in parameters and _overlap(tensors[first], tensors[second]):
                raise UsageError(_message(first, second, tensors, of_parameters=second in parameters))


def _message(first: str, second: str, tensors: dict[str, Tensor], *, of_parameters: bool) -> str:
    one, other = tensors[first], tensors[second]
    if not of_parameters:
        return (
            f"the buffer {second} shares memory with the parameter {first}, and a mask would not reach it: compute it "
            f"from {first} in forward, or give it memory of its own, {_spelled(second)} = {_spelled(second)}.clone()."
        )
    if one.shape == other.shape and one.stride() == other.stride():
        return (
            f"{first} and {second} are two parameters in the same memory: tie them as one parameter, "
            f"{_spelled(second)} = {_spelled(first)}."
        )
    return (
        f"{first} and {second} are two parameters, one of which is a view of the other's memory: keep {first} alone "
        f"and take the view in forward, like F.linear(x, self.{first}.t()), or separate them, {_separated(second)}."
    )


def _separated(name: str) -> str:
    tensor = _spelled(name)
    return f"{tensor} = nn.Parameter({tensor}.detach().clone(memory_format=torch.contiguous_format))"


def _spelled(name: str) -> str:
    """A parameter as Python spells it.

    >>> _spelled("blocks.0.fc.weight")
    'model.blocks[0].fc.weight'
    """
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two entries lie at one place."""
    span = 1
    for step, size in sorted((int(step), size) for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and step < span:  # only here it takes a look at every entry
            return len(_places(tensor).unique()) < tensor.numel()
        span += (size - 1) * step
    return False


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an entry in common; of two dtypes, whether their bytes may."""
    (start, stop), (begin, end) = ([at * tensor.element_size() for at in extent(tensor)] for tensor in (one, other))
    if stop <= begin or end <= start or one.dtype != other.dtype:
        return begin < stop and start < end
    return bool(torch.isin(_places(one), _places(other)).any())


def _places(tensor: Tensor) -> Tensor:
    """Position in the storage of each entry."""
    places = torch.tensor(int(tensor.storage_offset()))
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + int(step) * torch.arange(size)
    return places.flatten()
