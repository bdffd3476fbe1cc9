"""Activation checkpointing of the user's own modules: blocks keep their inputs only, and run again for the gradients.

The second run repeats the first: batch norms use the statistics of the first, buffers such as running statistics do not
move, and allot's hooks skip it (`is_second_run`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allot.errors import UsageError

SecondRun = Callable[[], Iterable[AbstractContextManager[Any]]]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_second_runs = 0  # second runs under way; torch takes gradients in its own threads, so this is not a thread's variable


def is_second_run() -> bool:
    """Whether a block is running for the second time."""
    return _second_runs > 0


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with children whose class occurs more than once; containers are searched inside."""
    by_class = Counter(type(module) for module in model.modules())
    blocks: dict[int, nn.Module] = {}

    def search(module: nn.Module) -> None:
        for child in module.children():
            has_parts = next(child.children(), None) is not None and any(True for _ in child.parameters())
            if has_parts and by_class[type(child)] > 1 and type(child) not in _CONTAINERS:
                blocks[id(child)] = child
            else:
                search(child)

    search(model)
    return list(blocks.values())


@contextmanager
def checkpointed(model: nn.Module, second_run: SecondRun = tuple) -> Iterator[None]:
    """While open, blocks of `model` keep their inputs instead of their activations where gradients are wanted.

    Args:
        second_run: called in each first run, gives what has to be open in the second one.
    Raises:
        UsageError: the model has no repeated blocks.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise UsageError(
            f"checkpoint: {type(model).__name__} has no repeated blocks whose activations could be computed again."
        )
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_checkpoint_block(block, second_run))
        yield


@contextmanager
def _checkpoint_block(block: nn.Module, second_run: SecondRun) -> Iterator[None]:
    instance_forward = vars(block).get("forward")  # some users put a forward there too
    plain: Callable[..., Any] = block.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        contexts = partial(_run_contexts, block, second_run)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if instance_forward is not None:
            block.forward = instance_forward


def _run_contexts(
    block: nn.Module, second_run: SecondRun
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of the first and the second run; the second happens when the contexts of the call may be closed."""
    before = [
        (module._buffers, name, buffer.clone())  # the first run may write to it
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    return nullcontext(), _second_run(before, second_run())


@contextmanager
def _second_run(
    before: list[tuple[dict[str, Tensor | None], str, Tensor]], contexts: Iterable[AbstractContextManager[Any]]
) -> Iterator[None]:
    """The second run, from the buffers before the first run; afterwards the first run's buffers are back."""
    global _second_runs
    after = [(buffers, name, buffers[name]) for buffers, name, _ in before]
    _second_runs += 1
    try:
        for buffers, name, buffer in before:
            buffers[name] = buffer.clone()
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield
    finally:
        for buffers, name, left in after:
            buffers[name] = left
        _second_runs -= 1
