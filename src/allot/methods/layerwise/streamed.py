"""Layer-wise repairs block by block: the model stays on the host, one block at a time is on the device.

`Streamed` runs the modules before the first block over all calibration samples once, and keeps on the host

    x_d, x_s     the inputs of a block, of every sample, in the dense net and in the sparse one

Then for each block, front to back: the block comes to the device, the repair runs on it as if it were the model, its
new tensors go back to the host, and x_d and x_s become the block's outputs. The modules outside the blocks are on the
device together, without the blocks, while a layer or batch norm among them is repaired: before the first block or after
the last one. A method says how it may be streamed by an attribute `streams`:

    "passes"   once through the samples (for each net); x_s of the next block is the block's output while the repair ran
    "result"   the inputs of the next block are the outputs of the repaired block
    "dense"    the same for x_s; x_d of the next block is the dense block's output while the repair ran
    "given"    the method looks at the sparse net alone, which has no masks yet; x_s of the next block is the block's
               output as the method got it, made while the method ran

New tensors, new masks and diagnostics leave a block under the model's names. A method with an attribute `by_blocks` is
streamed to the device where the model is, without a request: True: where the model has blocks, "needed": or not at all.

x_d and x_s are not in the state: a resumed run makes them again, a block a step. docs/streaming.md says what the host
has to hold, and where results differ from those on the whole net.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from allot.errors import BudgetError, PatternError, UsageError, first_line
from allot.methods.layerwise.blocks import find_blocks, size_of
from allot.methods.layerwise.part_names import merged, outer_score, part_allocation, renamed, renamed_text
from allot.methods.layerwise.streamed_block import FLAG, BlockPart, ModelPart, OutsidePart, PartInputs, is_close, usable
from allot.network.call import call
from allot.network.layers import Scope, is_batch_norm, places_by_parameter
from allot.network.trees import map_tensors, tensors_in
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.scores import WeightScore
from allot.run.store import State

log = logging.getLogger("allot")

WAYS = ("passes", "result", "dense", "given")
OF_RESULT = ("result", "dense")
BOTH = (False, True)  # nets: the dense one, the sparse one


@dataclass(frozen=True)
class Streamed:
    """A layer-wise repair that needs the device for one block at a time.

    Args:
        method: the repair, one with `streams`.
        device: where blocks go; the model stays where it is.
    Raises:
        UsageError: a method that does not stream, or a device that is not there. From `init`: a model without blocks.
        BudgetError: from `step`: a repair keeps another number of weights than the layer's allocation.
    State:
        lengths: steps of each part of the model, front to back.
        part: number of the part that is repaired now.
        inner: the method's state on this part; empty before the part begins.
        tensors: parameter -> repaired tensor, in the model's shapes, on the host.
        masks: parameter -> new mask, likewise; only masks that the repair moved.
        diagnostics: of the parts so far: entries by layer stand under the model's names, lists follow one another, and
            of other values the last part's counts.
        pushed: samples pushed through a part, times the part's bytes: "forward", and "backward" likewise.
    """

    method: Method
    device: torch.device

    _live: ClassVar[Any] = None
    _found: ClassVar[Any] = None
    role = "repair"
    needs_data = True

    def __post_init__(self) -> None:
        if getattr(self.method, "streams", None) not in WAYS:
            raise UsageError(f"{type(self.method).__name__} needs the whole net at once: it cannot be streamed.")
        object.__setattr__(self, "device", usable(self.device))
        object.__setattr__(self, "_live", {})  # the run whose state is worked on
        object.__setattr__(self, "_found", {})  # the blocks of the model that was looked at last

    @property
    def parallel(self) -> bool:
        """Whether processes share the method's passes; each of them makes all inputs of every block."""
        return bool(self.method.streams in OF_RESULT and getattr(self.method, "parallel", False))  # type: ignore[attr-defined]

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """No block begun; how many steps each of them takes is known."""
        try:
            run = _StreamedRun(self, problem, candidate)
        except UsageError as error:
            raise UsageError(f"{error} Leave stream out.") from error
        lengths = run.lengths()
        state: State = {"step": 0, "steps": sum(lengths), "lengths": lengths, "part": 0, "inner": {}}
        state |= {"tensors": {}, "masks": {}, "diagnostics": {}, "pushed": {"forward": 0, "backward": 0}}
        self._live.update(state=state, problem=problem, candidate=candidate, run=run)
        return state

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of the repair on the current block; after its last one the next block's inputs are made."""
        run = self._run_of(problem, candidate, state)
        before = dict(state["pushed"])
        metrics: Metrics
        if run.number < state["part"]:
            metrics = {"again": run.number}
            run.repeat_part(state)
        else:
            metrics = run.step(state)
        return metrics | {way: count // run.size - before[way] // run.size for way, count in state["pushed"].items()}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        self._live.clear()
        self._found.clear()
        diagnostics = {**candidate.diagnostics, **state["diagnostics"]}
        return replace(_repaired(candidate, state), diagnostics=diagnostics)

    def _run_of(self, problem: Problem, candidate: Candidate, state: State) -> _StreamedRun:
        """The run that this state belongs to; a new one at the first part where the state was loaded."""
        live: dict[str, Any] = self._live
        arguments = {"state": state, "problem": problem, "candidate": candidate}
        if any(live.get(key) is not value for key, value in arguments.items()):
            live.clear()
            live.update(arguments, run=_StreamedRun(self, problem, candidate))
        return live["run"]


def by_blocks(method: Method, problem: Problem) -> Method:
    """The method, `Streamed` to the device where the model is if the method says `by_blocks` and the model has blocks.

    Raises:
        UsageError: a method that needs blocks, for a model that has none.
    """
    if not (wanted := getattr(method, "by_blocks", False)):
        return method
    streamed = Streamed(method, next(iter(problem.dense.values())).device)
    try:
        _StreamedRun(streamed, problem, Candidate.dense(problem)).check_every_sample()
    except Exception as error:  # what a model raises that cannot run two samples at once, say
        if wanted != "needed":
            log.debug("%s runs the whole net: %s", type(method).__name__, error)
            return method
        reason = str(error) if isinstance(error, UsageError) else first_line(error)
        raise UsageError(f"{type(method).__name__} repairs a model block by block: {reason}") from error
    return streamed


PartTask = tuple[ModelPart, Problem, Candidate]  # a part, with problem and candidate as the method gets them


class _StreamedRun:
    """The progress of one run: the blocks, the inputs of the current part, and this part while it is on the device.

    Part 0 is the modules before the blocks, part i block i, the last one the modules after the blocks.
    """

    def __init__(self, streamed: Streamed, problem: Problem, candidate: Candidate) -> None:
        self.method, self.device = streamed.method, streamed.device
        way = streamed.method.streams  # type: ignore[attr-defined]
        self.passes, self.given = way not in OF_RESULT, way == "given"
        self.recorded = {"result": (), "dense": (False,)}.get(way, BOTH)  # nets, while the method runs
        self.problem, self.candidate = problem, candidate
        self.host = next(iter(problem.dense.values())).device
        calibration = problem.inputs()
        pair = [0, min(1, len(calibration) - 1)]  # where there is one sample, that sample twice
        found, known = streamed._found, {"model": problem.model, "calibration": problem.calibration}
        new = any(found.get(key) is not value for key, value in known.items())
        if new:
            found.clear()
            self.sequence = find_blocks(problem.model, calibration.pick(pair[:1]), calibration.pick(pair))
        else:
            self.sequence = found["sequence"]
        self.size = size_of(problem.model)
        self.places = places_by_parameter(problem.model)
        self.last = len(self.sequence.blocks) + 1
        self.number = 0  # of the current part
        self.inputs: dict[bool, PartInputs] = {}
        self.task: PartTask | None = None
        if new:
            self._check_parts_match_model(pair)
            found.update(known, sequence=self.sequence)

    def check_every_sample(self) -> None:
        """Raises:
        UsageError: samples enter the blocks with other arguments than the first two do, or in other shapes.
        """
        part, problem, _ = self._task_on(0, self.host, self.candidate)
        with part.recording(BOTH), torch.no_grad():
            for numbers in torch.arange(part.count).split(problem.inputs().batch_size):
                call(part, {}, numbers)

    def lengths(self) -> list[int]:
        """How many steps the method takes in each part; 0 where there is nothing for it."""
        lengths = []
        for number in range(self.last + 1):
            _, problem, candidate = self._task_on(number, self.host, self.candidate)
            modules = self.problem.model.named_modules()
            repaired = len(problem.scope) or any(is_batch_norm(m) and self._part_of(n) == number for n, m in modules)
            lengths.append(int(self.method.init(problem, candidate)["steps"]) if repaired else 0)
        return lengths

    def step(self, state: State) -> Metrics:
        """One step of the method, after parts that need none were passed."""
        while not state["lengths"][self.number]:
            self._leave_part(state, self._finished_task(state))
            state["part"] = self.number
        if self.task is None:
            self.task = self._task_on(self.number, self.device, self._current(state))
            inner = state["inner"]
            done = inner.get("step", 0)
            state["inner"] = (
                map_tensors(lambda tensor: tensor.to(self.device), inner)
                if inner and not self.passes
                else self.method.init(*self.task[1:])
            )
            while state["inner"]["step"] < done:  # its first steps recorded inputs that the state does not keep
                self._method_step(state, self.task, state["inner"])
        metrics = self._method_step(state, self.task, state["inner"])
        state["step"] += 1
        state["lengths"][self.number] = state["inner"]["steps"]  # some methods learn in their first step how many
        state["steps"] = sum(state["lengths"])
        if finished(state["inner"]):
            part, problem, candidate = self.task
            candidate, self.task = replace(candidate), None  # frees its masked weights
            better = self.method.finish(problem, candidate, state["inner"])
            self._keep_changes(state, part, candidate, better)
            state["inner"] = {}
            self._leave_part(state, (part, problem, candidate if self.given else better))
            state["part"] = self.number
        return metrics

    def repeat_part(self, state: State) -> None:
        """Run a part that is repaired already, for the inputs of the next one."""
        if not (state["lengths"][self.number] and self.passes):
            self._leave_part(state, self._finished_task(state))
            return
        # as the method first got it
        task = part, problem, candidate = self._task_on(self.number, self.device, self.candidate)
        inner = self.method.init(problem, candidate)
        while not finished(inner):
            self._method_step(state, task, inner)
        better = candidate if self.given else self.method.finish(problem, candidate, inner)
        self._leave_part(state, (part, problem, better))

    def _finished_task(self, state: State) -> PartTask:
        """The current part for a pass with what is repaired so far; before the blocks it runs where the model is."""
        return self._task_on(self.number, self.device if self.number else self.host, self._current(state))

    def _current(self, state: State) -> Candidate:
        """The candidate that the method goes by in the next part."""
        return self.candidate if self.given else _repaired(self.candidate, state)

    def _keep_changes(self, state: State, part: ModelPart, before: Candidate, after: Candidate) -> None:
        """Raises:
        BudgetError: a mask of a layer with another number of weights than before.
        """
        for name, value in after.tensors.items():
            if name != FLAG and value is not before.tensors.get(name):
                state["tensors"][part.outer_name(name)] = value.to(self.host)
        for name, mask in after.masks.items():
            if mask is before.masks.get(name):
                continue
            outer, kept = part.outer_name(name), int(mask.sum())
            if (wanted := self.candidate.allocation.kept.get(outer, kept)) != kept:
                raise BudgetError(
                    f"{outer}: {type(self.method).__name__} keeps {kept:,} weights of {wanted:,} that are allocated: a "
                    "repair may move weights, not change their number."
                )
            state["masks"][outer] = mask.to(self.host)
        names = self._outer_names(part)
        state["diagnostics"] = merged(state["diagnostics"], renamed(dict(after.diagnostics), names))

    def _outer_names(self, part: ModelPart) -> dict[str, str]:
        """Tensor in the part -> its name in the model."""
        return {inner: outer for outer in self.problem.dense if (inner := part.inner_name(outer)) is not None}

    def _method_step(self, state: State, task: PartTask, inner: State) -> Metrics:
        part, problem, candidate = task
        try:
            with part.recording(self.recorded):
                metrics = self.method.step(problem, candidate, inner)
        except (UsageError, BudgetError, PatternError) as error:
            raise type(error)(renamed_text(str(error), self._outer_names(part))) from error
        for way in state["pushed"]:
            state["pushed"][way] += int(metrics[way]) * self._part_size(self.number)
        return metrics

    def _leave_part(self, state: State, task: PartTask) -> None:
        """Make the inputs of the next part, where there is a part left to repair, and go to it."""
        part, problem, candidate = task
        if any(state["lengths"][self.number + 1 :]):
            self.inputs = self._next_inputs(state, part, problem, candidate)
        part.release()
        self.number += 1

    def _next_inputs(
        self, state: State, part: ModelPart, problem: Problem, candidate: Candidate
    ) -> dict[bool, PartInputs]:
        """The inputs of the next part in both nets; the same ones where the nets do not differ so far."""
        changed = part.changes_with({*candidate.tensors, *candidate.masks})
        alike = part.inputs.get(False) is part.inputs.get(True) and True not in part.next_inputs and not changed
        size = problem.inputs().batch_size
        nets = (True,) if self.given else (False,) if alike else (False, True)
        for sparse in nets:
            if sparse in part.next_inputs and bool(part.next_inputs[sparse].hidden.filled.all()):
                continue
            with part.recording(BOTH), torch.no_grad():
                for numbers in torch.arange(len(problem.inputs())).split(size):
                    call(part, candidate.effective(problem) if sparse else {}, numbers)
                    state["pushed"]["forward"] += len(numbers) * self._part_size(self.number)
        return part.next_inputs if len(nets) == 2 else dict.fromkeys((False, True), part.next_inputs[nets[0]])

    def _task_on(self, number: int, device: torch.device, candidate: Candidate) -> PartTask:
        """A part on a device, and problem and candidate in the names of the part."""
        problem = self.problem
        calibration = problem.inputs()
        part = self._part(number, device, len(calibration), calibration.pick)
        part.inputs = self.inputs

        def within(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            renamed = ((part.inner_name(name), value) for name, value in values.items())
            return {name: value.to(device) for name, value in renamed if name is not None}

        layers = tuple(
            replace(
                layer,
                name=str(part.inner_name(layer.name)),
                aliases=tuple(str(part.inner_name(alias)) for alias in layer.aliases),
            )
            for layer in problem.scope
            # of a tied weight outside the blocks, the last part that uses it
            if max(self._part_of(place.module_name) for place in self.places[layer.name] if place.kind) == number
        )
        every = tuple(range(part.count))
        numbers = replace(calibration, source=every, indices=every, device=torch.device("cpu"), dtype=None, workers=0)
        score = outer_score(cast(WeightScore, problem.score), self._outer_names(part))
        scope = Scope(layers, {})
        inner = replace(problem, model=part, scope=scope, calibration=numbers, example=None, score=score)
        current = {**within(candidate.tensors), FLAG: torch.ones((), device=device)}
        masks = within(candidate.masks)
        outer_names = {layer.name: part.outer_name(layer.name) for layer in layers}
        allocation = part_allocation(candidate.allocation, outer_names)
        return part, inner, Candidate(allocation, masks, current)

    def _part(self, number: int, device: torch.device, count: int, pick: Callable[[Sequence[int]], Any]) -> ModelPart:
        model, sequence = self.problem.model, self.sequence
        if 0 < number < self.last:
            return BlockPart(model, sequence, number - 1, count, device, self.host)
        return OutsidePart(model, sequence, pick, count, device, self.host, stops=not number)

    def _part_of(self, name: str) -> int:
        """The part that holds the module of this name; the projection in an attention goes with the attention."""
        block = self.sequence.block_of(name)
        if block is not None:
            return block + 1
        parent = name.rpartition(".")[0]
        in_attention = isinstance(self.problem.model.get_submodule(parent), nn.MultiheadAttention)
        return 0 if (parent if in_attention else name) in self.sequence.before else self.last

    def _part_size(self, number: int) -> int:
        """Bytes of a part: the weight of a pass through the part, where one through the model weighs all bytes."""
        model = self.problem.model
        sizes = [sum(size_of(model.get_submodule(c.name)) for c in block) for block in self.sequence.blocks]
        return sizes[number - 1] if 0 < number < self.last else self.size - sum(sizes)

    def _check_parts_match_model(self, pair: list[int]) -> None:
        """Raises:
        UsageError: two samples, part after part, do not give the model's outputs for them.
        """
        pick, numbers = self.problem.inputs().pick, torch.arange(2)
        inputs: dict[bool, PartInputs] = {}
        output: Any = None
        with torch.no_grad():
            wanted = list(tensors_in(call(self.problem.model, {}, pick(pair))))
            for number in range(self.last + 1):
                part = self._part(number, self.host, 2, lambda picked: pick([pair[i] for i in picked]))
                part.inputs = inputs
                with part.recording(BOTH):
                    output = call(part, {}, numbers)
                inputs = part.next_inputs
        outputs = list(tensors_in(output))
        if len(outputs) != len(wanted) or not all(map(is_close, outputs, wanted)):
            calls = self.sequence.calls
            raise UsageError(
                f"streaming: {calls[0].name} to {calls[-1].name} run one after another, but by themselves they do not "
                "give what the model gives: blocks may depend on their arguments and the one before alone."
            )


def _repaired(candidate: Candidate, state: State) -> Candidate:
    """The candidate with the tensors and masks of the parts that are repaired."""
    masks = {**candidate.masks, **state["masks"]} if state["masks"] else candidate.masks
    return replace(candidate, tensors={**candidate.tensors, **state["tensors"]}, masks=masks)
