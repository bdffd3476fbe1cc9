"""Counts of channels corrected until the measured time of the whole net meets the limit: tables only predict this time.

A net is timed beside the dense net, in turn in one process, and its time is given in units of the dense net's time in
the tables: a machine that is busier now slows both. A table or a time may be wrong all the same, so that neither ends a
search: a net that leaves more than a fifth of the limit unused is a success only where no larger net meets the limit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from allot.budget.channels import ChannelBudget, channel_budget
from allot.errors import BudgetError
from allot.export.files.latency_tables import tables_of
from allot.export.timing.latency import Runtime, time_both
from allot.methods.training.selection import allocated
from allot.network.channels import ChannelPlan, slimmed
from allot.run.driver import repeatable
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State

log = logging.getLogger("allot")
ENOUGH = 0.8  # of the limit: a net that takes less time is no success where a larger one meets the limit
WRONG = 0.5  # of the limit: densities of a net that takes less time were allocated by wrong tables


def latency_stages(allocate: Method) -> list[tuple[str, Method]]:
    """The stages between the allocation by `allocate` and the selection, where time is limited."""
    return [
        ("latency", CorrectCounts()),
        ("allocate-again", AllocateAgain(allocate)),
        ("latency-again", CorrectCounts(again=True)),
    ]


@dataclass(frozen=True)
class CorrectCounts:
    """The stage after an allocation under a limit of time: times nets and corrects their counts of channels.

    The same densities make nets of every size. For a net that was timed, the tables predict T; the net for which they
    predict

        T' = T limit / time

    is timed next: it has fewer channels where the net was too slow, and more where time was left. Where T' is not
    between the largest net within the limit and the smallest net over it, a net halfway between them is next, as long
    as the former uses less than `ENOUGH` of the limit. Where there is none, the net over the limit is timed once more,
    because other work may have slowed it. The largest net within the limit is the result.

    Args:
        attempts: nets that are timed, at most; twice as many where the result uses less than `ENOUGH` of the limit.
        near: a net that leaves at most this fraction of the limit unused is accepted; half of it is the target.
        again: whether this is the stage after `AllocateAgain`; it does nothing where that did nothing.
    State:
        kept: group -> channels of the next net to time.
        best: the largest net within the limit, `{"time": nanoseconds, "kept", "slow": factor on the tables}`, or empty.
        over: the smallest net over the limit, `{"time", "kept"}`, or empty.
        doubted: whether a net over the limit was timed once more.
        spare: whether the counts as allocated took less than `WRONG` of the limit, and there were more channels.
    """

    attempts: int = 6
    near: float = 0.05
    again: bool = False

    role = "allocate"
    needs_data = False

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """The counts as they were allocated."""
        steps = 2 * self.attempts if not self.again or _spare(candidate) else 0
        state: State = {"step": 0, "steps": steps, "kept": candidate.allocation.kept, "best": {}, "over": {}}
        return {**state, "doubted": False, "spare": False}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """Time one net, and make the counts of the next one.

        Raises:
            BudgetError: all nets are too slow, or the search found no net that uses the time that is allowed, or one
                that keeps more than a channel in most groups.
        """
        kept, ceiling, family = state["kept"], _ceiling_of_time(problem), _Family(problem, candidate)
        plan = ChannelPlan.of(problem.model, problem.scope.groups, {name: range(k) for name, k in kept.items()})
        times = self._times(problem, plan, ceiling)
        time = times["sparse"]
        state["step"] += 1
        if state["step"] == 1:
            state["spare"] = time < WRONG * ceiling and kept != family.largest
        if time <= ceiling:
            slow = (time - 0.5) / family.time(kept)  # tables this slow predict the measured time
            state["best"] = {"time": time, "kept": kept, "slow": slow}
        else:
            state["over"] = {"time": time, "kept": kept}
        following = self._next(family, state, ceiling, family.time(kept) * (1 - self.near / 2) * ceiling / time)
        if (
            following is None
            or (1 - self.near) * ceiling <= time <= ceiling
            or (state["step"] >= self.attempts and _uses_enough(state["best"], ceiling))
        ):
            state["steps"] = state["step"]
        else:
            state["kept"] = following
        if finished(state):
            self._check(problem, candidate, state)
        return {"forward": 0, "backward": 0, **times}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the counts of the best net, and in its diagnostics the factor for `slow_tables`."""
        if not state["best"]:
            return candidate
        timed = state["step"] + (candidate.diagnostics["latency"]["timed"] if self.again else 0)
        report = {"slow": state["best"]["slow"], "timed": timed, "spare": state["spare"]}
        return allocated(candidate, state["best"]["kept"], {"latency": report})

    def _times(self, problem: Problem, plan: ChannelPlan, ceiling: int) -> dict[str, int]:
        """Times of one net: the longer of two, and the median of three where the two differ by much."""
        times = time_net(problem, plan)
        taken = [times["sparse"]]
        if taken[0] <= ceiling:  # a net that only one of two measurements allows would be over the limit at the end
            taken.append(time_net(problem, plan)["sparse"])
        if min(taken) < (1 - 2 * self.near) * max(taken):
            taken.append(time_net(problem, plan)["sparse"])
        return {**times, "sparse": sorted(taken)[len(taken) // 2]}

    def _next(self, family: _Family, state: State, ceiling: int, aim: float) -> dict[str, int] | None:
        """The counts of the next net to time; None where the search ends."""
        best, over = state["best"], state["over"]
        within = family.time(best["kept"]) if best else 0.0
        beyond = family.time(over["kept"]) if over else math.inf
        if best and best["kept"] == family.largest:
            return None
        kept = family.counts(aim)
        if within < family.time(kept) < beyond:
            return kept
        if _uses_enough(best, ceiling):
            return None
        halfway = family.between(within, beyond)
        if halfway is None and over and not state["doubted"]:
            halfway, state["over"], state["doubted"] = dict(over["kept"]), {}, True
        return halfway

    def _contradicts(self, family: _Family, state: State) -> bool:
        """Whether nets between the largest one within the limit and the smallest one over it should use the limit."""
        best, over = state["best"]["kept"], state["over"]
        if best == family.largest:
            return False
        return state["step"] == 2 * self.attempts or not over or family.time(best) > ENOUGH * family.time(over["kept"])

    def _check(self, problem: Problem, candidate: Candidate, state: State) -> None:
        budget, best, ceiling = channel_budget(problem.budget), state["best"], _ceiling_of_time(problem)
        asked = f"latency={budget.asked['latency']}: nets timed: {state['step']}; "
        if not best:
            over = state["over"]
            raise BudgetError(
                f"{asked}the fastest one took {over['time']:,} ns, {ceiling:,} are allowed. Allow more, or ask for "
                "channels in multiples (--pattern channels:8)."
            )
        if state["spare"] and not self.again:
            return  # the tables were wrong: the allocation is repeated with corrected ones
        taken = f"the largest one within the limit took {best['time']:,} of {ceiling:,} ns"
        if not _uses_enough(best, ceiling) and self._contradicts(_Family(problem, candidate), state):
            larger = f", the smallest one over it {state['over']['time']:,} ns" if state["over"] else ""
            raise BudgetError(
                f"{asked}{taken}{larger}: these times contradict each other, or jump from one channel to the next. Run "
                "again while the machine is quiet, or ask for channels in multiples (--pattern channels:8)."
            )
        thin = _thin_groups(budget, best["kept"], ceiling)
        if 2 * len(thin) > len(budget.terms):
            step = max(term.step for term in budget.terms)
            raise BudgetError(
                f"{asked}{taken}, and keeps {f'{step} channels' if step > 1 else 'one channel'} in {len(thin)} of "
                f"{len(budget.terms)} groups ({', '.join(thin[:3])}, ...). Keep more of each group "
                "(--min-density '*=0.1'), allow more, or run again while the machine is quiet."
            )


@dataclass(frozen=True)
class AllocateAgain:
    """The allocation, repeated where its net used less than `WRONG` of the limit: the tables were wrong.

    `CorrectCounts` has corrected them meanwhile. An allocator that was offered too little time has cut most groups to
    the same few channels, and such densities do not say which group should keep more.

    State:
        that of the allocator; no step where the first allocation stays.
    """

    method: Method

    role = "allocate"

    @property
    def needs_data(self) -> bool:
        return self.method.needs_data

    @property
    def parallel(self) -> bool:
        return bool(getattr(self.method, "parallel", False))

    def init(self, problem: Problem, candidate: Candidate) -> State:
        if not _spare(candidate):
            return {"step": 0, "steps": 0}
        return self.method.init(problem, _dense(problem, candidate))

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        return self.method.step(problem, _dense(problem, candidate), state)

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        if not _spare(candidate):
            return candidate
        better = self.method.finish(problem, _dense(problem, candidate), state)
        return replace(better, diagnostics={**candidate.diagnostics, **better.diagnostics})


class _Family:
    """Nets of the same densities: their counts by the time that the tables predict, from the floors to `largest`."""

    def __init__(self, problem: Problem, candidate: Candidate) -> None:
        self.budget: ChannelBudget = channel_budget(problem.budget).slowed(1.0)
        self.densities, self.ceiling = dict(candidate.allocation), _ceiling_of_time(problem)
        everything = self.time({term.name: term.total for term in self.budget.terms})
        self.largest = self.counts(2 * everything)  # other limits and bounds still hold

    def time(self, kept: Mapping[str, int]) -> float:
        return self.budget.time(kept)[0]

    def counts(self, time: float) -> dict[str, int]:
        """The counts of the largest net that takes at most `time` by the tables."""
        return self.budget.slowed(self.ceiling / max(time, 1.0)).counts(self.densities)

    def between(self, low: float, high: float) -> dict[str, int] | None:
        """The counts of a net that takes more than `low` and less than `high`, halfway if there is one."""
        aim, most = low, min(high, self.time(self.largest))
        for _ in range(40):
            aim = math.sqrt(aim * most) if aim else most / 2  # times differ by factors
            if low < self.time(kept := self.counts(aim)) < high:
                return kept
        return self.largest if low < self.time(self.largest) < high else None


def _dense(problem: Problem, candidate: Candidate) -> Candidate:
    return replace(Candidate.dense(problem), diagnostics=candidate.diagnostics)


def _spare(candidate: Candidate) -> bool:
    return bool(candidate.diagnostics["latency"]["spare"])


def _uses_enough(best: Mapping[str, Any], ceiling: int) -> bool:
    return bool(best) and best["time"] >= ENOUGH * ceiling


def _thin_groups(budget: ChannelBudget, kept: Mapping[str, int], ceiling: int) -> list[str]:
    """Groups that keep one step of channels, less than half of the limit's share of the dense net's time."""
    assert budget.latency is not None
    share = min(ceiling / budget.latency.dense, 1.0)
    return [t.name for t in budget.terms if kept[t.name] <= t.step < share * t.total / 2 and kept[t.name] < t.upper]


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

    Where it uses less than `ENOUGH` of the limit, and took more time when its channels were counted, it is measured
    again; the longest time within the limit counts.
    """
    tables, kept = tables_of(problem), candidate.allocation.kept
    plan = ChannelPlan.of(problem.model, problem.scope.groups, candidate.channels)
    budget, ceiling = channel_budget(problem.budget), _ceiling_of_time(problem)
    least, within = min(ENOUGH * ceiling, 0.9 * budget.cost("latency", kept)), 0
    for _ in range(5):  # the net was within the limit before: mostly, another program ran meanwhile
        with repeatable(problem.model, problem.seed, "measured"):
            sparse = time_net(problem, plan)["sparse"]
        within = max(within, sparse) if sparse <= ceiling else within
        if within >= least:
            break
    if not within:
        raise BudgetError(
            f"latency={budget.asked['latency']}: at the end the net took {sparse:,} ns in the last of five "
            f"measurements, {ceiling:,} are allowed. Of a run that is saved, the same command measures again."
        )
    if within < least:
        log.warning(
            "latency=%s: the net takes %s ns at the end, %s are allowed; it took longer when channels were counted: "
            "run again while the machine is quiet, more channels would fit.",
            budget.asked["latency"], f"{within:,}", f"{ceiling:,}",
        )  # fmt: skip
    return {
        "runtime": tables.runtime,
        "batch": tables.batch,
        "dense_ms": tables.dense / 1e6,
        "limit_ms": ceiling / 1e6,
        "predicted_ms": budget.cost("latency", kept) / 1e6,
        "sparse_ms": within / 1e6,
    }


def _ceiling_of_time(problem: Problem) -> int:
    return next(limit.ceiling for limit in channel_budget(problem.budget).limits if limit.kind == "latency")
