"""Where weights lie in memory: which rows of which weight an operand of an operator holds.

Views are found by the storage that they share with the weight. Copies are followed: a weight in another precision or
order of dimensions, and stacks of matrices that were picked from the experts of a weight, one a token say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from allot.network.kinds import EXPERTS
from allot.network.layers import Layer
from allot.network.trees import tensors_in


@dataclass(frozen=True)
class Held:
    """A layer's weight, or a copy of it, in memory: entries `start` to `stop` of a storage.

    Attributes:
        strides: of the weight's dimensions; of picked matrices, those of (matrix, row, column); empty where a copy is
            of another form.
        picked: `[matrices]`, the number of the expert that each of them is a copy of; None: the weight as it is.
        copy: the storage of a copy, which another tensor may get when the copy is gone; None for the weight itself.
    """

    layer: Layer
    start: int
    stop: int
    strides: tuple[int, ...]
    picked: Tensor | None = None
    copy: StorageWeakRef | None = None

    @property
    def rows(self) -> int:
        """Of one matrix of the stack, or of the weight where it is no stack."""
        return self.layer.rows // (self.layer.shape[0] if self.layer.kind in EXPERTS else 1)

    @property
    def steps(self) -> tuple[int, int, int] | None:
        """From one matrix, row and column to the next in memory; None where the weight is no matrix, nor a stack."""
        if self.picked is not None:
            return self.strides[0], self.strides[1], self.strides[2]
        if not self.strides or self.layer.kind.startswith("conv"):
            return None
        one, other = self.strides[-2:]
        row, column = (other, one) if self.layer.kind.endswith("_transposed") else (one, other)
        several = self.layer.kind in EXPERTS and self.layer.shape[0] > 1
        return self.strides[0] if several else self.stop - self.start, row, column

    def rows_of(self, offset: int, shape: Sequence[int], strides: Sequence[int]) -> slice | None:
        """Which rows of the layer's matrix lie, whole, in a matrix in memory; None where it holds something else.

        Args:
            offset: in the storage.
            shape, strides: of the matrix, rows first.
        """
        count, K = shape
        if self.steps is None or self.layer.inputs != K or (K > 1 and strides[1] != self.steps[2]):
            return None
        matrix, row, _ = self.steps
        number, row_number, rest = 0, 0, offset - self.start
        for step, is_row in sorted(((matrix, False), (row, True)), reverse=True):
            if is_row and self.rows > 1:
                row_number, rest = divmod(rest, row)
            elif not is_row:
                number, rest = divmod(rest, step)
        across = row_number + count > self.rows  # from one expert into the next
        step = matrix if self.rows == 1 else row
        if rest or (count > 1 and strides[0] != step) or (across and matrix != self.rows * step):
            return None
        if self.picked is not None:
            if across:
                return None
            number = int(self.picked[number])
        first = number * self.rows + row_number
        return slice(first, first + count)

    def copied(self, source: Tensor, out: Tensor, index: Tensor | None = None) -> Held | None:
        """The weight in `out`, a copy of `source`, which is a view of this one, or of its entries at `index`."""
        plain = index is None and self.picked is None
        if plain and out.numel() == self.layer.total and source.numel() == self.layer.total:
            return self._in(out, _moved(self, source, out))
        if (steps := self.steps) is None or source.dim() < 2:
            return None
        row, column = _dimension(source, self.rows, steps[1]), _dimension(source, self.layer.inputs, steps[2])
        lead = [dim for dim in range(source.dim()) if dim not in (row, column)]
        first, rest = divmod(int(source.storage_offset()) - self.start, steps[0])
        if rest or row is None or column is None or row == column or (index is not None and lead != [0]):
            return None
        number = torch.tensor(first)
        for dim in lead:
            stride, odd = divmod(source.stride(dim) if source.shape[dim] > 1 else 0, steps[0])
            if odd:
                return None
            number = number[..., None] + stride * torch.arange(source.shape[dim])
        added = 0
        if index is not None:
            number, added = number[index.cpu()], index.dim() - 1
            lead = list(range(index.dim()))
        step = _step(out, lead)
        if step is None:
            return None
        number = number.flatten() if self.picked is None else self.picked[number.flatten()]
        return self._in(out, (step, out.stride(row + added), out.stride(column + added)), number)

    def _in(self, out: Tensor, strides: tuple[int, ...], picked: Tensor | None = None) -> Held:
        start, stop = extent(out)
        return Held(self.layer, start, stop, strides, picked, StorageWeakRef(out.untyped_storage()))


class Memory:
    """All weights and copies that are looked for."""

    def __init__(self) -> None:
        self.by_storage: dict[int, list[Held]] = {}

    def add(self, held: Held, tensor: Tensor) -> None:
        place = storage_of(tensor)
        self.by_storage[place] = [*filter(_is_alive, self.by_storage.get(place, ())), held]

    def find(self, tensor: Any) -> list[Held]:
        """The weights whose memory `tensor` starts in; two where it is open which form of a stack a weight has."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.numel():
            return []
        offset = tensor.storage_offset()
        near = self.by_storage.get(storage_of(tensor), ())
        return [held for held in near if held.start <= offset < held.stop and _is_alive(held)]

    def forget(self, tensor: Tensor) -> None:
        """Copies in the memory of `tensor` are copies no longer: something was written there."""
        place = storage_of(tensor)
        self.by_storage[place] = [held for held in self.by_storage.get(place, ()) if held.copy is None]


@contextmanager
def copies_made_anew() -> Iterator[None]:
    """While open, autocast copies a weight at each use: a copy that it made before would be no known memory."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator of torch writes into."""
    if not func._schema.is_mutable:
        return
    arguments = {argument.name: argument for argument in func._schema.arguments}
    for name, value in {**dict(zip(arguments, args, strict=False)), **kwargs}.items():
        if arguments[name].alias_info is not None and arguments[name].alias_info.is_write:
            yield from (tensor for tensor in tensors_in(value) if tensor.layout == torch.strided)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in one storage of its own or shared; not of lazy, sparse and wrapping tensors."""
    plain = tensor.layout == torch.strided and not is_lazy(tensor) and not is_traceable_wrapper_subclass(tensor)
    return plain and tensor.numel() > 0


def extent(tensor: Tensor) -> tuple[int, int]:
    """First entry of its storage that a tensor reaches, and one past the last."""
    start = int(tensor.storage_offset())
    return start, start + 1 + sum((size - 1) * int(s) for size, s in zip(tensor.shape, tensor.stride(), strict=True))


def _is_alive(held: Held) -> bool:
    return held.copy is None or not held.copy.expired()


def _moved(held: Held, source: Tensor, out: Tensor) -> tuple[int, ...]:
    """Strides in `out` of the weight's dimensions; empty where the copy has others."""
    free = list(zip(source.shape, source.stride(), out.stride(), strict=True))
    strides = []
    for size, step in zip(held.layer.shape, held.strides, strict=False):
        found = next((dim for dim in free if dim[0] == size and (dim[1] == step or size == 1)), None)
        if found is None:
            return ()
        free.remove(found)
        strides.append(found[2])
    return tuple(strides) if len(strides) == len(held.layer.shape) else ()


def _dimension(tensor: Tensor, size: int, step: int) -> int | None:
    """The last dimension of this size and stride."""
    fits = (
        d for d in reversed(range(tensor.dim())) if tensor.shape[d] == size and (size == 1 or tensor.stride(d) == step)
    )
    return next(fits, None)


def _step(tensor: Tensor, dims: Sequence[int]) -> int | None:
    """The stride of several dimensions taken as one; None where they are not one."""
    step = 0
    size = 1
    for dim in reversed(dims):
        if tensor.shape[dim] == 1:
            continue
        if size > 1 and tensor.stride(dim) != size * step:
            return None
        step = step or int(tensor.stride(dim))
        size *= tensor.shape[dim]
    return max(step, 1)


def storage_of(tensor: Tensor) -> int:
    """The same number for tensors that share memory; on the meta device, for those that would share it.

    0 where a tensor has no storage of its own, like a batch of `torch.vmap`, or a sparse one.
    """
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return 0
    return storage.data_ptr() or storage._cdata
