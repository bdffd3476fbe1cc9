"""Copies of models that keep tensors of a forward pass: attention maps, recomputed weights, lists of activations."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


def deep_copy(value: T, memo: dict[int, Any] | None = None) -> T:
    """`copy.deepcopy(value, memo)`, which also copies tensors that are part of a graph of gradients, as plain tensors,
    and sparse ones of any layout.

    >>> import torch
    >>> weight = torch.ones(2, requires_grad=True)
    >>> deep_copy({"kept": 2 * weight})
    {'kept': tensor([2., 2.])}
    """
    with _WithoutGraphs():
        return copy.deepcopy(value, memo)


class _WithoutGraphs(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and (not args[0].is_leaf or args[0].layout is not torch.strided):
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
