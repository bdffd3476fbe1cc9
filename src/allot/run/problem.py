"""Problem (the request), Candidate (the value that methods improve) and Method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from allot.budget.allocation import Allocation
from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError
from allot.network.applied_masks import masked_values
from allot.network.call import call
from allot.network.compute import Compute
from allot.network.layers import Scope, is_batch_norm
from allot.network.trees import floats_in
from allot.run.calibration import Calibration
from allot.run.fidelity import Watch
from allot.run.outputs import Comparison, Reading
from allot.run.patterns import Pattern
from allot.run.recipes import Recipe
from allot.run.scores import ChannelScore, WeightScore
from allot.run.store import State

Metrics = dict[str, float | int]
BATCH_NORMS = ("batch", "frozen")


@dataclass(frozen=True)
class Problem:
    """The request: nothing in it changes during a run, the user's model included."""

    model: nn.Module
    scope: Scope
    budget: ModelBudget
    pattern: Pattern
    score: WeightScore | ChannelScore
    calibration: Calibration | None = None
    seed: int = 0
    example: Any = None  # a batch of one input, where there is one
    compute: Compute = field(default_factory=Compute)
    comparison: Comparison = field(default_factory=Comparison)
    batch_norm: str = "batch"  # in training: "batch": statistics of the batch; "frozen": the running ones, which stay
    watch: Watch | None = None  # inputs that enter no statistics and no training, see `allot.run.guard`
    readings: dict[Comparison, Reading] = field(default_factory=dict, repr=False, compare=False)  # as seen so far

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model as it came, by name, detached."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        # a tensor made in inference mode cannot take part in training
        return {n: (t.clone() if t.is_inference() else t).detach() for n, t in tensors.items()}

    def in_train_mode(self, module: nn.Module) -> bool:
        """Whether a module is in train mode while weights are trained."""
        return self.batch_norm == "batch" and is_batch_norm(module)

    def inputs(self) -> Calibration:
        """The calibration data.

        Raises:
            UsageError: the problem has none.
        """
        if self.calibration is None:
            raise UsageError("this needs calibration data: give --data (calibration in Python).")
        return self.calibration

    def reading(self, comparison: Comparison | None = None) -> Reading:
        """How outputs are read, as seen from the dense net's outputs: for the watch set, or else for the first samples.

        Args:
            comparison: choices of one method, before those of the run.
        Raises:
            UsageError: no calibration data, or outputs that cannot be compared.
        """
        comparison = (comparison or Comparison()).over(self.comparison)
        of_run = self.watch.reading if self.watch else self.readings.get(self.comparison)
        if of_run and comparison in (self.comparison, replace(self.comparison, loss=of_run.loss)):
            return of_run
        if comparison not in self.readings:
            inputs = self.inputs()
            with torch.no_grad():
                output = call(self.model, {}, inputs.pick([0]))
                if sum(tensor.numel() for tensor in floats_in(output)) < 2**20:  # logits of a text say enough
                    output = call(self.model, {}, inputs.pick(range(min(8, len(inputs), inputs.batch_size))))
            self.readings[comparison] = comparison.reading(output)
        return self.readings[comparison]


@dataclass(frozen=True)
class Candidate:
    """The value that goes from method to method.

    Attributes:
        allocation: how much each layer keeps.
        masks: tensor name -> bool mask, every layer among them; empty until weights or channels were selected.
        channels: group -> channels kept, ascending; empty where single weights are pruned.
        tensors: only the tensors that differ from the dense model, before masking.
        diagnostics: method -> its explanation of the result, JSON-ready, for the report.
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

    def tensor(self, problem: Problem, name: str) -> Tensor:
        """A parameter or buffer of the candidate's net, before masking."""
        return self.tensors.get(name, problem.dense[name])

    def effective(self, problem: Problem) -> dict[str, Tensor]:
        """The tensors to put in place of the model's: all that differ from it, masks applied.

        The dict is the caller's; the tensors are made once and not to be changed in place.
        """
        if self._effective.get("problem") is not problem:
            tensors = dict(self.tensors)
            for name, mask in self.masks.items():
                tensors[name] = masked_values(self.tensor(problem, name), mask)
            self._effective.update(problem=problem, tensors=tensors)
        return dict(self._effective["tensors"])

    def one_at_a_time(self, problem: Problem) -> Mapping[str, Tensor]:
        """What `effective` returns, each tensor made when it is asked for: for work that needs one tensor at a time."""
        return _OneAtATime(self, problem)

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


class _OneAtATime(Mapping[str, Tensor]):
    def __init__(self, candidate: Candidate, problem: Problem) -> None:
        self.candidate, self.problem = candidate, problem
        self.names = dict.fromkeys((*candidate.tensors, *candidate.masks))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor, mask = self.candidate.tensor(self.problem, name), self.candidate.masks.get(name)
        return tensor if mask is None else masked_values(tensor, mask)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def innermost(method: Any) -> Any:
    """The method itself, without those that wrap it, as one that shows it views of the inputs."""
    while hasattr(getattr(method, "method", None), "role"):
        method = method.method
    return method


def finished(state: State) -> bool:
    """Whether a method has no step left: it counts `step` up to `steps`, and lowers `steps` where it ends early.

    >>> finished({"step": 2, "steps": 3}), finished({"step": 3, "steps": 3})
    (False, True)
    """
    return bool(state["step"] >= state["steps"])


class Method(Protocol):
    """One paper or baseline: a frozen value of hyperparameters and three functions.

    A state is a dict of tensors, numbers and strings (nested dicts and lists allowed) that holds `step` and `steps`;
    the function `step` works on it in place and counts `step` up. The run of a method ends when they are equal; one
    that ends early lowers `steps`. The docstring of the class names all other keys in a section `State:`. Methods see
    no path, clock, progress bar or signal.

    Attributes:
        role: "allocate" or "repair".
        allocates: of a method that allocates, the units that it can allocate: "weights", "channels" or both.
        needs_data: whether `problem.calibration` has to be there.
        parallel: optional. True: with several processes, all of them run this method, each on its part of every batch,
            and it sums its results over them (by `allot.processes.all_reduce`, or by `Training`, `Moments` or
            `CollectedEvidence`, which do so). Otherwise one process runs it, on whole batches.
        streams: of a repair that treats each layer by itself, its form that goes block by block: see
            `allot.methods.layerwise.streamed`; other methods have none.
        by_blocks: optional, of a method that streams. True: it goes block by block without a request too, where the
            model has blocks. "needed": it is refused where the model has none.
        watched: optional, of a method that trains. True: `finish` may be asked on the way, and leaves the state as it
            was; the net is compared with the dense one then, and its best state is kept.
        starts_over: optional, of a repair. True: it sets the net before it aside; its own has to be nearer to be kept.
        chooses_masks: optional, of a repair. True: it chooses the masks of all layers itself, whatever was selected
            before.
    """

    @property
    def role(self) -> str: ...

    @property
    def needs_data(self) -> bool: ...

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """The state before the first step."""

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step, in place; what happened, with `forward` and `backward`: samples pushed through any network."""

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The better candidate."""


@dataclass(frozen=True)
class Chain:
    """The parts of a run as values: what allocates, scores, structures and repairs; their names; the method's name.

    `summary` says in a sentence what the allocator does; empty of a user's own. `select` decides which weights stay;
    None: `Selection`, on the whole net.
    """

    allocate: Method
    score: WeightScore | ChannelScore
    pattern: Pattern
    repair: tuple[Method, ...]
    names: Recipe
    method: str
    summary: str = ""
    select: Method | None = None


@dataclass(frozen=True)
class Rule:
    """A method that is one function of the problem: `densities(problem)`, projected onto the budget.

    Only proportions of the densities matter: `Budget.counts` makes whole numbers that meet the budget.

    State:
        kept: layer -> weights kept, or group -> channels kept; empty before the step.
    """

    densities: Callable[[Problem], Mapping[str, float]]
    allocates: tuple[str, ...] = field(default=("weights",), metadata={"option": False})

    role = "allocate"
    needs_data = False

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": 1, "kept": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        state["kept"] = problem.budget.counts(self.densities(problem))
        state["step"] = 1
        return {"forward": 0, "backward": 0, "kept": sum(state["kept"].values())}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return replace(candidate, allocation=Allocation.of(state["kept"], candidate.allocation.total))
