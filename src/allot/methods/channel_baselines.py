"""Allocations of channels to compare with: one ranking of all channels, and greedy search by sensitivity.

global        all channels of the net are ranked together by their score, and the r highest stay; r as large as the
              budget allows (Liu et al., ICCV 2017, rank |gamma| so)
sensitivity   from the dense net, in rounds of equal cost: for each group just enough channels are removed on trial, and
              the removal that moves the outputs least is made (NetAdapt, Yang et al., ECCV 2018, with KL for
              accuracy and no training between rounds)
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch

from allot.budget.channels import ChannelBudget, channel_budget
from allot.budget.costs import Term
from allot.errors import check_number
from allot.methods.training.channel_gates import gated
from allot.methods.training.distillation import Training
from allot.methods.training.selection import CollectedEvidence, allocated, importance, ranked_together
from allot.processes import one_per_process
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class GlobalChannels:
    """Keep the channels that score highest, whichever group they are in.

    State:
        score: group -> importance of its channels, `[C]`.
        squares: sums that the score asks for, as in `CollectedEvidence`.
    """

    role = "allocate"
    needs_data = False
    allocates = ("channels",)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": len(problem.scope.groups), "score": {}, "squares": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        group = problem.scope.groups[state["step"]]
        evidence = CollectedEvidence(problem, candidate, state["squares"])
        state["score"][group.name] = importance(problem, group, evidence)
        state["step"] += 1
        return {"forward": evidence.forward, "backward": evidence.backward}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        total = candidate.allocation.total
        kept = ranked_together(problem.budget, state["score"])
        return allocated(candidate, problem.budget.counts({name: k / total[name] for name, k in kept.items()}))


@dataclass(frozen=True)
class Sensitivity:
    """Search greedily: each round removes channels from the group whose removal changes the outputs least.

    Args:
        training: its loss judges, batch norms normalising by the batch; nothing is trained.
        rounds: how many equal steps of cost lead to the budget, 1 or more.
    Raises:
        UsageError: a value out of its range.
    State:
        kept: group -> channels kept so far.
        drop: how much of the budget each round saves, as a fraction of the budget.
        round: rounds done.
        order: group -> its channels, most important first, `[C]`.
        open: [group, channels kept] of the proposals of this round that were not tried yet.
        tried: group -> [channels kept, loss] of the others.
        answers: batch -> the dense net's outputs on it; None where inputs do not repeat.
        asked: samples that the score pushed [forward, backward] and that no step has reported yet.
    """

    training: Training = field(default_factory=Training)
    rounds: int = 32

    role = "allocate"
    needs_data = True
    parallel = True
    allocates = ("channels",)

    def __post_init__(self) -> None:
        check_number("rounds", self.rounds, 1, whole=True)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Everything kept; the proposals of the first round."""
        budget = channel_budget(problem.budget)
        kept = {term.name: term.upper for term in budget.terms}
        evidence = CollectedEvidence(problem, candidate, {})
        scores = {group.name: importance(problem, group, evidence) for group in problem.scope.groups}
        state = {
            "step": 0,
            "kept": kept,
            "drop": max(budget.height(kept) - 1, 0.0) / self.rounds,
            "round": 0,
            "order": {name: score.argsort(descending=True, stable=True) for name, score in scores.items()},
            "tried": {},
            "answers": {} if problem.inputs().repeats() else None,
            "asked": [evidence.forward, evidence.backward],
        }
        proposals = self._proposals(budget, state)
        return state | {"open": proposals, "steps": self.rounds * len(proposals)}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One group's proposal on one batch, or as many as there are processes; after a round the best is taken."""
        (forward, backward), state["asked"] = state["asked"], [0, 0]
        k = state["round"] % problem.inputs().batches

        def judged(proposal: list[Any]) -> tuple[str, int, float, int]:
            name, fewer = proposal
            kept = state["kept"] | {name: fewer}
            gates = {
                group.name: torch.zeros(group.total).index_fill(0, state["order"][group.name][: kept[group.name]], 1)
                for group in problem.scope.groups
            }
            tensors = gated(problem, candidate.effective(problem), gates)
            loss, pushed = self.training.judge(problem, tensors, k, state["answers"], batch_statistics=True)
            return name, fewer, loss, pushed

        results = one_per_process(state["open"], judged)
        for name, fewer, loss, _ in results:
            state["open"].pop(0)
            state["tried"][name] = [fewer, loss]
            state["step"] += 1
        if not state["open"]:
            best = min(state["tried"], key=lambda group: (state["tried"][group][1], group))
            state["kept"][best] = state["tried"][best][0]
            state["round"] += 1
            state |= {"tried": {}, "open": self._proposals(channel_budget(problem.budget), state)}
            state["steps"] = state["step"] + len(state["open"]) * max(self.rounds - state["round"], 1)
        forward += sum(pushed for *_, pushed in results)
        return {"forward": forward, "backward": backward, "loss": results[-1][2]}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the remaining channels; what rounding leaves of the budget is allocated as well."""
        total = candidate.allocation.total
        return allocated(candidate, problem.budget.counts({name: k / total[name] for name, k in state["kept"].items()}))

    def _proposals(self, budget: ChannelBudget, state: State) -> list[list[Any]]:
        """[group, channels] that would bring the cost down by one step, fewest channels given up; none when it fits."""
        kept, height = state["kept"], budget.height(state["kept"])
        if height <= 1:
            return []
        drop = state["drop"]

        def proposals_of(term: Term) -> list[list[Any]]:
            levels = budget.levels(term, kept[term.name])
            low = bisect_right(levels, height - drop, key=lambda fewer: budget.height({**kept, term.name: fewer}))
            return [[term.name, levels[low - 1]]] if low else []

        while drop > 1e-9:
            if proposals := [proposal for term in budget.terms for proposal in proposals_of(term)]:
                return proposals
            drop /= 2  # no group alone can save that much any more
        return []
