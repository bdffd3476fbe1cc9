"""The tensors in what goes into a model and in what comes out, whatever holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, dataclasses, tuples and lists, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from (tensor for value in tree.values() for tensor in tensors_in(value))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = (getattr(tree, field.name, None) for field in dataclasses.fields(tree))
        yield from (tensor for value in fields for tensor in tensors_in(value))
    elif isinstance(tree, tuple | list):
        yield from (tensor for value in tree for tensor in tensors_in(value))


def floats_in(tree: Any) -> list[Tensor]:
    """Those of them that hold real numbers."""
    return [tensor for tensor in tensors_in(tree) if tensor.is_floating_point()]


def cloned(inputs: Any) -> Any:
    """The inputs with tensors of their own: a forward may write into what it is given."""
    if isinstance(inputs, Tensor):
        return inputs.detach().clone()
    if isinstance(inputs, Mapping):
        return {key: cloned(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return tuple(map(cloned, inputs))
    return [cloned(value) for value in inputs] if isinstance(inputs, list) else inputs
