"""A limit of memory: one step of training is tried with one choice of `Compute` after another, until one fits.

The order goes from exact to near, and from fast to slow; pieces are halved and halved again:

    1. nothing                     as asked
    2. checkpoint                  the same numbers, a third more time; of models with repeated blocks
    3. pieces down to a quarter    exact but for rounding without batch norm, near with it (`allot.network.batch_norms`)
    4. checkpoint and pieces       down to single samples

What is measured is the peak of one step with all that it works on: the model, what is trained, its optimiser, masks,
gradients and activations. What the interpreter, its libraries and the data take comes on top.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allot.budget.units import memory
from allot.errors import UsageError
from allot.methods.rules import uniform
from allot.methods.training.distillation import Training
from allot.methods.training.selection import Selection
from allot.network.checkpointing import repeated_blocks
from allot.network.compute import Compute
from allot.network.layers import is_batch_norm
from allot.processes import world_size
from allot.run.driver import drive, repeatable
from allot.run.problem import Candidate, Chain, Problem, Rule

log = logging.getLogger("allot")


def choose_compute(
    problem: Problem, chain: Chain, given: int | str | None, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What is chosen so that training fits into a limit, None without one; a resumed run keeps what it began with.

    Args:
        given: the limit, in bytes or like "6GB".
        earlier: what the run began with, None for a new run.
    Returns:
        `{"limit", "asked", "picked", "peak", "tried"}`: bytes; choices of `Compute` that differ from the defaults, as
        they were asked for and as they are now; the peak in bytes, None where nothing trains; and what was tried
        before, as a list of choices.
    Raises:
        UsageError: no such limit, or nothing fits.
    """
    if given is None:
        return None
    limit, asked = memory("max_memory", given), problem.compute.to_json()
    if earlier and (earlier["limit"], earlier["asked"]) == (limit, asked):
        return _told(dict(earlier))
    found: dict[str, Any] = {"limit": limit, "asked": asked, "picked": asked, "peak": None, "tried": []}
    trainings = {
        (t.loss, t.blocks, str(t.outputs)): t for part in (chain.allocate, *chain.repair) for t in _within(part)
    }
    if not trainings:
        return _told(found)
    shares = Rule(uniform, ("weights", "channels"))
    candidate = drive(Selection(), problem, drive(shares, problem, Candidate.dense(problem)))
    for compute in candidates(problem):
        try:
            used = max(_peak(replace(problem, compute=compute), candidate, t, limit) for t in trainings.values())
        except Over:
            found["tried"].append(compute.to_json())
            continue
        return _told(found | {"picked": compute.to_json(), "peak": used})
    least = max(_peak(replace(problem, compute=compute), candidate, t, None) for t in trainings.values())
    raise UsageError(
        f"max_memory={given}: the least that a step of training takes is {_size(least)}, with {_words(compute)}. Allow "
        "that, or take a method that does not train, like erk."
    )


def warn_of_unused(problem: Problem, chain: Chain) -> None:
    """Say so where choices were made and nothing in the chain trains."""
    if problem.compute.to_json() and not any(True for part in (chain.allocate, *chain.repair) for _ in _within(part)):
        log.warning("%s: nothing in this chain trains through the whole net and uses that.", _words(problem.compute))


def of_one_process(problem: Problem) -> Problem:
    """The problem with batches as large as the share that one of the world_size has of them."""
    calibration = problem.calibration
    if calibration is None or world_size() == 1:
        return problem
    share = -(-min(calibration.batch_size, len(calibration)) // world_size())
    return replace(problem, calibration=replace(calibration, batch_size=share))


def candidates(problem: Problem) -> Iterator[Compute]:
    """The choices, in the order in which they are tried; what was asked for is part of each."""
    asked = problem.compute
    batch = min(problem.inputs().batch_size, len(problem.inputs()))
    whole = min(asked.micro_batch or batch, batch)
    halves = [whole >> k for k in range(1, whole.bit_length())]
    again = not asked.compile and bool(repeated_blocks(problem.model))
    if asked.compile and any(map(is_batch_norm, problem.model.modules())):
        halves = []  # `Compute.check`
    yield asked
    if again and not asked.checkpoint:
        yield replace(asked, checkpoint=True)
    alone = [size for size in halves if size * 4 >= whole or not again]
    yield from (replace(asked, micro_batch=size) for size in alone)
    if again and not asked.checkpoint:
        yield from (replace(asked, micro_batch=size, checkpoint=True) for size in halves)
    elif asked.checkpoint:
        yield from (replace(asked, micro_batch=size) for size in halves if size not in alone)


def _peak(problem: Problem, candidate: Candidate, training: Training, most: int | None) -> int:
    """Bytes of one step."""
    device = next(iter(problem.dense.values())).device
    held: list[Tensor] = [*problem.dense.values(), *candidate.masks.values()]
    with repeatable(problem.model, problem.seed, "memory"), peak(device, held, most) as found:
        state = training.begin(problem, candidate)
        gradients, _ = training.gradients(problem, state, candidate.masks)
        training.update(state, gradients)
        del gradients, state
    return found.bytes


def _within(value: Any) -> Iterator[Training]:
    """Every training in a method."""
    if isinstance(value, Training):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _within(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _within(getattr(value, field.name))


def _told(found: dict[str, Any]) -> dict[str, Any]:
    limit = _size(found["limit"])
    if found["peak"] is None:
        log.warning(
            "max_memory=%s: nothing in this chain trains through the whole net, there is nothing to choose; repairs "
            "layer by layer are not governed by it.",
            limit,
        )
        return found
    tried = "; ".join(_words(Compute.of(choices)) for choices in found["tried"])
    more = f" (more than that with {tried})" if tried else ""
    picked, used = _words(Compute.of(found["picked"])), _size(found["peak"])
    log.warning("max_memory=%s: a step of training takes %s at the peak, with %s%s.", limit, used, picked, more)
    return found


def _words(compute: Compute) -> str:
    chosen: Mapping[str, Any] = compute.to_json()
    return ", ".join(name if value is True else f"{name}={value}" for name, value in chosen.items()) or "nothing chosen"


def _size(count: int) -> str:
    """In words, rounded up: a limit of so much would do."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or n == "kB")
    return f"{math.ceil(100 * count / unit) / 100:.2f} {name}"


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
