"""Training in rounds, by the watch set: how large steps are, and how long it pays, is measured and not set.

A round is a whole schedule, with warm-up, and a cosine to zero: only its end says how good its step size is, because a
large step looks bad until it shrinks. With eta the peak step and n the steps of a round:

    trials      rounds from the same net with eta = eta_0, eta_0 / 3, eta_0 / 9 ..., until one is no better on the watch
                set than the best before it; where one round is wanted, until one is better than the net at the start
    then        from the best net so far:   better: keep it, n = 2 n;   else: take it back, eta = eta / 3
    end         when two rounds in a row were taken back; when no trial with eta > eta_0 / 27 was better;
                steps=auto: when fewer steps are left of `max_steps` than the first round had (the last round takes
                those that are left); steps=N: after the last one of `rounds`

Better: by more than the standard error of the difference, sample by sample. A budget that is widened at first is so in
the first round only. Where nothing is watched there is one round, with the first step size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from allot.errors import NotFinite
from allot.methods.training.distillation import AUTO
from allot.network.trees import cloned
from allot.run.fidelity import Fidelity
from allot.run.guard import Looks, as_metrics, fidelity_of, meets
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State

FACTOR = 3.0  # between step sizes
SMALLEST = 1 / 27  # of the first step size


def in_rounds(method: Method, problem: Problem) -> Method:
    """The method in rounds, where it is a training that takes its step size, or the number of its rounds, by trial."""
    by_trial = getattr(getattr(method, "training", None), "by_trial", False)
    return Rounds(method) if by_trial and method.role == "repair" and problem.watch else method


@dataclass(frozen=True)
class Rounds:
    """A method that trains, in rounds; a repair.

    Args:
        method: one with `training` and `schedule`, like `Distill`; its learning rate is that of the first round where
            it is a number, and 0.05 where it is "auto", and its steps are those of the first round.
    State:
        rate, length: of the current round.
        trials: whether rounds begin with the net at the start.
        chosen: rate of the best net so far.
        tried: `{rate, steps, kept}` of each round that has ended, and the distance at its end.
        inner: the method's state in the current round; empty before its first step.
        failed: rounds in a row that were taken back.
        best: state of the best candidate so far.
        values: its distances from the dense net, by sample; none where it does not meet the budget yet.
        look: as `Looks.best`, in the current round.
        ended: why there is no further round; empty before the end.
    """

    method: Any

    role = "repair"
    needs_data = True
    parallel = True

    def init(self, problem: Problem, candidate: Candidate) -> State:
        training = self.method.training
        state: State = {"step": 0, "steps": training.length, "rate": training.peak, "length": training.length}
        state |= {"trials": training.in_rounds, "chosen": training.peak, "ended": ""}
        state |= {"tried": [], "inner": {}, "failed": 0, "best": {}, "values": None, "look": None}
        return state

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of the current round; its last step decides about the next one."""
        method, start, watched = self._method(state), self._start(problem, candidate, state), 0
        if not state["inner"]:
            state["inner"] = method.init(problem, start)
            if not state["tried"] and problem.watch and meets(problem, candidate):
                before = fidelity_of(problem, candidate)
                state["values"], watched = before and before.values, problem.watch.images
        looks = Looks(problem, method, start, state["look"])
        end: Candidate | None = None
        found: Fidelity | None = None
        try:
            metrics: Metrics = method.step(problem, start, state["inner"])
            metrics |= looks.after_step(state["inner"])
            if finished(state["inner"]):
                end, found, _ = looks.chosen(method.finish(problem, start, state["inner"]))
            ended, state["look"] = end is not None, looks.best
        except NotFinite:
            if not problem.watch:
                raise
            ended = True
            metrics = {"forward": len(problem.inputs().positions(state["inner"]["step"])), "backward": 0}
        state["step"] += 1
        if ended:
            metrics |= self._end_round(end, found, state)
            watched += problem.watch.images if problem.watch else 0
        return metrics | {"watched": metrics.get("watched", 0) + watched}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        best = Candidate.from_state(state["best"], problem) if state["best"] else candidate
        before = candidate.diagnostics
        training = {"rounds": len(state["tried"]), "steps": state["step"], "ended": state["ended"]}
        more = {"rounds": state["tried"], "training": [training]}
        return replace(best, diagnostics={**before, **{key: [*before.get(key, []), *more[key]] for key in more}})

    def _method(self, state: State) -> Any:
        """The method as it trains in the current round."""
        training = replace(self.method.training, steps=state["length"], learning_rate=state["rate"], rounds=1)
        method = replace(self.method, training=training)
        if self._continues(state):
            method = replace(method, schedule=replace(method.schedule, ramp=1.0))
        return method

    @staticmethod
    def _continues(state: State) -> bool:
        """Whether the current round begins with the best net so far."""
        return bool(state["best"]) and not state["trials"]

    def _start(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return Candidate.from_state(state["best"], problem) if self._continues(state) else candidate

    def _end_round(self, end: Candidate | None, found: Fidelity | None, state: State) -> Metrics:
        """Keep the net at the end of a round or take it back, and choose the next round, in place.

        Args:
            end: None where the loss was not finite.
            found: its fidelity; None where nothing is watched.
        """
        before = None if state["values"] is None else Fidelity("", state["values"], None)
        kept = end is not None and (found is None or before is None or before.is_worse_than(found))
        tried: dict[str, Any] = {"rate": state["rate"], "steps": state["length"], "kept": kept}
        if found:
            tried |= found.to_json()
        state["tried"] = [*state["tried"], tried]
        state |= {"inner": {}, "look": None, "failed": 0 if kept else state["failed"] + 1}
        if kept and end:
            state |= {"best": cloned(end.to_state()), "values": found and found.values, "chosen": state["rate"]}
        if state["trials"] and state["best"] and not kept:  # the best step size is known
            state |= {"trials": False, "rate": state["chosen"], "length": 2 * state["length"], "failed": 0}
        elif kept and not state["trials"]:
            state["length"] *= 2
        else:
            state["rate"] /= FACTOR
        left = (self._most_steps or math.inf) - state["step"]
        state["ended"] = "outputs cannot be compared" if kept and found is None else self._reason_to_end(state, left)
        if not state["ended"]:
            state["length"] = min(state["length"], left)
        state["steps"] = state["step"] + (0 if state["ended"] else state["length"])
        return as_metrics(found) if found else {}

    @property
    def _most_steps(self) -> int | None:
        training = self.method.training
        most: int | None = training.max_steps if training.steps == AUTO else None
        return most

    def _reason_to_end(self, state: State, left: float) -> str:
        """Why there is no further round; empty where there is one.

        Args:
            left: steps that are left of `max_steps`.
        """
        training, begun = self.method.training, bool(state["best"]) and not state["trials"]
        if not begun and state["rate"] < SMALLEST * training.peak * (1 - 1e-9):
            return "the smallest step size was the best" if state["best"] else "no step size made the net better"
        if begun and state["failed"] >= 2:
            return "two rounds in a row made the net no better"
        if begun and training.steps != AUTO and state["length"] > 2 ** (training.rounds - 1) * training.length:
            return "all steps that were requested"
        if left < (min(state["length"], training.length) if begun else state["length"]):
            return f"of {self._most_steps:,} steps allowed, {left:,} are left: too few for a round"
        return ""
