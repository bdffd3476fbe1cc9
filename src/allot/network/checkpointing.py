"""Activation checkpointing of the user's own modules: blocks keep their inputs only, and run again for the gradients.

The second run is the first one again: batch norms find the statistics of the first, buffers such as running statistics
do not move, and hooks of ours pass over it (`again`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allot.errors import UsageError
from allot.network.batch_norms import Norms
from allot.network.masking import Masking

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_running = 0  # second runs under way; gradients are taken by threads of torch's, so this is no variable of a thread


def again() -> bool:
    """Whether a block is running for the second time."""
    return _running > 0


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with parts of their own whose class occurs more than once; containers are looked into."""
    alike = Counter(type(module) for module in model.modules())
    found: dict[int, nn.Module] = {}

    def look(module: nn.Module) -> None:
        for child in module.children():
            whole = next(child.children(), None) is not None and any(True for _ in child.parameters())
            if whole and alike[type(child)] > 1 and type(child) not in _CONTAINERS:
                found[id(child)] = child
            else:
                look(child)

    look(model)
    return list(found.values())


@contextmanager
def checkpointed(model: nn.Module, norms: Norms | None = None, masking: Masking | None = None) -> Iterator[None]:
    """While open, blocks of `model` keep their inputs instead of their activations where gradients are wanted.

    Args:
        norms, masking: what stands in for batch norms, and masks weights, at the time.
    Raises:
        UsageError: the model has no repeated blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise UsageError(
            f"checkpoint: {type(model).__name__} has no repeated blocks whose activations could be computed again."
        )
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_wrapped(block, norms, masking))
        yield


@contextmanager
def _wrapped(block: nn.Module, norms: Norms | None, masking: Masking | None) -> Iterator[None]:
    own = vars(block).get("forward")  # some users put a forward there as well
    plain: Callable[..., Any] = block.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        contexts = partial(_contexts, block, norms, masking)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _contexts(
    block: nn.Module, norms: Norms | None, masking: Masking | None
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What the first run is done in, and the second, which is by then outside of what the first one was in."""
    before = [
        (module._buffers, name, buffer.clone())  # the first run may write to it
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    return nullcontext(), _second(before, norms.again() if norms else nullcontext(), masking or nullcontext())


@contextmanager
def _second(
    before: list[tuple[dict[str, Tensor | None], str, Tensor]],
    norms: AbstractContextManager[Any],
    masking: AbstractContextManager[Any],
) -> Iterator[None]:
    """The second run: buffers are as they were before the first one, and afterwards as it left them."""
    global _running
    after = [(buffers, name, buffers[name]) for buffers, name, _ in before]
    _running += 1
    try:
        for buffers, name, buffer in before:
            buffers[name] = buffer.clone()
        with norms, masking:
            yield
    finally:
        for buffers, name, left in after:
            buffers[name] = left
        _running -= 1
