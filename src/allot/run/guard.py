"""The guard: fidelity on the watch set before and after every stage of a run; the better net is kept.

A stage that ends worse than it began is undone. A training stage is measured on its way, and ends with its best state.
Two nets are compared sample by sample, see `allot.run.fidelity`: what differs by less than a standard error is equal,
and the later net is kept.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, ref

from allot.network.trees import cloned
from allot.run.calibration import SURE
from allot.run.fidelity import Fidelity, Watch
from allot.run.outputs import NAMES
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import Log, State

log = logging.getLogger("allot")

LOOKS = 10  # in a training, the last one at its end
LOOKED = "watch_"  # before the names of what a look shows, among the metrics of a step


@dataclass
class Guard:
    """The guard of one run; of a problem without a watch set it measures nothing and undoes nothing.

    Args:
        log: gets every measurement.
    """

    problem: Problem
    log: Log

    def __post_init__(self) -> None:
        self._seen: list[tuple[ReferenceType[Candidate], Fidelity | None]] = []  # the last ones that were measured

    @property
    def watch(self) -> Watch | None:
        """The watch set."""
        return self.problem.watch

    def fidelity(self, candidate: Candidate) -> Fidelity | None:
        """The fidelity of a candidate's net; None where nothing is watched or outputs cannot be compared."""
        for seen, fidelity in self._seen:
            if seen() is candidate:
                return fidelity
        return self._remember(candidate, fidelity_of(self.problem, candidate))

    def _remember(self, candidate: Candidate, fidelity: Fidelity | None) -> Fidelity | None:
        self._seen = [*self._seen[-2:], (ref(candidate), fidelity)]  # a stage compares three: before, at its end, best
        return fidelity

    def note(self, stage: str, step: int, candidate: Candidate, **more: Any) -> None:
        """Put the fidelity of a candidate on record."""
        if self.watch and (found := self.fidelity(candidate)):
            self.log.fidelity.append({"stage": stage, "step": step, **found.to_json(), **more})
            self.log.watched += self.watch.images

    def note_look(self, stage: str, step: int, metrics: Metrics) -> None:
        """Put a look at a net in training on record, from the metrics of its step."""
        self.log.watched += int(metrics.pop("watched", 0))
        if look := {name.removeprefix(LOOKED): value for name, value in metrics.items() if name.startswith(LOOKED)}:
            self.log.fidelity.append({"stage": stage, "step": step, **look})

    def note_dense(self, dense: Candidate) -> None:
        """Begin the record: the watch set, and the dense net, which has no distance from itself."""
        if self.watch and "kind" not in self.log.watch:
            self.note("dense", 0, dense)
            self.log.watched += len(self.watch) * bool(self.log.fidelity)  # the dense answers
            few = len(self.watch) + len(self.problem.inputs()) < SURE
            self.log.watch |= {"samples": len(self.watch), "kind": self.watch.kind, "unsure": few}
            if self.watch.reason:
                self.log.watch["reason"] = self.watch.reason
                log.warning("nothing compares this run with the dense model: %s", self.watch.reason)

    def after(
        self, stage: str, step: int, before: Candidate, after: Candidate, *, starts_over: bool = False,
        cause: str | None = None,
    ) -> Candidate:  # fmt: skip
        """`after`, the net at the end of a stage; or `before`, where that meets the budget and `after` is worse.

        Args:
            starts_over: whether the stage set `before` aside: its net then has to have the lower mean; else less than
                a standard error is no difference, and the net that more was done to stays.
            cause: what made it worse, where that is not the method of the stage.
        """
        first = self.fidelity(before) if meets(self.problem, before) else None
        second = self.fidelity(after) if after.masks else None
        worse = first and second and (second.is_worse_than(first) or (starts_over and second.mean > first.mean))
        if not first or not second or not worse:
            if second:
                self.note(stage, step, after)
            return after
        stages = (entry["stage"] for entry in self.log.fidelity if not entry.get("undone"))
        kept = [name for name in stages if name not in (stage, "guard")]
        self.note(stage, step, after, undone=True)
        self.note("guard", step, before)
        self.tell(f"{cause or _method(stage)} made it worse: {second.change(first)}; kept {_method(kept[-1])}.")
        before = replace(before, diagnostics=after.diagnostics)
        self._remember(before, first)
        return before

    def best_of(self, stage: str, steps: int, looks: Looks, last: Candidate) -> Candidate:
        """`last`, the net at the end of training, or its best state where that is better; on record."""
        candidate, fidelity, final = looks.chosen(last)
        if fidelity and final and looks.best:
            self._remember(last, final)
            self.note(stage, steps, last, undone=True)
            change = fidelity.change(final)
            self.tell(f"{_method(stage)}: kept the state after step {looks.best['step']} of {steps}: {change}.")
        self._remember(candidate, fidelity)
        return candidate

    def note_left_out(self, stage: str, reason: str) -> None:
        """Put on record that a training did not run; nothing where there is no reason."""
        if reason:
            self.tell(f"{_method(stage)} left out: {reason}.")

    def note_useless(self, candidate: Candidate) -> None:
        """Put on record that the outputs of a net are no closer to the dense net's than a constant is."""
        found = self.fidelity(candidate)
        if found and found.kind == "error" and not found.mean < 1:
            self.tell(f"the net is no better than a constant: {NAMES['error']} {found.mean:.3g}.")

    def tell(self, sentence: str) -> None:
        """Put a sentence on record, and into the log."""
        log.warning("%s", sentence)
        self.log.guard.append(sentence)


class Looks:
    """Looks at a net while it is trained, and its best state so far.

    Args:
        best: the state of `best` that was saved; None for a training that begins.
    """

    def __init__(self, problem: Problem, method: Method, start: Candidate, best: State | None) -> None:
        self.problem, self.method, self.start, self.best = problem, method, start, best

    def after_step(self, state: State) -> Metrics:
        """What a look shows, as metrics of the step; nothing where no look is due, or the budget is not met yet."""
        step, watch = state["step"], self.problem.watch
        if watch is None or step % max(1, -(-state["steps"] // LOOKS)) or finished(state):
            return {}
        candidate = self.method.finish(self.problem, self.start, state)
        if not meets(self.problem, candidate) or (found := fidelity_of(self.problem, candidate)) is None:
            return {}
        if self.best is None or found.mean < self.best["values"].mean():
            best = {"step": step, "candidate": candidate.to_state(), "values": found.values}
            self.best = cloned(best) | {"kind": found.kind, "agreement": found.agreement}
        return {**as_metrics(found), "watched": watch.images}

    def chosen(self, last: Candidate) -> tuple[Candidate, Fidelity | None, Fidelity | None]:
        """(`last`, the net at the end, or its best state where that is better; its fidelity; fidelity of `last` where
        the best state was chosen).
        """
        final = fidelity_of(self.problem, last)
        if self.best is None or final is None or not final.is_worse_than(fidelity_in(self.best)):
            return last, final, None
        return Candidate.from_state(self.best["candidate"], self.problem), fidelity_in(self.best), final


def fidelity_of(problem: Problem, candidate: Candidate) -> Fidelity | None:
    """The fidelity of a candidate's net, which keeps no masked copy of the model; None without a watch set."""
    return problem.watch.fidelity(replace(candidate).effective(problem)) if problem.watch else None


def fitted_share(problem: Problem, candidate: Candidate) -> float | None:
    """The distance from the dense net on inputs that a net was fitted to, over that on the watch set.

    As many inputs are looked at as are watched. None where outputs cannot be compared, 0 for the dense net.
    """
    if not problem.watch or not (found := fidelity_of(problem, candidate)):
        return None
    inputs = problem.inputs()
    used = replace(inputs, indices=inputs.indices[: len(problem.watch)])
    fitted = Watch(problem.model, used, problem.comparison).fidelity(replace(candidate).effective(problem))
    if fitted is None or not math.isfinite(fitted.mean) or not math.isfinite(found.mean):
        return None
    return fitted.mean / found.mean if found.mean else 0.0


def fidelity_in(best: State) -> Fidelity:
    """The fidelity that a state of `Looks.best` holds."""
    return Fidelity(best["kind"], best["values"], best["agreement"])


def as_metrics(fidelity: Fidelity) -> Metrics:
    """As metrics of a step; without what is not finite."""
    return {LOOKED + name: value for name, value in fidelity.to_json().items() if value is not None}


def meets(problem: Problem, candidate: Candidate) -> bool:
    """Whether the masks of a candidate keep what its allocation says; in training, a wider budget may hold at first."""
    sizes = problem.budget.sizes(candidate.allocation.kept)
    return all(name in candidate.masks and int(candidate.masks[name].sum()) == sizes[name] for name in sizes)


def _method(stage: str) -> str:
    """The name of the method of a stage.

    >>> _method("repair-2-admm"), _method("select")
    ('admm', 'the selected weights')
    """
    if stage == "select":
        return "the selected weights"
    return stage.split("-", 2)[2] if stage.startswith("repair-") else stage
