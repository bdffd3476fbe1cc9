"""Counts of channels corrected until the measured time of the whole net meets the limit: tables only predict this time.

A net is timed beside the dense net, in turn in one process, and its time is given in units of the dense net's time in
the tables: a machine that is busier now slows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from allot.budget.channels import channel_budget
from allot.errors import BudgetError
from allot.export.files.latency_tables import tables_of
from allot.export.timing.latency import Runtime, time_both
from allot.methods.training.selection import allocated
from allot.network.channels import ChannelPlan, slimmed
from allot.run.driver import repeatable
from allot.run.problem import Candidate, Metrics, Problem, finished
from allot.run.store import State


@dataclass(frozen=True)
class CorrectCounts:
    """The stage after an allocation under a limit of time: times the net and corrects its counts of channels.

    The tables are slowed until they predict the measured time, and the same densities make new counts: fewer channels
    where the net was too slow, more where it had time left. The slowest net within the limit is the result.

    Args:
        attempts: nets that are timed, at most.
        near: a net that leaves at most this fraction of the limit unused is accepted; half of it is the target.
    State:
        kept: group -> channels of the next net to time.
        best: the slowest net within the limit, `{"time": nanoseconds, "kept", "slow": factor on the tables}`, or empty.
    """

    attempts: int = 6
    near: float = 0.05

    role = "allocate"
    needs_data = False

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """The counts as they were allocated."""
        return {"step": 0, "steps": self.attempts, "kept": candidate.allocation.kept, "best": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """Time one net, and make the counts of the next one.

        Raises:
            BudgetError: the last net is too slow as well.
        """
        budget, kept, best = channel_budget(problem.budget), state["kept"], state["best"]
        ceiling = _ceiling_of_time(problem)
        plan = ChannelPlan.of(problem.model, problem.scope.groups, {name: range(k) for name, k in kept.items()})
        times = time_net(problem, plan)
        time = times["sparse"]
        if time <= ceiling:  # a net that only one of two measurements allows would be over the limit at the end
            time = max(time, time_net(problem, plan)["sparse"])
        slow = (time - 0.5) / budget.slowed(1.0).time(kept)[0]  # tables this slow predict the measured time
        state["step"] += 1
        if time <= ceiling and time > best.get("time", 0):
            state["best"] = best = {"time": time, "kept": kept, "slow": slow}
        state["kept"] = budget.slowed(slow / (1 - self.near / 2)).counts(dict(candidate.allocation))
        if (1 - self.near) * ceiling <= time <= ceiling or state["kept"] == kept:
            state["steps"] = state["step"]
        if finished(state) and not best:
            raise BudgetError(
                f"latency={budget.asked['latency']}: nets timed: {state['step']}; the last one took {time:,} ns, "
                f"{ceiling:,} are allowed. Allow more, or ask for channels in multiples (--pattern channels:8)."
            )
        return {"forward": 0, "backward": 0, **times, "sparse": time}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the counts of the best net, and in its diagnostics the factor for `slow_tables`."""
        best = state["best"]
        return allocated(candidate, best["kept"], {"latency": {"slow": best["slow"], "timed": state["step"]}})


def slow_tables(problem: Problem, diagnostics: Mapping[str, Any]) -> Problem:
    """The problem with the tables slowed as `CorrectCounts` found, where the diagnostics say so."""
    if "latency" not in diagnostics:
        return problem
    return replace(problem, budget=channel_budget(problem.budget).slowed(diagnostics["latency"]["slow"]))


def time_net(problem: Problem, plan: ChannelPlan) -> dict[str, int]:
    """`{dense, sparse}`: nanoseconds per batch, in units of the dense net's time in the tables."""
    tables = tables_of(problem)
    slim = slimmed(problem.model, plan)
    dense, sparse = time_both(problem.model, slim, problem.example, Runtime.parse(tables.runtime))
    return {"dense": tables.dense, "sparse": round(sparse / dense * tables.dense)}


def latency_report(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """Times for the report, in milliseconds: of the dense net, allowed, predicted by the tables, and measured.

    Raises:
        BudgetError: the net exceeds the limit in all of five measurements.
    """
    tables, kept = tables_of(problem), candidate.allocation.kept
    plan = ChannelPlan.of(problem.model, problem.scope.groups, candidate.channels)
    budget, ceiling = channel_budget(problem.budget), _ceiling_of_time(problem)
    for _ in range(5):  # the net was within the limit before: mostly, another program ran meanwhile
        with repeatable(problem.model, problem.seed, "measured"):
            sparse = time_net(problem, plan)["sparse"]
        if sparse <= ceiling:
            break
    else:
        raise BudgetError(
            f"latency={budget.asked['latency']}: at the end the net took {sparse:,} ns in the last of five "
            f"measurements, {ceiling:,} are allowed. Of a run that is saved, the same command measures again."
        )
    return {
        "runtime": tables.runtime,
        "batch": tables.batch,
        "dense_ms": tables.dense / 1e6,
        "limit_ms": ceiling / 1e6,
        "predicted_ms": budget.cost("latency", kept) / 1e6,
        "sparse_ms": sparse / 1e6,
    }


def _ceiling_of_time(problem: Problem) -> int:
    return next(limit.ceiling for limit in channel_budget(problem.budget).limits if limit.kind == "latency")
