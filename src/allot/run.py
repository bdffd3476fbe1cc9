"""Problem, Candidate, Method, and the one driver: the only file that knows files, clocks and signals of a run."""

from __future__ import annotations

import io
import signal
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from allot.allocation import Allocation
from allot.budget import Budget
from allot.calibration import Calibration
from allot.channel_budget import ChannelBudget
from allot.compute import Compute
from allot.errors import Stopped, UsageError
from allot.known import Known
from allot.layers import Scope
from allot.masking import masked
from allot.patterns import Pattern
from allot.scores import ChannelScore, Score
from allot.shares import anyone, check_alike, led, processes
from allot.store import Log, State, Store

Metrics = dict[str, float | int]
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What is asked: nothing in here changes during a run, the user's model included."""

    model: nn.Module
    scope: Scope
    budget: Budget  # of channels, a `ChannelBudget`, which has its surface but for ways down
    pattern: Pattern
    score: Score | ChannelScore
    calibration: Calibration | None = None
    seed: int = 0
    example: Any = None  # a batch of one input, where there is one
    compute: Compute = field(default_factory=Compute)
    known: Known | None = field(default=None, repr=False, compare=False)  # where it is one of a sweep's

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model as it came, by name, detached."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        # a tensor made in inference mode cannot take part in training
        return {n: (t.clone() if t.is_inference() else t).detach() for n, t in tensors.items()}

    @property
    def channels(self) -> ChannelBudget:
        """The budget of a problem of channels.

        Raises:
            UsageError: single weights are pruned.
        """
        if not isinstance(self.budget, ChannelBudget):
            raise UsageError("this shares out channels: give --pattern channels.")
        return self.budget

    def inputs(self) -> Calibration:
        """The calibration data.

        Raises:
            UsageError: the problem has none.
        """
        if self.calibration is None:
            raise UsageError("this needs calibration data: give --data (calibration in Python).")
        return self.calibration

    def repeats(self) -> bool:
        """Whether the calibration samples come the same again: see `Calibration.repeats`."""
        look = self.inputs().repeats
        return self.known.once(self.about("repeats"), look) if self.known else look()

    def once(self, what: Hashable, make: Callable[[], T], *, seeded: bool = True) -> T:
        """`make()`; in a sweep, what an earlier run got from it, not to be changed in place.

        Args:
            what: all that it depends on beside the dense model, the layers, the seed and the calibration batches.
            seeded: whether it depends on the latter two at all.
        """
        if self.known is None or (seeded and self.calibration and not self.repeats()):
            return make()
        return self.known.once(self.about(what, seeded=seeded), make, seeded=seeded)

    def about(self, what: Hashable, *, seeded: bool = True) -> Hashable:
        """`what`, of these layers, this seed and these calibration batches."""
        layers = tuple((layer.name, layer.min_kept, layer.max_kept) for layer in self.scope)
        return what, layers, (self.seed, self.calibration.order if self.calibration else None) if seeded else None


@dataclass(frozen=True)
class Candidate:
    """What flows through the chain.

    Attributes:
        allocation: how much each layer keeps.
        masks: tensor name -> bool mask, every layer among them; empty until weights or channels were selected.
        channels: group -> channels kept, ascending; empty where single weights are pruned.
        tensors: only the tensors that differ from the dense model, before masking.
        diagnostics: method -> what it has to tell about how it came to this, JSON-ready, for the report.
    """

    allocation: Allocation
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    _effective: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def dense(cls, problem: Problem) -> Candidate:
        """Everything kept."""
        total = {term.name: term.total for term in problem.budget.terms}
        return cls(Allocation(dict.fromkeys(total, 1.0), total))

    def effective(self, problem: Problem) -> dict[str, Tensor]:
        """The tensors to put in place of the model's own: what differs from it, masks applied.

        The dict is the caller's; the tensors are made once and not to be changed in place.
        """
        if self._effective.get("problem") is not problem:
            tensors = dict(self.tensors)
            for name, mask in self.masks.items():
                tensors[name] = masked(tensors.get(name, problem.dense[name]), mask)
            self._effective.update(problem=problem, tensors=tensors)
        return dict(self._effective["tensors"])

    def to_state(self) -> State:
        """As dicts of tensors and numbers, for a file."""
        allocation = {"density": dict(self.allocation), "total": self.allocation.total}
        tensors = {"masks": dict(self.masks), "tensors": dict(self.tensors)}
        channels = {name: list(kept) for name, kept in self.channels.items()}
        return {**allocation, **tensors, "channels": channels, "diagnostics": dict(self.diagnostics)}

    @classmethod
    def from_state(cls, state: State, problem: Problem) -> Candidate:
        """The inverse of `to_state`, on the devices of the problem's model."""

        def placed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(problem.dense[name].device) for name, tensor in tensors.items()}

        allocation = Allocation(state["density"], state["total"])
        channels = {name: tuple(kept) for name, kept in state["channels"].items()}
        return cls(allocation, placed(state["masks"]), placed(state["tensors"]), channels, state["diagnostics"])


class Method(Protocol):
    """One paper or baseline: a frozen value of hyperparameters and four functions.

    A state is a dict of tensors, numbers and strings (nested dicts and lists allowed) that holds `step` and `steps`;
    `step` works on it in place. Methods see no path, clock, progress bar or signal.

    Attributes:
        role: "allocate" or "repair".
        shares: of an allocator, what it can share out: "weights", "channels" or both; a repair does without.
        needs_data: whether `problem.calibration` has to be there.
        parallel: may be left out. True: where processes share the work, all of them run this method, on shares of
            batches, and it adds up over them what it finds (`allot.shares.total`, or what it uses does: `Training`,
            `Moments`, `Evidence`). Else one process runs it, on whole batches.
        streams: of a repair that looks at each layer for itself, how it goes block by block: see `allot.streaming`.
            Others do without.
    """

    @property
    def role(self) -> str: ...

    @property
    def needs_data(self) -> bool: ...

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """The state before the first step."""
        ...

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step, in place; what happened, with `forward` and `backward`: samples pushed through any network."""
        ...

    def done(self, state: State) -> bool:
        """Whether no step is left."""
        ...

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The better candidate."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A choice of parts by name."""

    allocate: str
    score: str = "magnitude"
    pattern: str = "unstructured"
    repair: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A method whose whole work is one function of the problem: `densities(problem)`, brought to the budget.

    Only proportions matter in what the function returns: `Budget.counts` makes whole numbers that meet the budget.
    """

    densities: Callable[[Problem], Mapping[str, float]]
    shares: tuple[str, ...] = field(default=("weights",), metadata={"option": False})

    role = "allocate"
    needs_data = False

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Nothing decided yet."""
        return {"step": 0, "steps": 1, "kept": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """Decide."""
        state["kept"] = problem.budget.counts(self.densities(problem))
        state["step"] = 1
        return {"forward": 0, "backward": 0, "kept": sum(state["kept"].values())}

    def done(self, state: State) -> bool:
        """After one step."""
        return bool(state["step"] == 1)

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the allocation."""
        return replace(candidate, allocation=Allocation.of(state["kept"], candidate.allocation.total))


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

    if processes() == 1:
        return run()
    own = None
    if getattr(method, "parallel", False):
        own = run()
        check_alike(f"what {stage} keeps of layers", own.allocation.kept)
    found = led(lambda: own or run(), lambda candidate: (_packed(candidate), log))
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
    while not method.done(state):
        if anyone(bool(should_stop and should_stop())):
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
    finished = method.finish(problem, candidate, state)
    log.seconds[stage] = before + time.monotonic() - started
    return finished


@contextmanager
def repeatable(model: nn.Module, seed: int, stage: str, step: int = -1) -> Iterator[None]:
    """While open, torch draws by (seed, stage, step): models and data may draw; the caller's draws go on as before.

    Draws from other generators, Python's and numpy's, are the user's to seed.
    """
    device = next(model.parameters(), torch.zeros(())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        number = ((seed * 1_000_003 + zlib.crc32(stage.encode())) * 1_000_003 + step) % 2**63
        if device.type == "cpu":  # torch.manual_seed notes a stack trace for every kind of device that is not there
            torch.default_generator.manual_seed(number)
        else:
            torch.manual_seed(number)
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
