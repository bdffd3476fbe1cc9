"""Leaving the user's model as it was: what a forward pass writes to it is undone.

A pass may keep tensors in attributes, append to lists, count its calls, replace modules or hooks. All of that lives in
the `__dict__` of modules, in containers below them, and in what the model's hooks refer to; it is noted before and put
back after. Parameters are not copied for this: a pass that writes into them is refused, see `refused_writes`.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from allot.errors import UsageError
from allot.network.memory import has_memory, storage_of, written_by

NESTED = 2  # objects inside of objects that are followed: a collector, a cache and its layers
_LIBRARIES = ("torch", "numpy", "builtins", "collections", "functools")  # whose objects and functions are not followed


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """On leaving, every attribute, container, buffer, hook, mode and `requires_grad` of `model` is as it was.

    >>> model = nn.Linear(2, 2)
    >>> with preserved(model):
    ...     model.seen = model.eval()(torch.ones(2))
    >>> hasattr(model, "seen"), model.training
    (False, True)
    """
    before = _Snapshot(model)
    try:
        yield
    finally:
        before.restore()


class _Snapshot:
    """What a model holds and refers to, but for the values of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.classes: list[tuple[nn.Module, type]] = []
        self.tensors: list[_TensorBefore] = []
        self.arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        self.weights = {storage_of(p) for p in model.parameters() if _has_values(p)}
        for value in reached([model], modules=True):
            self._note(value)

    def _note(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.classes.append((value, type(value)))
        elif isinstance(value, Tensor):
            if _has_values(value):
                self.tensors.append(_TensorBefore(value, is_weight=storage_of(value) in self.weights))
        elif isinstance(value, dict | list | set | deque):
            self.containers.append((value, list(value.items() if isinstance(value, dict) else value)))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self.arrays.append((value, value.copy()))
        elif isinstance(value, torch.Generator):
            self.generators.append((value, value.get_state()))

    def restore(self) -> None:
        for module, kind in self.classes:
            if type(module) is not kind:
                module.__class__ = kind
        for container, before in self.containers:
            _refill(container, before)
        for tensor in self.tensors:
            tensor.restore()
        for array, values in self.arrays:
            array[...] = values
        for generator, state in self.generators:
            generator.set_state(state)


class _TensorBefore:
    """A tensor's memory, flags and gradient; a copy of its values, unless it is a weight."""

    def __init__(self, tensor: Tensor, *, is_weight: bool) -> None:
        self.tensor, self.memory, self.gradient = tensor, tensor.detach(), tensor.grad if tensor.is_leaf else None
        self.values = None if is_weight else self.memory.clone()
        self.requires_grad, self.is_leaf = tensor.requires_grad, tensor.is_leaf

    def restore(self) -> None:
        tensor, memory = self.tensor, self.memory
        if self.is_leaf and not tensor.is_leaf:  # something with a graph was added in place
            tensor.detach_()
        if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
            tensor.data = memory
        if self.values is not None and not _same(memory, self.values):
            with torch.inference_mode(memory.is_inference()), torch.no_grad():
                memory.copy_(self.values)
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.gradient:
                tensor.grad = self.gradient


def _refill(container: Any, before: list[Any]) -> None:
    """Put back what a container held, in its order; one that holds the same objects still is left alone."""
    if isinstance(container, dict):
        now = list(container.items())
        if len(now) != len(before) or any(a is not c or b is not d for (a, b), (c, d) in zip(now, before, strict=True)):
            plain: Any = OrderedDict if isinstance(container, OrderedDict) else dict
            plain.clear(container)
            for key, value in before:
                plain.__setitem__(container, key, value)
    elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)


def _referred(function: MethodType | partial[Any] | FunctionType) -> list[Any]:
    """What a function works on beside its arguments."""
    if isinstance(function, MethodType):
        return [function.__self__, function.__func__]
    if isinstance(function, partial):
        return [function.func, *function.args, *function.keywords.values()]
    if _of_library(function):
        return []
    try:
        named = inspect.getclosurevars(function)
    except ValueError:  # a variable that has no value yet
        return []
    followed = (dict, list, set, deque, Tensor, np.ndarray)
    return [*named.nonlocals.values(), *(value for value in named.globals.values() if isinstance(value, followed))]


def _of_library(value: Any) -> bool:
    """Whether a function, or the class of an object, comes with torch, numpy or Python."""
    module = getattr(value if isinstance(value, FunctionType) else type(value), "__module__", None) or ""
    return module.partition(".")[0] in _LIBRARIES


def reached(values: Iterable[Any], *, modules: bool = False) -> Iterator[Any]:
    """These values and all that they hold or refer to: containers, objects with their attributes as a dict, and what
    functions work on.

    Args:
        modules: whether modules are among them, with their attributes.
    """
    pending, seen = [(value, 0) for value in values], set[int]()  # with the number of objects above
    while pending:
        value, depth = pending.pop()
        plain = isinstance(value, str | int | float | bytes | type | ModuleType | None)
        if id(value) in seen or plain or (isinstance(value, nn.Module) and not modules):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            pending += ((part, depth) for part in list(value.values()))
        elif isinstance(value, list | tuple | set | frozenset | deque):
            pending += ((part, depth) for part in list(value))
        elif isinstance(value, MethodType | partial | FunctionType):
            pending += ((part, depth) for part in _referred(value))
        elif isinstance(value, nn.Module):
            pending.append((vars(value), depth))
        elif isinstance(value, Tensor | np.ndarray):
            continue
        elif isinstance(getattr(value, "__dict__", None), dict) and depth < NESTED and not _of_library(value):
            pending.append((vars(value), depth + 1))


def _has_values(tensor: Tensor) -> bool:
    return has_memory(tensor) and not tensor.is_meta


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    plain = tensor.int_repr() if tensor.is_quantized else tensor.resolve_conj().resolve_neg()
    return plain.contiguous().flatten().view(torch.uint8)


@contextmanager
def refused_writes(model: nn.Module) -> Iterator[None]:
    """While open, `model` runs; what it writes into its parameters is undone on leaving.

    A pass that leaves the same values, as one that limits norms which are in their limits, is no offence.

    Raises:
        UsageError: it leaves other values in a parameter.
    """
    parameters = {name: p for name, p in model.named_parameters() if _has_values(p)}
    memory = {name: parameter.detach() for name, parameter in parameters.items()}
    writes = _Writes({storage_of(parameter) for parameter in memory.values()})
    changed: list[str] = []
    try:
        with writes:
            yield
    finally:
        for name, parameter in parameters.items():
            before, moved = memory[name], parameter.data_ptr() != memory[name].data_ptr()
            if saved := writes.before.get(storage_of(before)):
                old = torch.empty(0, dtype=before.dtype, device=before.device)
                old.set_(saved, before.storage_offset(), before.shape, before.stride())
                changed += [] if _same(old, before) else [name]
            if moved and (parameter.shape != before.shape or not _same(parameter.detach(), before)):
                changed.append(name)
            if moved:
                parameter.data = before
        for before in memory.values():
            if saved := writes.before.pop(storage_of(before), None):
                before.untyped_storage().copy_(saved)
    if changed:
        raise UsageError(
            f"the model's forward writes into its parameter {', '.join(dict.fromkeys(changed[:3]))}, so that no mask "
            "would hold; its values are as before. Write it once, before pruning, or compute a new tensor from it in "
            "forward (w = self.weight.clamp(-1, 1), not self.weight.data.clamp_(-1, 1))."
        )


class _Writes(TorchDispatchMode):
    """Copies of storages, made just before an operator writes into them.

    Args:
        storages: those that are looked after.
    """

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self.storages = storages
        self.before: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in written_by(func, args, kwargs):
            if (place := storage_of(tensor)) in self.storages and place not in self.before:
                self.before[place] = tensor.untyped_storage().clone()
        return func(*args, **kwargs)
