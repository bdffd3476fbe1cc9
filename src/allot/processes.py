"""Work shared out over the processes of torchrun; of one process alone, every sum here is its own part.

    samples    each process pushes its share of every batch, and `total` adds up what they found: sums over the batch
    items      trials and sensitivities: each process takes one, with whole batches (`each`)
    the rest   one process does it and tells the others (`led`); a method that says nothing about sums is such a rest

All processes hold the same state after every step (but for the dense net's answers, which each may remember of what it
tried), so that any number of them goes on from what one has saved.
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
PATIENCE = timedelta(days=7)  # of processes that wait for one that measures or scores; one that dies is noticed
_open = False  # whether work is shared out


def launched() -> bool:
    """Whether torchrun started this process, with others."""
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdigit() and int(count) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def processes() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if _open else 1


def place() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if _open else 0


@contextmanager
def sharing() -> Iterator[None]:
    """While open, `prune`, `sweep` and `evaluate` share their work out over the processes that torchrun started.

    Every process calls the same, with the same model and data; the first one writes the run directory. On a CUDA
    device NCCL carries what they tell each other, else gloo. Without torchrun, nothing changes.

    Raises:
        UsageError: `torch.distributed` cannot begin.
    """
    global _open
    own = not dist.is_initialized()
    if own and not launched():
        yield
        return
    try:
        if own:
            both = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the processes of torchrun do not find each other: {error}") from error
    before, _open = _open, dist.get_world_size() > 1
    try:
        yield
    finally:
        _open = before
        if own and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """While open, this process works by itself: batches are whole, sums its own."""
    global _open
    before, _open = _open, False
    try:
        yield
    finally:
        _open = before


def total(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor, added up over the processes: one exchange for each dtype and device."""
    if processes() == 1 or not tensors:
        return list(tensors)
    found = list(tensors)
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.device), []).append(i)
    for places in alike.values():
        flat = torch.cat([tensors[i].detach().flatten() for i in places])
        with _exchange():
            dist.all_reduce(flat)
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
            found[i] = part.view(tensors[i].shape)
    return found


def total_number(number: float) -> float:
    """A number, added up over the processes."""
    return number if processes() == 1 else float(total([torch.tensor(number, dtype=torch.float64)])[0])


def stacked(tensor: Tensor) -> Tensor:
    """The tensors of all processes, of one shape, in their order: `[processes, *shape]`."""
    if processes() == 1:
        return tensor[None]
    found = [torch.empty_like(tensor) for _ in range(processes())]
    with _exchange():
        dist.all_gather(found, tensor.contiguous())
    return torch.stack(found)


def gathered(value: T) -> list[T]:
    """What each process says, in their order; tensors have to be on the CPU."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    with _exchange():
        dist.all_gather_object(found, value)
    return found


def led(function: Callable[[], T], tell: Callable[[T], Any] | None = None) -> T | Any:
    """What `function` gives in the first process, told to the others, which wait; what it raises is raised in all.

    Args:
        tell: what the others get instead of the value.
    """
    if processes() == 1:
        return function()
    told: list[Any] = [None, None]
    value: Any = None
    failed: BaseException | None = None
    if place() == 0:
        try:
            with alone():
                value = function()
            told[0] = value if tell is None else tell(value)
        except Exception as error:  # noqa: BLE001 - raised below, in every process
            failed = error
            told[1] = _sent(error)
    with _exchange():
        dist.broadcast_object_list(told, src=0)
    if failed or told[1]:
        raise failed or told[1]
    return value if place() == 0 else told[0]


def each(items: Sequence[Any], function: Callable[[Any], T]) -> list[T]:
    """`function` of the first few items, as many as there are processes: each takes one, by itself.

    What it gives has to hold tensors on the CPU only.
    """
    few = items[: processes()]
    if processes() == 1:
        return [function(item) for item in few]
    own = None
    for item in few[place() : place() + 1]:
        with alone():
            own = function(item)
    return list(gathered(own)[: len(few)])  # type: ignore[arg-type]


def anyone(answer: bool) -> bool:  # noqa: FBT001 - the one thing that it is about
    """Whether any process says yes."""
    return answer if processes() == 1 else total_number(float(answer)) > 0


def check_alike(what: str, value: Any) -> None:
    """Raises:
    UsageError: processes differ in it.
    """
    said = gathered(value)
    if any(other != said[0] for other in said):
        raise UsageError(
            f"the processes of torchrun differ in {what}: each has to load the same, and what is drawn at random, by "
            "Python or numpy too, has to be seeded alike."
        )


def speaks() -> bool:
    """Whether this process is the first of the run to say what went wrong; the one that knows first knows best."""
    if not launched():
        return True
    try:
        told = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5)
        )
        return told.add(f"allot/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError, KeyError):
        return True  # what kept count is gone


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


def _sent(error: Exception) -> Exception:
    """The error, or its message where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
