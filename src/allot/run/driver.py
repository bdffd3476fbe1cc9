"""The driver that runs every method: the only file that knows clocks and signals of a run, and when it is saved."""

from __future__ import annotations

import ctypes
import io
import logging
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from allot.errors import Lost, Stopped
from allot.network.draws import numbered, seeded
from allot.processes import any_process, check_equal, on_first_process, world_size
from allot.run.guard import Guard, Looks
from allot.run.problem import Candidate, Method, Metrics, Problem, finished, innermost
from allot.run.store import SAVE_SECONDS, Log, Store


@dataclass(frozen=True)
class Progress:
    """The position of a run: step `step` of `steps` of `stage`, with the metrics of that step."""

    stage: str
    step: int
    steps: int
    metrics: Metrics


def drive(
    method: Method,
    problem: Problem,
    candidate: Candidate,
    *,
    stage: str = "stage",
    store: Store | None = None,
    log: Log | None = None,
    on_step: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    save_seconds: float = SAVE_SECONDS,
    guard: Guard | None = None,
) -> Candidate:
    """The candidate that `method` makes of `candidate`; resumes where `store` holds this stage unfinished.

    With several processes, all of them get the candidate of the first one.

    Args:
        stage: names the state file and the lines in steps.jsonl.
        log: seconds and samples of the stage are added to it.
        save_seconds: the state is saved after the first step that ends this long after the last save, and no sooner
            than 30 times as long as that save took: the weights of a language model are hundreds of megabytes.
        guard: measures the net that comes out, and on the way where the method is `watched`. A net that is worse than
            `candidate` is not returned.
    Raises:
        Stopped: `should_stop` returned True; the state is saved.
    """
    log = log if log is not None else Log()

    def run() -> Candidate:
        saved = store.saved if store and store.saved and store.saved.stage == stage else None
        if saved:
            start, state = Candidate.from_state(saved.candidate, problem), saved.state
        else:
            with repeatable(problem.model, problem.seed, stage):
                start, state = candidate, method.init(problem, candidate)
        looks = None
        if guard and getattr(method, "watched", False):
            looks = Looks(problem, method, start, saved.best if saved else None)
        started = time.monotonic()
        pause, last_saved = save_seconds, started
        before = log.seconds.get(stage, 0.0)

        def save() -> None:
            log.seconds[stage] = before + time.monotonic() - started
            if store:
                store.save(stage, start.to_state(), state, log, looks.best if looks else None)

        if not saved:
            save()
        while not finished(state):
            if any_process(bool(should_stop and should_stop())):
                save()
                raise Stopped(f"stopped in stage {stage} after step {state['step']} of {state['steps']}")
            with repeatable(problem.model, problem.seed, stage, state["step"]):
                metrics = method.step(problem, start, state)
            log.forward += int(metrics["forward"])
            log.backward += int(metrics["backward"])
            if looks:
                metrics |= looks.after_step(state)
            if guard:
                guard.note_look(stage, state["step"], metrics)
            if store:
                store.write_step(stage, state["step"], metrics)
            if on_step:
                on_step(Progress(stage, state["step"], state["steps"], metrics))
            if (begun := time.monotonic()) - last_saved > pause:
                save()
                last_saved = time.monotonic()
                pause = max(save_seconds, 30 * (last_saved - begun))
        better = method.finish(problem, start, state)
        if looks and guard:
            better = guard.best_of(stage, state["steps"], looks, better)
        if guard:
            starts_over = getattr(innermost(method), "starts_over", False)
            better = guard.after(stage, state["step"], start, better, starts_over=starts_over)
        log.seconds[stage] = before + time.monotonic() - started
        return better

    if world_size() == 1:
        return run()
    finished_here = None
    if getattr(method, "parallel", False):
        finished_here = run()
        check_equal(f"what {stage} keeps of layers", finished_here.allocation.kept)
    result = on_first_process(lambda: finished_here or run(), lambda candidate: (_pack_candidate(candidate), log))
    if isinstance(result, Candidate):
        return result
    content, sent_log = result
    vars(log).update(vars(sent_log))
    return _unpack_candidate(content, problem)


def _pack_candidate(candidate: Candidate) -> bytes:
    buffer = io.BytesIO()
    torch.save(candidate.to_state(), buffer)
    return buffer.getvalue()


def _unpack_candidate(content: bytes, problem: Problem) -> Candidate:
    return Candidate.from_state(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"), problem)


phases = logging.getLogger("allot.phases")


@contextmanager
def phase(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """One phase of the finish of a run: logged as a debug message when it begins, with its seconds when it ends.

    Args:
        seconds: where the seconds of the phase are noted.
    """
    give_back()
    phases.debug(name)
    started = time.monotonic()
    yield
    taken = time.monotonic() - started
    if seconds is not None:
        seconds[name] = round(taken, 3)
    phases.info("%s: %.1f s", name, taken)


def give_back() -> None:
    """Return memory that was freed to the system: the C library keeps that of tensors of a few megabytes for later."""
    with suppress(OSError, TypeError, AttributeError):  # of glibc; other libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def repeatable(model: nn.Module, seed: int, stage: str, step: int = -1) -> Iterator[None]:
    """While open, torch draws by (seed, stage, step): the caller's random stream does not move.

    Other generators, Python's and numpy's, are seeded by the user.
    """
    device = next(model.parameters(), torch.zeros(())).device
    with seeded(numbered(numbered(seed, zlib.crc32(stage.encode())), step), [device]):
        yield


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A `should_stop` that the first Ctrl-C (SIGTERM, or SIGHUP) turns on; the second one interrupts at once.

    A signal that is ignored stays ignored, as SIGHUP under nohup. Where another process is lost, SIGTERM is ignored
    from then on: torchrun sends it at once to the processes that are left, and the error is still to be reported.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    numbers = [number for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN]
    handlers: dict[int, Any] = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop.is_set
    except Lost:
        handlers[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
