"""Data-parallel work over the processes that torchrun starts; with one process, every sum is that process's sum.

    samples    each process pushes its part of every batch, and `all_reduce` adds the results up: sums over the batch
    items      trials and sensitivities: each process takes one item, with whole batches (`one_per_process`)
    the rest   the first process does the work and sends the result to the others (`on_first_process`); so do methods
               that are not `parallel`

After every step all processes hold the same state, except that each may keep dense outputs of its trials. So a run
resumes with any number of processes.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from allot.errors import Lost, UsageError

T = TypeVar("T")
TIMEOUT = timedelta(days=7)  # processes wait for one that measures or scores; the end of a process is noticed at once
_sharing = False  # whether `sharing` is open


def launched() -> bool:
    """Whether torchrun started this process, with others."""
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdigit() and int(count) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def world_size() -> int:
    """Number of processes that share the work; 1 outside of `sharing`."""
    return dist.get_world_size() if _sharing else 1


def rank() -> int:
    """Rank of this process, from 0; 0 outside of `sharing`."""
    return dist.get_rank() if _sharing else 0


@contextmanager
def sharing() -> Iterator[None]:
    """While open, `prune`, `sweep` and `evaluate` divide their work among the processes that torchrun started.

    Every process makes the same calls, with the same model and data; the first process writes the run directory. On
    CUDA devices the processes communicate by NCCL, else by gloo. Without torchrun, nothing changes.

    Raises:
        UsageError: `torch.distributed` cannot begin.

    >>> with sharing():  # without torchrun: one process
    ...     world_size()
    1
    """
    global _sharing
    starts = not dist.is_initialized()
    if starts and not launched():
        yield
        return
    try:
        if starts:
            both = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the processes of torchrun do not find each other: {error}") from error
    before, _sharing = _sharing, dist.get_world_size() > 1
    try:
        yield
    finally:
        _sharing = before
        if starts and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def single_process() -> Iterator[None]:
    """While open, this process works by itself: batches are whole and sums are not exchanged."""
    global _sharing
    before, _sharing = _sharing, False
    try:
        yield
    finally:
        _sharing = before


def all_reduce(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over the processes, with one exchange for each dtype and device."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    sums = list(tensors)
    by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(i)
    for indices in by_kind.values():
        flat = torch.cat([tensors[i].detach().flatten() for i in indices])
        with _exchange():
            dist.all_reduce(flat)
        for i, part in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):
            sums[i] = part.view(tensors[i].shape)
    return sums


def all_reduce_number(number: float) -> float:
    """A number summed over the processes."""
    return number if world_size() == 1 else float(all_reduce([torch.tensor(number, dtype=torch.float64)])[0])


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, which have one shape, by rank: `[world_size, *shape]`."""
    if world_size() == 1:
        return tensor[None]
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    with _exchange():
        dist.all_gather(tensors, tensor.contiguous())
    return torch.stack(tensors)


def all_gather_object(value: T) -> list[T]:
    """The values of all processes, by rank; tensors in them have to be on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _exchange():
        dist.all_gather_object(values, value)
    return values


def on_first_process(function: Callable[[], T], send: Callable[[T], Any] | None = None) -> T | Any:
    """`function()` of the first process, in all of them; the others wait. An exception is raised in every process.

    Args:
        send: value -> what the other processes get instead of the value.
    """
    if world_size() == 1:
        return function()
    message: list[Any] = [None, None]  # value, exception
    value: Any = None
    raised: BaseException | None = None
    if rank() == 0:
        try:
            with single_process():
                value = function()
            message[0] = value if send is None else send(value)
        except Exception as error:  # noqa: BLE001 - raised below, in every process
            raised = error
            message[1] = _picklable(error)
    with _exchange():
        dist.broadcast_object_list(message, src=0)
    if raised or message[1]:
        raise raised or message[1]
    return value if rank() == 0 else message[0]


def one_per_process(items: Sequence[Any], function: Callable[[Any], T]) -> list[T]:
    """`function` of the first `world_size()` items: each process takes one, by itself.

    Tensors in what `function` returns have to be on the CPU.
    """
    items = items[: world_size()]
    if world_size() == 1:
        return [function(item) for item in items]
    result = None
    for item in items[rank() : rank() + 1]:
        with single_process():
            result = function(item)
    return list(all_gather_object(result)[: len(items)])  # type: ignore[arg-type]


def any_process(answer: bool) -> bool:  # noqa: FBT001 - its only argument
    """Whether `answer` is True in any process."""
    return answer if world_size() == 1 else all_reduce_number(float(answer)) > 0


def check_equal(what: str, value: Any) -> None:
    """Raises:
    UsageError: processes have different values; `what` names them.
    """
    values = all_gather_object(value)
    if any(other != values[0] for other in values):
        raise UsageError(
            f"the processes of torchrun differ in {what}: each has to load the same, and what is drawn at random, by "
            "Python or numpy too, has to be seeded alike."
        )


def first_to_report() -> bool:
    """Whether this process is the first of the run to report an error: the cause comes before its consequences."""
    if not launched():
        return True
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5)
        )
        return store.add(f"allot/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError, KeyError):
        return True  # the store that counts reports is gone


@contextmanager
def _exchange() -> Iterator[None]:
    """Raises:
    Lost: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("connection", "peer", "socket", "timed out", "nccl")):
            raise
        raise Lost(
            "another process of this run ended: by an error, which it said above, or killed, as where memory is short "
            "(torchrun names it below). What is saved is kept: the same command goes on from there, with any number of "
            "processes."
        ) from error


def _picklable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its message where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - its class may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
