"""A device of limited memory where there is none: what is put on it computes on the CPU and is counted.

    with Simulated(limit=2**20) as device:
        x = torch.ones(8).to("meta")    # on the device: counted, and mixing it with tensors elsewhere is an error
        y = (x + 1).to("cpu")
    device.peak                         # the most bytes that were alive on it at once

While it is open, "meta" names this device: tensors there hold values. Counted is the storage of every tensor that a
program can see (weights, activations, what autograd keeps); scratch memory inside one operator is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
CPU = torch.device("cpu")


class OutOfDeviceMemory(RuntimeError):
    """The limit would be passed."""


class Simulated(TorchDispatchMode):
    """The device, while it is open.

    Args:
        limit: bytes that may be alive on it at once; None: any number, `peak` is measured only.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An operator on the values, its results counted where they are on the device."""
        tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        here = [tensor.device.type == NAME for tensor in tensors]
        asked = kwargs.get("device")
        there = any(here) if asked is None else torch.device(asked).type == NAME
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        outside = [t for t, inside in zip(tensors, here, strict=True) if not inside and t.dim()]
        indexes = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # by CPU indices: allowed
        if any(here) and outside and not copies and not indexes:
            raise RuntimeError(f"{func}: some tensors are on the device and some are not")
        values = {**kwargs, "device": CPU} if asked is not None else dict(kwargs)
        output = func(*tree_map(_value, args), **tree_map(_value, values))
        if func is torch.ops.aten.copy_.default:
            return args[0]
        return tree_map(self._put, output) if there else output

    def _put(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, _There):
            return value
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            if self.limit is not None and self.live + size > self.limit:
                raise OutOfDeviceMemory(f"{self.live:,} bytes are taken, {size:,} more pass {self.limit:,}")
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)
        return _There(value, storage, self)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _There(Tensor):
    """A tensor on the device; `value` is what it holds."""

    value: Tensor
    storage_held: Any
    home: Simulated

    @staticmethod
    def __new__(cls, value: Tensor, storage: Any, home: Simulated) -> _There:
        """A tensor without memory of its own."""
        made = Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=NAME,
        )
        made.value, made.storage_held, made.home = value, storage, home
        return made

    def untyped_storage(self) -> Any:
        """The memory of what it holds, which tells views of one tensor from other tensors."""
        return self.storage_held

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        home = next(leaf.home for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, _There))
        return home.run(func, args, kwargs or {})


def _value(value: Any) -> Any:
    if isinstance(value, _There):
        return value.value
    if isinstance(value, Tensor) and value.device.type == NAME:  # torch.tensor([], device=...) asks nobody
        if value.numel():
            raise RuntimeError("torch.tensor(values, device=...) is not simulated: make it elsewhere and move it.")
        return torch.empty(value.shape, dtype=value.dtype)
    return value
