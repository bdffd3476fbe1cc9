"""Network-wise distillation: on calibration inputs the dense net teaches the sparse one by its outputs.

Shared by every method that trains weights. One step, with w the weights as stored (none is zero) and m their masks:

    z = net(w * m)                    batch norms normalise by the batch, everything else is in eval mode
    L = T^2 KL( softmax(z_dense / T) || softmax(z / T) )                 or the squared error, see `Distance.loss`
    G = dL / d(w * m)                 at every entry: pruned weights learn too, and can come back
    w <- w - lr_t rms(w_d) Adam(G)    lr_t: ten steps of warm-up, then a cosine to zero

Steps are a fraction of the root mean square of each tensor in the dense net (after Adafactor, Shazeer and Stern 2018),
so that one learning rate suits tensors of any scale, whatever a repair before did to them.

All floating-point parameters are trained. The teacher is the same module with the dense tensors, in eval mode; its
outputs are kept where the calibration data gives the same inputs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allot.errors import UsageError, check_number, unknown
from allot.methods.training.batch_loss import Distance, Unseen, statistics
from allot.methods.training.schedule import Schedule, warm_cosine
from allot.methods.training.selection import CollectedEvidence, scored
from allot.network.applied_masks import masked_values
from allot.network.kinds import FLOATS
from allot.network.layers import frozen_beside_trained
from allot.run.outputs import wide
from allot.run.patterns import masks_of
from allot.run.problem import Candidate, Problem
from allot.run.scores import Evidence
from allot.run.store import State

MEAN, SQUARE, EPS = 0.9, 0.99, 1e-8  # of Adam: how much of its averages stays in a step, and what is added to a root
AUTO = "auto"
Select = Callable[[Evidence, Mapping[str, int]], dict[str, Tensor]]


@dataclass(frozen=True)
class Training(Distance):
    """How weights are trained, and their outputs compared (`Distance`); frozen hyperparameters, functions of a state.

    Args:
        steps: batches, 1 or more. "auto", for repairs: in rounds, while the watch set says that training pays, see
            `allot.methods.training.rounds`; where nothing is watched, `first` of them.
        learning_rate: peak step of Adam, as a fraction of the root mean square of each tensor in the dense net; of SGD,
            in absolute units. "auto": by trial, see `allot.methods.training.rounds`; 0.05 is tried first.
        rounds: most rounds of training where `steps` is a number, each twice as long as the one before.
        first: steps of the first round where `steps` is "auto".
        max_steps: most steps of all rounds together where `steps` is "auto"; None: no limit.
        optimizer: "adam"; or "sgd" with momentum 0.9, as papers train.
    Raises:
        UsageError: a value out of its range.
    State:
        repeat, teacher, loss_scale, finite: as in `Distance`.
        tensors: parameter, or buffer of a batch norm -> its current value, in float32 or wider.
        mean, square: parameter -> Adam's averages of its gradients, shape of the parameter; of SGD, `mean` alone.
        scale: parameter -> root mean square of its values in the dense net, which steps are a fraction of.
        late: whether masks are applied where the model uses a weight, not to a copy of all weights.
    """

    steps: int | str = 250
    learning_rate: float | str = 0.05
    optimizer: str = "adam"
    rounds: int = 1
    first: int = 250
    max_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != AUTO:
            check_number("steps", self.steps, 1, whole=True)
        for name in ("rounds", "first", "max_steps"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 1, whole=True)
        if self.learning_rate != AUTO:
            check_number("learning_rate", self.learning_rate, 0)
        if self.optimizer not in ("adam", "sgd"):
            raise unknown("optimizer", str(self.optimizer), ("adam", "sgd"))

    @property
    def peak(self) -> float:
        """The learning rate, or that which "auto" begins with."""
        return 0.05 if self.learning_rate == AUTO else float(self.learning_rate)

    @property
    def length(self) -> int:
        """The steps, or those of the first round.

        >>> Training(steps=60).length, Training(steps="auto").length, Training(steps="auto", first=40).length
        (60, 250, 40)
        """
        return min(self.first, self.max_steps or self.first) if self.steps == AUTO else int(self.steps)

    @property
    def fixed_length(self) -> int:
        """The steps of a training that cannot continue.

        Raises:
            UsageError: `steps` is "auto".
        """
        if self.steps == AUTO:
            raise UsageError("steps=auto: repairs that train continue while it pays; here a number is accepted.")
        return self.length

    @property
    def in_rounds(self) -> bool:
        """Whether there may be rounds after one that made the net better."""
        return self.steps == AUTO or self.rounds > 1

    @property
    def by_trial(self) -> bool:
        """Whether there may be several rounds."""
        return self.learning_rate == AUTO or self.in_rounds

    def begin(self, problem: Problem, candidate: Candidate) -> State:
        """The state before the first step: copies of the tensors that will change, in float32 or wider."""
        weights = {name: wide(candidate.tensor(problem, name)).clone() for name in trained(problem)}
        buffers = {name: candidate.tensor(problem, name).clone() for name in statistics(problem.model)}
        return {
            **self.reading(problem),
            "steps": self.length,
            "tensors": weights | buffers,
            "mean": {name: torch.zeros_like(value) for name, value in weights.items()},
            "square": {name: torch.zeros_like(value) for name, value in weights.items()},
            "scale": {name: step_scale(wide(problem.dense[name])) for name in weights},
        }

    def select(self, problem: Problem, state: State, evidence: Evidence, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Layer -> mask of the `kept` best-scored of its current weights."""
        (chosen,) = self.select_each(problem, state, evidence, (kept,))
        return chosen

    def select_each(
        self, problem: Problem, state: State, evidence: Evidence, counts: Sequence[Mapping[str, int]]
    ) -> list[dict[str, Tensor]]:
        """What `select` returns for each of several numbers of kept weights; the score is computed once."""
        chosen: list[dict[str, Tensor]] = [{} for _ in counts]
        for l in problem.scope:
            score = scored(problem, l, state["tensors"][l.name], evidence)
            masks = masks_of(problem.pattern, l, score, [kept[l.name] for kept in counts])
            for found, mask in zip(chosen, masks, strict=True):
                found[l.name] = mask
        return chosen

    def gradients(
        self, problem: Problem, state: State, masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float | int]]:
        """(G of every trained tensor at the masked weights, metrics of the step): see the top of this file.

        Raises:
            AllotError: the loss is not finite.
            UsageError: as `loss_of`.
        """
        dense, tensors = problem.dense, state["tensors"]
        buffers = {name: value for name, value in tensors.items() if name not in state["mean"]}

        def loss_of(late: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor], int]:
            leaves = {}
            for name in state["mean"]:
                early = name in masks and name not in late
                value = masked_values(tensors[name], masks[name]) if early else tensors[name]
                leaves[name] = value.to(dense[name].dtype).detach().requires_grad_()
            return self.loss_of(problem, state, leaves | buffers, late)

        before = {} if "late" in state else {name: value.clone() for name, value in buffers.items()}
        try:
            loss, by_name, forward = loss_of(masks if state.setdefault("late", problem.compute.lean) else {})
        except Unseen:
            state["late"] = False  # from now on masked copies
            for name, value in before.items():
                buffers[name].copy_(value)
            loss, by_name, forward = loss_of({})
        gradients = {name: gradient.to(tensors[name].dtype) for name, gradient in by_name.items()}
        samples = len(problem.inputs().positions(state["step"]))
        return gradients, {"loss": loss, "forward": forward, "backward": samples}

    def update(self, state: State, gradients: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """One step on the state's tensors, in place.

        Args:
            scale: factor on the loss. Adam does not see it in a gradient, so it is a factor on the step.
        """
        self.descend(state, gradients, scale * self.peak * warm_cosine(state["step"], self.length))

    def descend(self, state: State, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One step of this learning rate on the state's tensors, in place.

        Adam as in `torch.optim.Adam`, to the bit on the CPU. Tensor by tensor: each stays in the processor's cache.
        """
        state["step"] += 1
        t = state["step"]
        for name, gradient in gradients.items():
            value, mean = state["tensors"][name], state["mean"][name]
            if self.optimizer == "sgd":
                mean.mul_(0.9).add_(gradient)
                value.sub_(lr * mean)
                continue
            square = state["square"][name]
            mean.lerp_(gradient, 1 - MEAN)
            square.mul_(SQUARE).addcmul_(gradient, gradient, value=1 - SQUARE)
            root = square.sqrt().div_((1 - SQUARE**t) ** 0.5).add_(EPS)
            value.addcdiv_(mean, root, value=-(lr * state["scale"][name] / (1 - MEAN**t)))

    def tensors(self, problem: Problem, candidate: Candidate, state: State) -> dict[str, Tensor]:
        """The candidate's tensors after training, in the model's dtypes; only those that differ from the model's."""
        tensors = dict(candidate.tensors)
        for name, value in state["tensors"].items():
            value = value.to(problem.dense[name].dtype)
            if name in tensors or not torch.equal(value, problem.dense[name]):
                tensors[name] = value
        return tensors


def distilling(training: Training, problem: Problem, candidate: Candidate) -> State:
    """The state of `distil` before its first step: the candidate's weights as they are."""
    begun = training.begin(problem, candidate)
    return {"step": 0, "steps": begun["steps"], "training": begun, "masks": {}, "squares": {}}


def distilled(training: Training, problem: Problem, candidate: Candidate, state: State) -> Candidate:
    """The candidate with trained tensors, and the masks of the last step."""
    tensors = training.tensors(problem, candidate, state["training"])
    return replace(candidate, masks=dict(state["masks"]), tensors=tensors)


def distil(
    training: Training,
    schedule: Schedule,
    problem: Problem,
    candidate: Candidate,
    state: State,
    *,
    select: Select | None = None,
    scale: float = 1.0,
) -> dict[str, float | int]:
    """Metrics of one step, in place, within the allocation of `candidate`: masks where they are due, then weights.

    Args:
        state: of `distilling`.
        select: (evidence, kept by layer) -> masks; None: the best-scored of the current weights.
        scale: as in `Training.update`.
    """
    inner = state["training"]
    t, T = inner["step"], training.length
    evidence = CollectedEvidence(problem, candidate, state["squares"])
    if problem.scope.groups:
        state["masks"] = dict(candidate.masks)  # channels are selected once: a wider budget would move them all
    elif schedule.due(t, T):
        kept = schedule.budget(problem.budget, t, T).counts(candidate.allocation)
        state["masks"] = select(evidence, kept) if select else training.select(problem, inner, evidence, kept)
    gradients, metrics = training.gradients(problem, inner, state["masks"])
    training.update(inner, gradients, scale=scale)
    state["step"] += 1
    return metrics | {"forward": metrics["forward"] + evidence.forward}


def trained(problem: Problem) -> list[str]:
    """Names of the tensors that are trained: parameters of 16 to 64 bits, but those frozen beside trained ones."""
    frozen = frozen_beside_trained(problem.model) - {layer.name for layer in problem.scope}
    floating = [name for name, parameter in problem.model.named_parameters() if parameter.dtype in FLOATS]
    return [name for name in floating if name not in frozen]


def step_scale(tensor: Tensor) -> float:
    """Root mean square, which steps are a fraction of; biases and the like may start at zero and have to move."""
    scale = float(tensor.square().mean().sqrt())
    return max(scale, 1e-3) if tensor.dim() < 2 or not scale else scale
