"""Weights masked where the model uses them, so that no masked copy of them all has to be there at a time.

A copy lives while the operator that takes it runs. Where gradients need it, what is remembered is weight and mask, and
the copy is made once more. Gradients arrive at every entry, as if the copy had been what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` with +0.0 wherever `mask` is False (a product would leave -0.0 and nan)."""
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


class Masking(TorchFunctionMode):
    """While open, functions of torch get masked copies of these tensors.

    Args:
        tensors: name -> what learns, with the mask.
        remember: whether copies that gradients need are made once more, instead of kept.
    Attributes:
        placed: name -> the tensor that the model has to hold, of the same memory. Gradients reach it only where the
            model uses it in a way that no function of torch shows.
    """

    def __init__(self, tensors: Mapping[str, tuple[Tensor, Tensor]], *, remember: bool = True) -> None:
        super().__init__()
        self.placed = {name: tensor.detach().requires_grad_() for name, (tensor, _) in tensors.items()}
        self.known = {id(self.placed[name]): both for name, both in tensors.items()}
        self.remember = remember

    @property
    def missed(self) -> bool:
        """Whether gradients went past the masks."""
        return any(tensor.grad is not None for tensor in self.placed.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stands in for every function; what it does is the function's own."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            return func(*args, **kwargs)
        copies: dict[int, _Copy] = {}

        def placed(value: Tensor) -> Tensor:
            if id(value) not in self.known:
                return value
            tensor, mask = self.known[id(value)]
            copy: Tensor = _Straight.apply(tensor, mask)
            copies[copy.untyped_storage().data_ptr()] = _Copy(tensor, mask)
            return copy

        args, kwargs = tree_map_only(Tensor, placed, (args, kwargs))
        if not copies or not self.remember or not torch.is_grad_enabled():
            return func(*args, **kwargs)

        def pack(saved: Tensor) -> Tensor | tuple[_Copy, Any]:
            # a view of the copy, as of one part of an attention's weights, is found by its memory
            copy = copies.get(saved.untyped_storage().data_ptr()) if saved.layout == torch.strided else None
            if copy is None or saved.dtype != copy.tensor.dtype:
                return saved.detach()
            return copy, (saved.size(), saved.stride(), saved.storage_offset())

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
            return func(*args, **kwargs)


@dataclass(frozen=True)
class _Copy:
    tensor: Tensor
    mask: Tensor


def _unpacked(packed: Tensor | tuple[_Copy, Any]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    copy, view = packed
    return masked(copy.tensor.detach(), copy.mask).as_strided(*view)


class _Straight(torch.autograd.Function):
    """The masked tensor; gradients go straight through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mask: Tensor) -> Tensor:
        return masked(tensor, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient of the copy, whole."""
        return gradients[0], None


# what modules ask about a weight, which no mask changes
_ABOUT = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "is_cuda", "grad_fn", "grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.is_contiguous}
