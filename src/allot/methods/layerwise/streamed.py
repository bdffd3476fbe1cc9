"""Layer-wise repairs block by block: the model stays on the host, one block at a time is on the device.

`Streamed` runs the modules before the first block over all calibration samples once, and keeps on the host

    x_d, x_s     the inputs of a block, of every sample, in the dense net and in the sparse one

Then for each block, front to back: the block comes to the device, the repair runs on it as if it were the model, its
new tensors go back to the host, and x_d and x_s become the block's outputs. The modules outside the blocks are on the
device together, without the blocks, while a layer or batch norm among them is repaired: before the first block or after
the last one. A method says how it may be streamed by an attribute `streams`:

    "passes"   once through the samples (for each net); x_s of the next block is the block's output while the repair ran
    "result"   the inputs of the next block are the outputs of the repaired block

x_d and x_s are not in the state: a resumed run makes them again, a block a step. docs/streaming.md says what the host
has to hold, and where results differ from those on the whole net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from allot.errors import UsageError, first_line
from allot.methods.layerwise.blocks import find_blocks, size_of
from allot.methods.layerwise.streamed_block import FLAG, BlockPart, ModelPart, OutsidePart, PartInputs
from allot.network.call import call
from allot.network.layers import Scope, is_batch_norm, places_by_parameter
from allot.network.trees import tensors_in
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State

WAYS = ("passes", "result")


@dataclass(frozen=True)
class Streamed:
    """A layer-wise repair that needs the device for one block at a time.

    Args:
        method: the repair, one with `streams`.
        device: where blocks go; the model stays where it is.
    Raises:
        UsageError: a method that does not stream, or a device that is not there. From `init`: a model without blocks.
    State:
        lengths: steps of each part of the model, front to back.
        part: number of the part that is repaired now.
        inner: the method's state on this part; empty before the part begins.
        tensors: parameter -> repaired tensor, in the model's shapes, on the host.
        pushed, returned: samples pushed forward and backward through a part, times the part's bytes.
        diagnostics: method -> what it reports of each part.
    """

    method: Method
    device: torch.device

    _live: ClassVar[Any] = None
    role = "repair"
    needs_data = True

    def __post_init__(self) -> None:
        if getattr(self.method, "streams", None) not in WAYS:
            raise UsageError(f"{type(self.method).__name__} needs the whole net at once: it cannot be streamed.")
        object.__setattr__(self, "device", usable(self.device))
        object.__setattr__(self, "_live", {})  # the run whose state is worked on

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """No block begun; how many steps each of them takes is known."""
        run = _StreamedRun(self, problem, candidate)
        lengths = run.lengths()
        state: State = {"step": 0, "steps": sum(lengths), "lengths": lengths, "part": 0, "inner": {}, "tensors": {}}
        state |= {"pushed": 0, "returned": 0, "diagnostics": {}}
        self._live.update(state=state, problem=problem, candidate=candidate, run=run)
        return state

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of the repair on the current block; after its last one the next block's inputs are made."""
        run = self._run_of(problem, candidate, state)
        before, returned = state["pushed"] // run.size, state["returned"] // run.size
        if run.number < state["part"]:
            again = run.number
            run.repeat_part(state)
            return {"forward": state["pushed"] // run.size - before, "backward": 0, "again": again}
        metrics = run.step(state)
        pushed = {"forward": state["pushed"] // run.size - before, "backward": state["returned"] // run.size - returned}
        return {**metrics, **pushed}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        self._live.clear()
        diagnostics = {**candidate.diagnostics, **state["diagnostics"]}
        return replace(candidate, tensors={**candidate.tensors, **state["tensors"]}, diagnostics=diagnostics)

    def _run_of(self, problem: Problem, candidate: Candidate, state: State) -> _StreamedRun:
        """The run that this state belongs to; a new one at the first part where the state was loaded."""
        live: dict[str, Any] = self._live
        arguments = {"state": state, "problem": problem, "candidate": candidate}
        if any(live.get(key) is not value for key, value in arguments.items()):
            live.clear()
            live.update(arguments, run=_StreamedRun(self, problem, candidate))
        return live["run"]


def usable(device: str | torch.device) -> torch.device:
    """The device, where this machine has it.

    Raises:
        UsageError: it has not.
    """
    try:
        usable_device = torch.device(device)
        torch.empty(0, device=usable_device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"stream={str(device)!r}: this machine has no such device ({first_line(error)}).") from error
    return usable_device


PartTask = tuple[ModelPart, Problem, Candidate]  # a part, with problem and candidate as the method gets them


class _StreamedRun:
    """The progress of one run: the blocks, the inputs of the current part, and this part while it is on the device.

    Part 0 is the modules before the blocks, part i block i, the last one the modules after the blocks.
    """

    def __init__(self, streamed: Streamed, problem: Problem, candidate: Candidate) -> None:
        self.method, self.device = streamed.method, streamed.device
        self.passes = streamed.method.streams == "passes"  # type: ignore[attr-defined]
        self.problem, self.candidate = problem, candidate
        self.host = next(iter(problem.dense.values())).device
        calibration = problem.inputs()
        pair = [0, min(1, len(calibration) - 1)]  # where there is one sample, that sample twice
        self.sequence = find_blocks(problem.model, calibration.pick(pair[:1]), calibration.pick(pair))
        self.size = size_of(problem.model)
        self.places = places_by_parameter(problem.model)
        self.last = len(self.sequence.blocks) + 1
        self.number = 0  # of the current part
        self.inputs: dict[bool, PartInputs] = {}
        self.task: PartTask | None = None
        self._check_parts_match_model(pair)

    def lengths(self) -> list[int]:
        """How many steps the method takes in each part; 0 where there is nothing for it."""
        lengths = []
        for number in range(self.last + 1):
            _, problem, candidate = self._task_on(number, self.host, {})
            modules = self.problem.model.named_modules()
            repaired = len(problem.scope) or any(is_batch_norm(m) and self._part_of(n) == number for n, m in modules)
            lengths.append(int(self.method.init(problem, candidate)["steps"]) if repaired else 0)
        return lengths

    def step(self, state: State) -> Metrics:
        """One step of the method, after parts that need none were passed."""
        while not state["lengths"][self.number]:
            self._leave_part(state, self._task_on(self.number, self._device_of(self.number), state["tensors"]))
            state["part"] = self.number
        if self.task is None:
            self.task = self._task_on(self.number, self.device, state["tensors"])
            inner = state["inner"]
            done = inner.get("step", 0)
            state["inner"] = (
                _moved_to(self.device, inner) if inner and not self.passes else self.method.init(*self.task[1:])
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
            for name, value in better.tensors.items():
                if name != FLAG and value is not candidate.tensors.get(name):
                    state["tensors"][part.outer_name(name)] = value.to(self.host)
            if any(mask is not candidate.masks.get(name) for name, mask in better.masks.items()):
                raise UsageError(f"{type(self.method).__name__} moves masks, which cannot leave a streamed block.")
            for name, report in better.diagnostics.items():
                state["diagnostics"].setdefault(name, {}).update(report)
            state["inner"] = {}
            self._leave_part(state, (part, problem, better))
            state["part"] = self.number
        return metrics

    def repeat_part(self, state: State) -> None:
        """Run a part that is repaired already, for the inputs of the next one."""
        if not (state["lengths"][self.number] and self.passes):
            self._leave_part(state, self._task_on(self.number, self._device_of(self.number), state["tensors"]))
            return
        task = part, problem, candidate = self._task_on(self.number, self.device, {})  # as the method first got it
        inner = self.method.init(problem, candidate)
        while not finished(inner):
            self._method_step(state, task, inner)
        self._leave_part(state, (part, problem, self.method.finish(problem, candidate, inner)))

    def _method_step(self, state: State, task: PartTask, inner: State) -> Metrics:
        part, problem, candidate = task
        with part.recording(self.passes):
            metrics = self.method.step(problem, candidate, inner)
        state["pushed"] += int(metrics["forward"]) * self._part_size(self.number)
        state["returned"] += int(metrics["backward"]) * self._part_size(self.number)
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
        alike = part.inputs.get(False) is part.inputs.get(True) and not part.next_inputs and not changed
        size = problem.inputs().batch_size
        for sparse in (False,) if alike else (False, True):
            if sparse in part.next_inputs and bool(part.next_inputs[sparse].hidden.filled.all()):
                continue
            with part.recording(True), torch.no_grad():
                for numbers in torch.arange(len(problem.inputs())).split(size):
                    call(part, candidate.effective(problem) if sparse else {}, numbers)
                    state["pushed"] += len(numbers) * self._part_size(self.number)
        return dict.fromkeys((False, True), part.next_inputs[False]) if alike else part.next_inputs

    def _task_on(self, number: int, device: torch.device, tensors: Mapping[str, Tensor]) -> PartTask:
        """A part on a device, and problem and candidate in the names of the part."""
        problem, candidate = self.problem, self.candidate
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
        inner = replace(problem, model=part, scope=Scope(layers, {}), calibration=numbers, example=None)
        current = {**within({**candidate.tensors, **tensors}), FLAG: torch.ones((), device=device)}
        masks = within(candidate.masks)
        return part, inner, replace(candidate, masks=masks, tensors=current, channels={}, diagnostics={})

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

    def _device_of(self, number: int) -> torch.device:
        """Where a part runs that is not repaired: the modules before the blocks run where the model is."""
        return self.device if number else self.host

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
                with part.recording(True):
                    output = call(part, {}, numbers)
                inputs = part.next_inputs
        outputs = list(tensors_in(output))
        if len(outputs) != len(wanted) or not all(map(_is_close, outputs, wanted)):
            calls = self.sequence.calls
            raise UsageError(
                f"streaming: {calls[0].name} to {calls[-1].name} run one after another, but by themselves they do not "
                "give what the model gives: blocks may depend on their arguments and the one before alone."
            )


def _is_close(output: Tensor, wanted: Tensor) -> bool:
    if output.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(output, wanted)
    scale = float(wanted.float().abs().nan_to_num(posinf=0.0).max()) if wanted.numel() else 0.0
    tolerance = 1e-4 if torch.finfo(wanted.dtype).eps < 1e-5 else 0.05
    return torch.allclose(output.float(), wanted.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _moved_to(device: torch.device, value: Any) -> Any:
    """Nested dicts and lists with their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved_to(device, part) for key, part in value.items()}
    return [_moved_to(device, part) for part in value] if isinstance(value, list) else value
