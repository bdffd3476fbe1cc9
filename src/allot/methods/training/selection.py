"""Which weights, or channels, stay: the step between allocating and repairing, and the evidence for scores."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from allot.budget.allocation import Allocation
from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError
from allot.methods.training.channel_gates import fisher
from allot.network.call import call
from allot.network.channels import ChannelPlan
from allot.network.input_squares import Squares, input_norms, reduced, watched_squares
from allot.network.layers import Group, Layer
from allot.run.patterns import select
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.scores import ChannelEvidence, ChannelScore, Evidence, WeightScore
from allot.run.store import State


@dataclass(frozen=True)
class Selection:
    """The method between allocating and repairing: layer by layer, or group by group, where no masks are there yet.

    Where the score asks for input norms, each batch of calibration inputs is a step before the first layer.

    Args:
        by_inputs: whether the score is known to ask for input norms: then all steps are counted from the start.

    State:
        masks: layer -> mask, bool, shape of the weight.
        channels: group -> channels kept, ascending.
        squares: sums that the score asks for, as in `CollectedEvidence`.
    """

    by_inputs: bool = False

    role = "select"
    needs_data = False
    parallel = True
    streams = "given"

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """No layer done; an allocator that trains weights brings its masks."""
        steps = 0 if candidate.masks else len(problem.scope.groups or problem.scope.layers)
        squares = {}
        if steps and self.by_inputs:
            squares["batches"] = 0
            steps += problem.inputs().batches
        return {"step": 0, "steps": steps, "masks": dict(candidate.masks), "channels": {}, "squares": squares}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """Select in one layer, or in one group of channels; before the first layer, a batch a step for its inputs."""
        if problem.scope.groups:
            return self._select_channels(problem, candidate, state)
        evidence = CollectedEvidence(problem, candidate, state["squares"], by_batch=True)
        begun = "batches" in state["squares"]
        if begun and not evidence.complete:
            return self._add_batch(evidence, state)
        layer = problem.scope.layers[len(state["masks"])]
        kept = candidate.allocation.kept[layer.name]
        try:
            score = scored(problem, layer, candidate.tensor(problem, layer.name), evidence)
        except Unfinished:
            state["steps"] += problem.inputs().batches
            return self._add_batch(evidence, state)
        state["masks"][layer.name] = problem.pattern.mask(layer, score, kept)
        state["step"] += 1
        return {"forward": 0, "backward": 0, "kept": kept}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        if not state["channels"]:
            return replace(candidate, masks=dict(state["masks"]))
        channels = {name: tuple(kept) for name, kept in state["channels"].items()}
        return replace(candidate, masks=channel_masks(problem, channels), channels=channels)

    def _add_batch(self, evidence: CollectedEvidence, state: State) -> Metrics:
        samples = evidence.add_batch()
        state["step"] += 1
        return {"forward": samples, "backward": 0, "kept": 0}

    def _select_channels(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        group = problem.scope.groups[state["step"]]
        evidence = CollectedEvidence(problem, candidate, state["squares"])
        kept = candidate.allocation.kept[group.name]
        state["channels"][group.name] = select(importance(problem, group, evidence), kept).nonzero().flatten().tolist()
        state["step"] += 1
        return {"forward": evidence.forward, "backward": evidence.backward, "kept": kept}


def allocated(candidate: Candidate, kept: Mapping[str, int], diagnostics: Mapping[str, Any] | None = None) -> Candidate:
    """The candidate that keeps these numbers of weights, or channels, with a method's report about them."""
    allocation = Allocation.of(kept, candidate.allocation.total)
    return replace(candidate, allocation=allocation, diagnostics={**candidate.diagnostics, **(diagnostics or {})})


def ranked_together(budget: ModelBudget, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Counts of the layers, or groups, when all their scores are ranked together.

        k_l = #{i in l : s_i among the r highest scores of the net},   r as large as the budget allows

    Equal scores go to the first by name, then to the lower index. Bounds cut k_l; r makes up for what this frees or
    takes.
    """
    names = sorted(scores)
    index, sizes = torch.arange(len(names), dtype=torch.int32), torch.tensor([scores[name].numel() for name in names])
    order = torch.cat([scores[name] for name in names]).argsort(descending=True, stable=True)
    ranked = torch.repeat_interleave(index, sizes)[order]  # [N], the place in `names` of each score, best first

    def counts(r: int) -> dict[str, int]:
        return budget.clip(dict(zip(names, torch.bincount(ranked[:r], minlength=len(names)).tolist(), strict=True)))

    return counts(bisect_left(range(1, len(ranked) + 1), True, key=lambda r: not budget.fits(counts(r))))


def scored(problem: Problem, layer: Layer, weight: Tensor, evidence: Evidence) -> Tensor:
    """The problem's score of one weight, checked; shape of `weight`.

    Raises:
        UsageError: another shape, or values that are not finite.
    """
    score = cast(WeightScore, problem.score)(layer, weight, evidence)
    if score.shape != weight.shape or not is_finite(score):
        raise UsageError(f"{layer.name}: the score has shape {list(score.shape)} or values that are not finite.")
    return score


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is infinite or nan, from the extremes: ten times faster than asking every entry."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def importance(problem: Problem, group: Group, evidence: ChannelEvidence) -> Tensor:
    """The problem's score of every channel of a group, checked; `[channels]`, float64.

    Raises:
        UsageError: another shape, or values that are not finite.
    """
    score = cast(ChannelScore, problem.score)(group, evidence)
    if score.shape != (group.total,) or not bool(torch.isfinite(score).all()):
        raise UsageError(f"{group.name}: the score has shape {list(score.shape)} or values that are not finite.")
    return score.detach().double().cpu()


def channel_masks(problem: Problem, channels: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Masks of every layer, and of every other parameter that holds removed channels."""
    plan = ChannelPlan.of(problem.model, problem.scope.groups, channels)
    parameters = dict(problem.model.named_parameters())
    names = {layer.name for layer in problem.scope} | (plan.tensors.keys() & parameters.keys())
    return {name: plan.mask(name, parameters[name].shape).to(parameters[name].device) for name in sorted(names)}


class Unfinished(Exception):
    """A score asks for sums to which batches are still to be added."""


class CollectedEvidence:
    """The evidence of a candidate's net: runs the calibration inputs through it once, when a score first asks.

    Args:
        squares: "inputs": layer -> rows, like "0:24" -> sum of squared inputs, float64 `[groups, K]`; "batches": of
            them, how many are in the sums; "gates": group -> expected squared gradient, `[C]`. Filled here: part of a
            method's state.
        by_batch: whether `input_norm` raises `Unfinished` until `add_batch` was called for every batch.
    Attributes:
        forward, backward: samples pushed so far.
    """

    def __init__(
        self, problem: Problem, candidate: Candidate, squares: dict[str, Any], *, by_batch: bool = False
    ) -> None:
        self.problem, self.candidate, self.squares, self.by_batch = problem, candidate, squares, by_batch
        self.seed = problem.seed
        self.forward = self.backward = 0

    def tensor(self, name: str) -> Tensor:
        return self.candidate.tensor(self.problem, name)

    def module(self, name: str) -> nn.Module:
        return self.problem.model.get_submodule(name.rpartition(".")[0])

    def gate_squares(self, group: Group) -> Tensor:
        if "gates" not in self.squares:
            self.squares["gates"], forward, backward = fisher(self.problem, self.candidate)
            self.forward += forward
            self.backward += backward
        return self.squares["gates"][group.name]

    def input_norm(self, layer: Layer) -> Tensor:
        """Root of the summed squares of the inputs of each weight; shape of the weight.

        Raises:
            UsageError: the layer is never reached, or a layer is not linear in its weight.
            Unfinished: batches are missing, and are to be added one by one.
        """
        while not self.complete:
            if self.by_batch:
                raise Unfinished
            self.forward += self.add_batch()
        if layer.name not in self.squares["inputs"] and layer.kind != "lookup":
            raise UsageError(
                f"{layer.name} is never reached by the calibration inputs, so it has no input norms. Exclude it, or "
                "use the score 'magnitude'."
            )
        return input_norms(layer, self.squares["inputs"].get(layer.name, {}))

    @property
    def complete(self) -> bool:
        """Whether every batch of the calibration inputs was pushed for input norms."""
        return "inputs" in self.squares and self.squares["batches"] >= self.problem.inputs().batches

    def add_batch(self) -> int:
        """Add the inputs that the layers have in the next batch; returns how many samples that were."""
        problem = self.problem
        k = self.squares.setdefault("batches", 0)
        inputs, samples = problem.inputs().batch(k)
        new: Squares = {}
        with watched_squares(problem.model, problem.scope, new), torch.no_grad():
            call(problem.model, self.candidate.effective(problem), inputs)
        sums = self.squares.setdefault("inputs", {})
        for name, of_layer in reduced(new).items():
            mine = sums.setdefault(name, {})
            for rows, part in of_layer.items():
                mine[rows] = mine[rows] + part if rows in mine else part
        self.squares["batches"] = k + 1
        return samples
