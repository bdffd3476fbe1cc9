"""A limit of memory: one step of training is tried with one choice of `Compute` after another, until one fits.

The order goes from exact to near, and from fast to slow; pieces are halved and halved again:

    1. nothing                     as requested
    2. checkpoint                  the same numbers, a third more time; of models with repeated blocks
    3. pieces down to a quarter    exact but for rounding without batch norm, near with it (`allot.network.batch_norms`)
    4. checkpoint and pieces       down to single samples

The peak of one step is measured: the model, the trained tensors, their optimiser, masks, gradients and activations.
The memory of the interpreter, its libraries and the data comes on top.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from allot.processes import on_first_process, world_size
from allot.run.driver import drive, repeatable
from allot.run.problem import Candidate, Chain, Problem, Rule

log = logging.getLogger("allot")


def choose_compute(
    problem: Problem, chain: Chain, given: int | str | None, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The choices with which training fits into a limit; None without one.

    Args:
        given: the limit, in bytes or like "6GB".
        earlier: the choices that the run began with, which it keeps; None for a new run.
    Returns:
        `{"limit", "asked", "picked", "peak", "tried"}`: bytes; choices of `Compute` that differ from the defaults, as
        requested and as picked; the peak in bytes, None where nothing trains; and the choices that did not fit.
    Raises:
        UsageError: no such limit, or nothing fits.
    """
    trainings = {
        (t.loss, t.blocks, str(t.outputs)): t for part in (chain.allocate, *chain.repair) for t in _trainings_in(part)
    }
    if problem.compute.to_json() and not trainings:
        unused = _in_words(problem.compute)
        log.warning("%s: nothing in this chain trains through the whole net and uses that.", unused)
    if given is None:
        return None
    if problem.calibration and world_size() > 1:  # a step of one process, which has its part of every batch
        part = -(-min(problem.calibration.batch_size, len(problem.calibration)) // world_size())
        problem = replace(problem, calibration=replace(problem.calibration, batch_size=part))
    return on_first_process(lambda: _choose(problem, list(trainings.values()), given, earlier))


def _choose(
    problem: Problem, trainings: Sequence[Training], given: int | str, earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
    limit, requested = memory("max_memory", given), problem.compute.to_json()
    choice: dict[str, Any] = {"limit": limit, "asked": requested, "picked": requested, "peak": None, "tried": []}
    if earlier and (earlier["limit"], earlier["asked"]) == (limit, requested):
        choice = dict(earlier)
    elif trainings:
        rule = Rule(uniform, ("weights", "channels"))
        candidate = drive(Selection(), problem, drive(rule, problem, Candidate.dense(problem)))
        for compute in compute_choices(problem):
            trial = replace(problem, compute=compute)
            try:
                choice["peak"] = max(_peak(trial, candidate, training, limit) for training in trainings)
            except OverLimit:
                choice["tried"].append(compute.to_json())
                continue
            choice["picked"] = compute.to_json()
            break
        else:
            least = max(_peak(trial, candidate, training, None) for training in trainings)
            raise UsageError(
                f"max_memory={given}: the least that a step of training takes is {_size(least)}, with "
                f"{_in_words(compute)}. Allow that, or take a method that does not train, like erk."
            )
    _log_choice(choice)
    return choice


def compute_choices(problem: Problem) -> Iterator[Compute]:
    """The choices in the order of the trials; each includes the requested ones."""
    requested = problem.compute
    batch = min(problem.inputs().batch_size, len(problem.inputs()))
    whole = min(requested.micro_batch or batch, batch)
    halves = [whole >> k for k in range(1, whole.bit_length())]
    recomputes = not requested.compile and bool(repeated_blocks(problem.model))
    if requested.compile and any(map(is_batch_norm, problem.model.modules())):
        halves = []  # `Compute.check`
    yield requested
    if recomputes and not requested.checkpoint:
        yield replace(requested, checkpoint=True)
    large = [size for size in halves if size * 4 >= whole or not recomputes]
    yield from (replace(requested, micro_batch=size) for size in large)
    if recomputes and not requested.checkpoint:
        yield from (replace(requested, micro_batch=size, checkpoint=True) for size in halves)
    elif requested.checkpoint:
        yield from (replace(requested, micro_batch=size) for size in halves if size not in large)


def _peak(problem: Problem, candidate: Candidate, training: Training, most: int | None) -> int:
    """Bytes at the peak of one step."""
    device = next(iter(problem.dense.values())).device
    tensors: list[Tensor] = [*problem.dense.values(), *candidate.masks.values()]
    with repeatable(problem.model, problem.seed, "memory"), peak(device, tensors, most) as measured:
        state = training.begin(problem, candidate)
        gradients, _ = training.gradients(problem, state, candidate.masks)
        training.update(state, gradients)
        del gradients, state
    return measured.bytes


def _trainings_in(value: Any) -> Iterator[Training]:
    """Every training in a method."""
    if isinstance(value, Training):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _trainings_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _trainings_in(getattr(value, field.name))


def _log_choice(choice: Mapping[str, Any]) -> None:
    limit = _size(choice["limit"])
    if choice["peak"] is None:
        log.warning(
            "max_memory=%s: nothing in this chain trains through the whole net, there is nothing to choose; repairs "
            "layer by layer are not governed by it.",
            limit,
        )
        return
    tried = "; ".join(_in_words(Compute.of(choices)) for choices in choice["tried"])
    more = f" (more than that with {tried})" if tried else ""
    picked, peak = _in_words(Compute.of(choice["picked"])), _size(choice["peak"])
    log.warning("max_memory=%s: a step of training takes %s at the peak, with %s%s.", limit, peak, picked, more)


def _in_words(compute: Compute) -> str:
    chosen: Mapping[str, Any] = compute.to_json()
    return ", ".join(name if value is True else f"{name}={value}" for name, value in chosen.items()) or "nothing chosen"


def _size(count: int) -> str:
    """In words, rounded up, so that the size as a limit suffices."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or n == "kB")
    return f"{math.ceil(100 * count / unit) / 100:.2f} {name}"


class OverLimit(Exception):
    """More bytes are alive than the limit allows."""


@dataclass
class Peak:
    """Bytes at the peak; set when the measured block ends."""

    bytes: int = 0


@contextmanager
def peak(device: torch.device, tensors: Iterable[Tensor] = (), most: int | None = None) -> Iterator[Peak]:
    """Measure the most bytes of tensors that are alive on `device` at a time, those of `tensors` included.

    On CUDA the statistics of the device begin anew; temporaries of kernels count there, and only there.

    Raises:
        OverLimit: more than `most` bytes are alive; on CUDA, also where its memory is used up.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield found
        except torch.cuda.OutOfMemoryError as error:
            raise OverLimit from error
        finally:
            found.bytes = torch.cuda.max_memory_allocated(device)
        if most is not None and found.bytes > most:
            raise OverLimit
        return
    live = _LiveStorages(most)
    try:
        for tensor in tensors:
            live.count(tensor)
        with live:
            yield found
    finally:
        found.bytes = live.most


class _LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operators returned and that are still alive."""

    def __init__(self, allowed: int | None) -> None:
        super().__init__()
        self.allowed, self.now, self.most = allowed, 0, 0
        self.sizes: dict[int, int] = {}

    def count(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` as long as it is alive."""
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, storage._cdata).atexit = False
        if self.allowed is not None and self.now > self.allowed:
            raise OverLimit

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.count(value)
        return out
