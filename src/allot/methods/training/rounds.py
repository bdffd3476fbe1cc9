"""Training in rounds, by the watch set: how large steps are, and how long it pays, is measured and not set.

A round is a whole schedule, with warm-up, and a cosine to zero: only its end says how good its step size is, because a
large step looks bad until it shrinks. With eta the peak step and n the steps of a round:

    trials      rounds from the same net with eta = eta_0, eta_0 / 3, eta_0 / 9 ..., until one is no better on the watch
                set than the best before it; where one round is wanted, until one is better than the net at the start
    then        from the best net so far:   better: keep it, n = 2 n;   else: take it back, eta = eta / 3
    end         after the last round; when two in a row were taken back; when no trial with eta > eta_0 / 27 was better;
                a training from the dense weights is long: it has one trial

Better: by more than the standard error of the difference, sample by sample. A budget that is widened at first is so in
the first round only. Where nothing is watched there is one round, with the first step size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from allot.errors import AllotError
from allot.network.trees import cloned
from allot.run.fidelity import Fidelity
from allot.run.guard import Looks, as_metrics, fidelity_of, meets
from allot.run.problem import Candidate, Metrics, Problem, finished
from allot.run.store import State

FACTOR = 3.0  # between step sizes
SMALLEST = 1 / 27  # of the first step size


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
    """

    method: Any

    role = "repair"
    needs_data = True
    parallel = True

    def init(self, problem: Problem, candidate: Candidate) -> State:
        training = self.method.training
        state: State = {"step": 0, "steps": training.steps, "rate": training.peak, "length": training.steps}
        state |= {"trials": training.rounds > 1 and not self._fresh, "chosen": training.peak}
        state |= {"tried": [], "inner": {}, "failed": 0, "best": {}, "values": None, "look": None}
        return state

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of the current round; its last step decides about the next one."""
        method, start, watched = self._method(state), self._start(problem, candidate, state), 0
        if not state["inner"]:
            state["inner"] = method.init(problem, start)
            if not state["tried"] and problem.watch and meets(problem, candidate):
                found = fidelity_of(problem, candidate)
                state["values"], watched = found and found.values, problem.watch.images
        looks = Looks(problem, method, start, state["look"])
        end: Candidate | None = None
        try:
            metrics: Metrics = method.step(problem, start, state["inner"])
            metrics |= looks.after_step(state["inner"])
            if finished(state["inner"]):
                end, *_ = looks.chosen(method.finish(problem, start, state["inner"]))
            ended, state["look"] = end is not None, looks.best
        except AllotError as error:
            if type(error) is not AllotError or not problem.watch:
                raise
            ended = True  # the loss is not finite
            metrics = {"forward": len(problem.inputs().positions(state["inner"]["step"])), "backward": 0}
        state["step"] += 1
        if ended:
            metrics |= self._end_round(problem, end, state)
            watched += problem.watch.images if problem.watch else 0
        return metrics | {"watched": metrics.get("watched", 0) + watched}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        best = Candidate.from_state(state["best"], problem) if state["best"] else candidate
        rounds = [*candidate.diagnostics.get("rounds", []), *state["tried"]]
        return replace(best, diagnostics={**candidate.diagnostics, "rounds": rounds})

    def _method(self, state: State) -> Any:
        """The method as it trains in the current round."""
        training = replace(self.method.training, steps=state["length"], learning_rate=state["rate"], rounds=1)
        method = replace(self.method, training=training)
        if self._continues(state):
            method = replace(method, schedule=replace(method.schedule, ramp=1.0))
        return replace(method, fresh=False) if self._continues(state) and self._fresh else method

    @staticmethod
    def _continues(state: State) -> bool:
        """Whether the current round begins with the best net so far."""
        return bool(state["best"]) and not state["trials"]

    @property
    def _fresh(self) -> bool:
        return getattr(self.method, "fresh", False)

    def _start(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return Candidate.from_state(state["best"], problem) if self._continues(state) else candidate

    def _end_round(self, problem: Problem, end: Candidate | None, state: State) -> Metrics:
        """Keep the net at the end of a round or take it back, and choose the next round, in place.

        Args:
            end: None where the loss was not finite.
        """
        found = fidelity_of(problem, end) if end else None
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
        if (kept and found is None) or self._is_last(state):
            state["steps"] = state["step"]
        else:
            state["steps"] = state["step"] + state["length"]
        return as_metrics(found) if found else {}

    def _is_last(self, state: State) -> bool:
        rounds, peak = self.method.training.rounds, self.method.training.peak
        if state["trials"] or not state["best"]:
            return bool(state["rate"] < SMALLEST * peak * (1 - 1e-9)) or (self._fresh and state["failed"] > 0)
        longest = 2 ** (rounds - 1) * self.method.training.steps
        return bool(state["length"] > longest or state["failed"] >= 2)
