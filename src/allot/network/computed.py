"""Weights that a model computes from its parameters before use, and the operators where these meet the inputs.

While a model runs, every tensor is computed from the inputs, from weights of layers alone, or from neither. Inputs are
those of every module that is called. Where a tensor of the first kind meets one of the second, that one is a computed
weight: a standardised kernel, a sum with a low-rank update, twice the transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from allot.network.memory import Memory, storage_of, written_by
from allot.network.trees import tensors_in

# (names of layers, the weight computed from theirs, MACs of the operator)
Meets = Callable[[frozenset[str], Tensor, int], None]


class Computed:
    """Follows tensors through the operators of one pass after the other.

    Args:
        meets: called where a computed weight meets the inputs: in a product, or, as large as the parameter itself or
            larger, in any other operator.
    Attributes:
        touched: layers whose weight met the inputs as it is.
        macs: multiply-accumulates of all products so far, of activations with activations included.
    """

    def __init__(self, meets: Meets) -> None:
        self.meets = meets
        self.macs = 0
        self.touched: set[str] = set()
        self.memory = Memory()
        self._inputs: dict[int, StorageWeakRef] = {}
        self._weights: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}

    def begin(self, memory: Memory) -> None:
        """A pass begins.

        Args:
            memory: where the parameters lie.
        """
        self.memory, self._inputs, self._weights = memory, {}, {}

    def enter(self, arguments: Any) -> None:
        """A module is called: constants that it is called with, as learned queries, are inputs like others."""
        for tensor in filter(_has_storage, tensors_in(arguments)):
            if not self._names(tensor):
                self._inputs[storage_of(tensor)] = _reference(tensor)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operator ran."""
        product = _PRODUCTS.get(func._overloadpacket)
        self.macs += _macs(func, args, out)
        given = [tensor for tensor in tensors_in((args, kwargs)) if _has_storage(tensor)]
        weights = [(tensor, names) for tensor in given if (names := self._names(tensor))]
        written = [tensor for tensor in written_by(func, args, kwargs) if _has_storage(tensor)]
        for tensor in written:
            self.memory.forget(tensor)
        made = [*filter(_has_storage, tensors_in(out)), *written]
        if any(self._is_input(tensor) for tensor in given):
            operands = [] if product is None else [args[place] for place in product if place < len(args)]
            for tensor, names in weights:
                if self.memory.find(tensor):
                    self.touched |= names
                else:
                    is_operand = any(tensor is operand for operand in operands)
                    if is_operand or tensor.numel() >= min(self._size(name) for name in names):
                        self.meets(names, tensor, _macs(func, args, out, tensor) if is_operand else 0)
            for tensor in made:
                self._inputs[storage_of(tensor)] = _reference(tensor)
        elif weights:
            all_names = frozenset[str]().union(*(names for _, names in weights))
            for tensor in made:
                if not self.memory.find(tensor):
                    self._weights[storage_of(tensor)] = _reference(tensor), all_names

    def _is_input(self, tensor: Tensor) -> bool:
        reference = self._inputs.get(storage_of(tensor))
        return reference is not None and not reference.expired()

    def _names(self, tensor: Tensor) -> frozenset[str]:
        """The layers from whose parameters alone a tensor comes."""
        if self._is_input(tensor):
            return frozenset()
        if found := self.memory.find(tensor):
            return frozenset(held.layer.name for held in found)
        reference, names = self._weights.get(storage_of(tensor), (None, frozenset[str]()))
        return frozenset() if reference is None or reference.expired() else names

    def _size(self, name: str) -> int:
        return next(h.layer.total for helds in self.memory.by_storage.values() for h in helds if h.layer.name == name)


_aten = torch.ops.aten
_PRODUCTS = {  # operator -> places of the tensors that it multiplies
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.mv, _aten.dot, _aten._grouped_mm), (0, 1)),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addmv), (1, 2)),
    **dict.fromkeys((_aten.convolution, _aten._convolution), (0, 1)),
    _aten.mkldnn_rnn_layer: (0, 1, 2),
}


def _macs(func: Any, args: tuple[Any, ...], out: Any, weight: Tensor | None = None) -> int:
    """Multiply-accumulates of an operator; of the recurrent one, those of `weight` alone where it is given."""
    operator = func._overloadpacket
    if operator in (_aten.convolution, _aten._convolution):
        inputs, kernel, transposed = args[0], args[1], args[6]
        return int((inputs if transposed else out).numel() // kernel.shape[0] * kernel.numel())
    if operator is _aten.mkldnn_rnn_layer:
        weights = args[1:3] if weight is None else (weight,)
        return math.prod(args[0].shape[:2]) * sum(tensor.numel() for tensor in weights)
    if operator in _PRODUCTS:
        return int(out.numel() * args[_PRODUCTS[operator][0]].shape[-1])
    if "scaled_dot_product" in str(operator):  # one operator for each kind of device
        query, key, value = args[:3]
        return int(query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1]))
    return 0


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.numel() > 0 and storage_of(tensor) != 0


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
