"""Nested inputs and outputs of models: one walk over the leaves and one map over them.

`torch.utils._pytree` stops at mappings that are not dicts and at dataclasses that nobody registered; models take and
return both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves_of(tree: Any) -> Iterator[Any]:
    """Every leaf in nested mappings, dataclasses, tuples and lists, in order; None and texts are leaves.

    >>> list(leaves_of({"a": (1, [2, "b"]), "c": None}))
    [1, 2, 'b', None]
    """
    if isinstance(tree, Mapping):
        parts = iter(tree.values())
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = (getattr(tree, field.name, None) for field in dataclasses.fields(tree))
    elif isinstance(tree, tuple | list):
        parts = iter(tree)
    else:
        yield tree
        return
    for part in parts:
        yield from leaves_of(part)


def map_leaves(function: Callable[[Any], Any], tree: Any, *, lists: type = list) -> Any:
    """`tree` with `function(leaf)` for every leaf; named tuples keep their type, any other mapping becomes a dict.

    A dataclass that is no mapping is a leaf.

    Args:
        lists: what lists become; a model takes a tuple as several arguments and a list as one.

    >>> map_leaves(str, {"a": (1, [2])}), map_leaves(str, [1, 2], lists=tuple)
    ({'a': ('1', ['2'])}, ('1', '2'))
    """
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, value, lists=lists) for key, value in tree.items()}
    if not isinstance(tree, tuple | list):
        return function(tree)
    parts = (map_leaves(function, part, lists=lists) for part in tree)
    if isinstance(tree, list):
        return lists(parts)
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def map_tensors(function: Callable[[Tensor], Any], tree: Any, *, lists: type = list) -> Any:
    """`tree` with `function(tensor)` for every tensor; other leaves stay, see `map_leaves`."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree, lists=lists)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor among the leaves, in order."""
    return (leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor))


def floats_in(tree: Any) -> list[Tensor]:
    """The floating-point tensors among the leaves, in order."""
    return [tensor for tensor in tensors_in(tree) if tensor.is_floating_point()]


def cloned(inputs: Any) -> Any:
    """A copy of `inputs` with new tensors: a forward pass may write into its arguments."""
    return map_tensors(lambda tensor: tensor.detach().clone(), inputs)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for one batch of inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def flatten_keys(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of mappings, as one mapping; keys are joined with dots, list indices count from 0.

    >>> flatten_keys({"a": {"b": 1}, "c": [{"d": 2}]})
    {'a.b': 1, 'c.0.d': 2}
    """
    flattened: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            value = {str(i): part for i, part in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flattened |= flatten_keys(value, f"{prefix}{key}.")
        else:
            flattened[prefix + key] = value
    return flattened
