"""Layer-wise repairs block by block: the model stays on the host, one block at a time is on the device.

A repair that looks at every layer for itself needs of the net only what enters a block. `Streamed` cuts the model into
a chain of blocks (`allot.methods.layerwise.blocks`), runs what comes before them over all calibration samples once, and
keeps on the host

    x_d, x_s     what enters a block, of every sample, in the dense net and in the sparse one: N times one sample's
                 hidden state, in its dtype, for each net, twice while the next block's are made

and then for each block, front to back: the block comes to the device, the repair runs on it as if it were the model,
its new tensors go back to the host, x_d and x_s become what the block gives, and the block leaves. The device holds one
block, what the repair keeps of it, and a batch. What lies outside of the blocks (embeddings before, a head behind) is
on the device together, without the blocks, and only while a layer or batch norm there is repaired; such layers are
repaired as well, before the first block and after the last one.

A method says how it may be streamed by an attribute `streams`:

    "passes"   once through the samples (for each net), and what a layer gives then is what the next one gets: so it is
               here, x_s of the next block is what the block gave while the repair ran. As in the whole net, to the
               order of sums.
    "result"   the next block gets what the repaired block gives. As in the whole net where layers do not wait for each
               other (`layerwise` on dense inputs), or wait from front to back (`lstsq`). `layerwise` on sparse inputs
               trains all layers side by side in the whole net; here a block begins when those before it are done.

x_d and x_s are not in the state, which is saved often: a run that goes on makes them again, a block a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from allot.errors import UsageError, first_line
from allot.methods.layerwise.blocks import chain_of, size_of
from allot.methods.layerwise.streamed_block import FLAG, Block, Entry, Outside, Part
from allot.network.batch_norms import is_batch_norm
from allot.network.call import call
from allot.network.layers import Layer, Scope, places_by_parameter
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
        object.__setattr__(self, "_live", {})  # the stream of the state that is worked on

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """No block begun; how many steps each of them takes is known."""
        stream = _Stream(self, problem, candidate)
        lengths = stream.lengths()
        state: State = {"step": 0, "steps": sum(lengths), "lengths": lengths, "part": 0, "inner": {}, "tensors": {}}
        state["pushed"] = 0
        self._live.update(state=state, problem=problem, candidate=candidate, stream=stream)
        return state

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of the repair on the block at hand; after its last one the next block's inputs are made."""
        stream = self._stream(problem, candidate, state)
        before = state["pushed"] // stream.size
        if stream.part < state["part"]:
            again = stream.part
            stream.again(state)
            return {"forward": state["pushed"] // stream.size - before, "backward": 0, "again": again}
        metrics = stream.step(state)
        return {**metrics, "forward": state["pushed"] // stream.size - before, "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the tensors of all blocks."""
        self._live.clear()
        return replace(candidate, tensors={**candidate.tensors, **state["tensors"]})

    def _stream(self, problem: Problem, candidate: Candidate, state: State) -> _Stream:
        """The stream that this state belongs to; a new one at the first block where the state was loaded."""
        live: dict[str, Any] = self._live
        known = {"state": state, "problem": problem, "candidate": candidate}
        if any(live.get(key) is not value for key, value in known.items()):
            live.clear()
            live.update(known, stream=_Stream(self, problem, candidate))
        return live["stream"]


def usable(device: str | torch.device) -> torch.device:
    """The device, where this machine has it.

    Raises:
        UsageError: it has not.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        said = first_line(error)
        raise UsageError(f"stream={str(device)!r}: this machine has no such device ({said}).") from error
    return found


Posed = tuple[Part, Problem, Candidate]  # what a method is run on in one part


class _Stream:
    """Where one run is: the chain, what enters the part at hand, and this part while it is on the device.

    Part 0 is what comes before the blocks, part i block i, the last one what comes after.
    """

    def __init__(self, streamed: Streamed, problem: Problem, candidate: Candidate) -> None:
        self.method, self.device = streamed.method, streamed.device
        self.passes = streamed.method.streams == "passes"  # type: ignore[attr-defined]
        self.problem, self.candidate = problem, candidate
        self.host = next(iter(problem.dense.values())).device
        calibration = problem.inputs()
        pair = [0, min(1, len(calibration) - 1)]  # of one sample, that sample twice
        self.chain = chain_of(problem.model, calibration.pick(pair[:1]), calibration.pick(pair))
        self.size = size_of(problem.model)
        self.places = places_by_parameter(problem.model)
        self.last = len(self.chain.blocks) + 1
        self.part = 0
        self.entries: dict[bool, Entry] = {}
        self.posed: Posed | None = None
        self._prove(pair)

    def lengths(self) -> list[int]:
        """How many steps the method takes in each part; 0 where there is nothing for it."""
        found = []
        for part in range(self.last + 1):
            _, problem, candidate = self._posed(part, self.host, {})
            repaired = len(problem.scope) or any(self._norms(part))
            found.append(int(self.method.init(problem, candidate)["steps"]) if repaired else 0)
        return found

    def step(self, state: State) -> Metrics:
        """One step of the method, after parts that need none were passed."""
        while not state["lengths"][self.part]:
            self._go_on(state, self._posed(self.part, self._place(self.part), state["tensors"]))
            state["part"] = self.part
        if self.posed is None:
            self.posed = self._posed(self.part, self.device, state["tensors"])
            inner = state["inner"]
            done = inner.get("step", 0)
            state["inner"] = _on(inner, self.device) if inner and not self.passes else self.method.init(*self.posed[1:])
            while state["inner"]["step"] < done:  # what its first steps gave was noted, but not kept in the state
                self._step(state, self.posed, state["inner"])
        metrics = self._step(state, self.posed, state["inner"])
        state["step"] += 1
        state["lengths"][self.part] = state["inner"]["steps"]  # some learn in their first step what there is to do
        state["steps"] = sum(state["lengths"])
        if finished(state["inner"]):
            part, problem, candidate = self.posed
            candidate, self.posed = replace(candidate), None  # its masked weights make room
            better = self.method.finish(problem, candidate, state["inner"])
            for name, value in better.tensors.items():
                if name != FLAG and value is not candidate.tensors.get(name):
                    state["tensors"][part.outer(name)] = value.to(self.host)
            state["inner"] = {}
            self._go_on(state, (part, problem, better))
            state["part"] = self.part
        return metrics

    def again(self, state: State) -> None:
        """A part that is done already, for what enters the next one."""
        if not (state["lengths"][self.part] and self.passes):
            self._go_on(state, self._posed(self.part, self._place(self.part), state["tensors"]))
            return
        posed = part, problem, candidate = self._posed(self.part, self.device, {})  # as it came to the method
        inner = self.method.init(problem, candidate)
        while not finished(inner):
            self._step(state, posed, inner)
        self._go_on(state, (part, problem, self.method.finish(problem, candidate, inner)))

    def _step(self, state: State, posed: Posed, inner: State) -> Metrics:
        part, problem, candidate = posed
        with part.noting(self.passes):
            metrics = self.method.step(problem, candidate, inner)
        state["pushed"] += int(metrics["forward"]) * self._size(self.part)
        return metrics

    def _go_on(self, state: State, posed: Posed) -> None:
        """To the next part, with what this one gives, where there is a part left to repair."""
        part, problem, candidate = posed
        if any(state["lengths"][self.part + 1 :]):
            self.entries = self._given(state, part, problem, candidate)
        part.leave()
        self.part += 1

    def _given(self, state: State, part: Part, problem: Problem, candidate: Candidate) -> dict[bool, Entry]:
        """What leaves the part in both nets; one where they are alike so far."""
        touched = part.touched({*candidate.tensors, *candidate.masks})
        alike = part.entries.get(False) is part.entries.get(True) and not part.exits and not touched
        size = problem.inputs().batch_size
        for sparse in (False,) if alike else (False, True):
            if sparse in part.exits and part.exits[sparse].whole:
                continue
            with part.noting(True), torch.no_grad():
                for numbers in torch.arange(len(problem.inputs())).split(size):
                    call(part, candidate.effective(problem) if sparse else {}, numbers)
                    state["pushed"] += len(numbers) * self._size(self.part)
        return dict.fromkeys((False, True), part.exits[False]) if alike else part.exits

    def _posed(self, number: int, device: torch.device, tensors: Mapping[str, Tensor]) -> Posed:
        """A part on a device, and problem and candidate as they look from within."""
        problem, candidate = self.problem, self.candidate
        calibration = problem.inputs()
        part = self._made(number, device, len(calibration), calibration.pick)
        part.entries = self.entries

        def within(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            named = ((part.inner(name), value) for name, value in values.items())
            return {name: value.to(device) for name, value in named if name is not None}

        layers = tuple(
            replace(layer, name=str(part.inner(layer.name)), aliases=tuple(str(part.inner(a)) for a in layer.aliases))
            for layer in problem.scope
            if self._part_of(layer) == number
        )
        every = tuple(range(part.count))
        numbers = replace(calibration, source=every, indices=every, device=torch.device("cpu"), dtype=None, workers=0)
        posed = replace(problem, model=part, scope=Scope(layers, {}), calibration=numbers, example=None)
        own = {**within({**candidate.tensors, **tensors}), FLAG: torch.ones((), device=device)}
        return part, posed, replace(candidate, masks=within(candidate.masks), tensors=own, channels={}, diagnostics={})

    def _made(self, number: int, device: torch.device, count: int, pick: Callable[[Sequence[int]], Any]) -> Part:
        model, chain = self.problem.model, self.chain
        if 0 < number < self.last:
            return Block(model, chain, number - 1, count, device, self.host)
        return Outside(model, chain, pick, count, device, self.host, ends=not number)

    def _part_of(self, layer: Layer) -> int:
        block = self.chain.block_of(layer.name)
        if block is not None:
            return block + 1
        used = [place for place in self.places[layer.name] if place.kind]
        return 0 if all(self._early(place.module_name) for place in used) else self.last

    def _early(self, name: str) -> bool:
        """Whether a module outside begins before the first block; the projection in an attention goes with it."""
        parent = name.rpartition(".")[0]
        inside = isinstance(self.problem.model.get_submodule(parent), nn.MultiheadAttention)
        return (parent if inside else name) in self.chain.before

    def _norms(self, number: int) -> Iterator[str]:
        """Batch norms of a part."""
        for name, module in self.problem.model.named_modules():
            if is_batch_norm(module):
                block = self.chain.block_of(name)
                outside = 0 if name in self.chain.before else self.last
                if number == (outside if block is None else block + 1):
                    yield name

    def _place(self, number: int) -> torch.device:
        """What comes before the blocks and is not repaired runs where the model is."""
        return self.device if number else self.host

    def _size(self, number: int) -> int:
        """Bytes of a part: what a pass through it is counted as of a pass through the model."""
        inside = [sum(size_of(self.problem.model.get_submodule(x.name)) for x in b) for b in self.chain.blocks]
        return inside[number - 1] if 0 < number < self.last else self.size - sum(inside)

    def _prove(self, pair: list[int]) -> None:
        """Two samples, part after part, give what the model gives for them.

        Raises:
            UsageError: they do not.
        """
        pick, numbers = self.problem.inputs().pick, torch.arange(2)
        entries: dict[bool, Entry] = {}
        output: Any = None
        with torch.no_grad():
            wanted = list(tensors_in(call(self.problem.model, {}, pick(pair))))
            for number in range(self.last + 1):
                part = self._made(number, self.host, 2, lambda some: pick([pair[i] for i in some]))
                part.entries = entries
                with part.noting(True):
                    output = call(part, {}, numbers)
                entries = part.exits
        found = list(tensors_in(output))
        if len(found) != len(wanted) or not all(map(_close, found, wanted)):
            links = self.chain.links
            raise UsageError(
                f"streaming: {links[0].name} to {links[-1].name} run one after another, but by themselves they do not "
                "give what the model gives: blocks may depend on their arguments and the one before alone."
            )


def _close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    scale = float(wanted.float().abs().nan_to_num(posinf=0.0).max()) if wanted.numel() else 0.0
    width = 1e-4 if torch.finfo(wanted.dtype).eps < 1e-5 else 0.05
    return torch.allclose(found.float(), wanted.float(), rtol=width, atol=width * scale, equal_nan=True)


def _on(value: Any, device: torch.device) -> Any:
    """Nested dicts and lists with their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(part, device) for key, part in value.items()}
    return [_on(part, device) for part in value] if isinstance(value, list) else value
