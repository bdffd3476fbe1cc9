"""Problem, Candidate, Method, and the one driver: the only file that knows files, clocks and signals of a run."""

from __future__ import annotations

import io
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from allot.errors import Stopped
from allot.network.draws import numbered, seeded
from allot.processes import any_process, check_equal, on_first_process, world_size
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import Log, Store


@dataclass(frozen=True)
class Progress:
    """Where a run is: step `step` of `steps` of `stage`, and what that step measured."""

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
    save_seconds: float = 5.0,
) -> Candidate:
    """The candidate that `method` makes of `candidate`; goes on where `store` holds this stage unfinished.

    Where processes share the work, all of them get the candidate of the first one.

    Args:
        stage: names the state file and the lines in steps.jsonl.
        log: what it costs is added here.
        save_seconds: how often the state is saved, at the least after a step.
    Raises:
        Stopped: `should_stop` said so; the state is saved.
    """
    log = log if log is not None else Log()

    def run() -> Candidate:
        return _driven(method, problem, candidate, stage, store, log, on_step, should_stop, save_seconds)

    if world_size() == 1:
        return run()
    own = None
    if getattr(method, "parallel", False):
        own = run()
        check_equal(f"what {stage} keeps of layers", own.allocation.kept)
    found = on_first_process(lambda: own or run(), lambda candidate: (_packed(candidate), log))
    if isinstance(found, Candidate):
        return found
    content, told = found
    log.seconds, log.forward, log.backward = told.seconds, told.forward, told.backward
    return _unpacked(content, problem)


def _packed(candidate: Candidate) -> bytes:
    buffer = io.BytesIO()
    torch.save(candidate.to_state(), buffer)
    return buffer.getvalue()


def _unpacked(content: bytes, problem: Problem) -> Candidate:
    return Candidate.from_state(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"), problem)


def _driven(
    method: Method,
    problem: Problem,
    candidate: Candidate,
    stage: str,
    store: Store | None,
    log: Log,
    on_step: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool] | None,
    save_seconds: float,
) -> Candidate:
    saved = store.saved if store and store.saved and store.saved.stage == stage else None
    if saved:
        candidate = Candidate.from_state(saved.candidate, problem)
        state = saved.state
    else:
        with repeatable(problem.model, problem.seed, stage):
            state = method.init(problem, candidate)
    started = last_saved = time.monotonic()
    before = log.seconds.get(stage, 0.0)

    def save() -> None:
        log.seconds[stage] = before + time.monotonic() - started
        if store:
            store.save(stage, candidate.to_state(), state, log)

    if not saved:
        save()
    while not finished(state):
        if any_process(bool(should_stop and should_stop())):
            save()
            raise Stopped(f"stopped in stage {stage} after step {state['step']} of {state['steps']}")
        with repeatable(problem.model, problem.seed, stage, state["step"]):
            metrics = method.step(problem, candidate, state)
        log.forward += int(metrics["forward"])
        log.backward += int(metrics["backward"])
        if store:
            store.write_step(stage, state["step"], metrics)
        if on_step:
            on_step(Progress(stage, state["step"], state["steps"], metrics))
        if time.monotonic() - last_saved > save_seconds:
            save()
            last_saved = time.monotonic()
    better = method.finish(problem, candidate, state)
    log.seconds[stage] = before + time.monotonic() - started
    return better


@contextmanager
def repeatable(model: nn.Module, seed: int, stage: str, step: int = -1) -> Iterator[None]:
    """While open, torch draws by (seed, stage, step): models and data may draw; the caller's draws go on as before.

    Draws from other generators, Python's and numpy's, are the user's to seed.
    """
    device = next(model.parameters(), torch.zeros(())).device
    with seeded(numbered(numbered(seed, zlib.crc32(stage.encode())), step), [device]):
        yield


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A `should_stop` that the first Ctrl-C (or SIGTERM) turns on; the second one interrupts at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
