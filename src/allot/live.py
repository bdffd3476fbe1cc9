"""Memory of tensors while something runs: on CUDA as its allocator says, elsewhere the storages that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Over(Exception):
    """More is alive than was allowed."""


@dataclass
class Peak:
    """Bytes at the peak; known when the block that measured ends."""

    bytes: int = 0


@contextmanager
def peak(device: torch.device, tensors: Iterable[Tensor] = (), most: int | None = None) -> Iterator[Peak]:
    """Measure the most bytes of tensors that are alive on `device` at a time, those of `tensors` included.

    On CUDA the statistics of the device begin anew; temporaries of kernels count there, and only there.

    Raises:
        Over: more than `most` is alive, which ends what runs; on CUDA, where its memory is used up.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield found
        except torch.cuda.OutOfMemoryError as error:
            raise Over from error
        finally:
            found.bytes = torch.cuda.max_memory_allocated(device)
        if most is not None and found.bytes > most:
            raise Over
        return
    live = _Live(most)
    try:
        for tensor in tensors:
            live.hold(tensor)
        with live:
            yield found
    finally:
        found.bytes = live.most


class _Live(TorchDispatchMode):
    """Bytes of the storages that operators gave and that are still there."""

    def __init__(self, allowed: int | None) -> None:
        super().__init__()
        self.allowed, self.now, self.most = allowed, 0, 0
        self.held: dict[int, int] = {}

    def hold(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, until it goes."""
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.held:
            return
        self.held[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, storage._cdata).atexit = False
        if self.allowed is not None and self.now > self.allowed:
            raise Over

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.hold(value)
        return out
