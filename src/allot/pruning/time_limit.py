"""A chain cut to a limit of time: all training takes fewer steps by one factor, computed from steps timed here and now.

Every stage makes a few steps on a state that is thrown away; with n_i steps of s_i seconds each,

    sum_i s_i n_i(f) <= SHARE * minutes * 60         n_i(f): steps, where training takes f times as many

Steps that are no training, like the layers of a layer-wise repair, are not cut. The rest of the time is for scoring and
writing, and for a machine that is busier later. Where all fits, training with steps=auto may use the time that is
left: its `max_steps` is as many steps as that allows, the same number in each such stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from allot.errors import UsageError, check_number
from allot.methods.rules import uniform
from allot.methods.training.distillation import AUTO
from allot.methods.training.selection import Selection
from allot.processes import all_gather_object
from allot.run.driver import drive, repeatable
from allot.run.problem import Candidate, Chain, Method, Problem, Rule, finished

SHARE = 0.85  # of the time allowed that steps may take
TRIED = 4  # steps of each stage that are timed; the first one warms up


def choose_cut(
    problem: Problem, chain: Chain, minutes: float | None, earlier: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The cut of training to these minutes, see `measure_cut`; None without a limit.

    Args:
        earlier: the cut that the run began with, which it keeps; None for a new run.
    """
    if minutes is None:
        return None
    if earlier and earlier.get("minutes") == minutes:
        return dict(earlier)
    return all_gather_object(measure_cut(problem, chain, minutes))[0]  # the first process's clock counts


def measure_cut(problem: Problem, chain: Chain, minutes: float) -> dict[str, Any]:
    """The factor by which steps are cut: `{"minutes", "factor", "seconds", "steps": {stage: [requested, left]}}`, and
    "max_steps" of training with steps=auto, where there is any.

    Args:
        minutes: above 0.
    Returns:
        `seconds` is the time that all steps are expected to take after the cut; `steps` is empty where all fits.
    Raises:
        UsageError: not even one step of training in each stage fits.
    """
    if not minutes > 0 or not math.isfinite(minutes):
        raise UsageError(f"max_minutes={minutes}: a number of minutes above 0 is accepted.")
    rule = Rule(uniform, ("weights", "channels"))
    candidate = drive(Selection(), problem, drive(rule, problem, Candidate.dense(problem)))
    repairs = zip(chain.names.repair, chain.repair, strict=True)
    stages: dict[str, Method] = {chain.names.allocate: chain.allocate}
    stages |= {f"{i}. {name}": method for i, (name, method) in enumerate(repairs, 1)}

    def steps_after(factor: float) -> dict[str, int]:
        return {name: _steps(scale_steps(m, factor), problem, candidate, name) for name, m in stages.items()}

    seconds = {name: _seconds_per_step(method, problem, candidate, name) for name, method in stages.items()}
    allowed, factor = SHARE * 60 * minutes, 1.0
    requested = left = steps_after(factor)
    for _ in range(20):
        expected = sum(seconds[name] * count for name, count in left.items())
        if expected <= allowed:
            break
        factor *= 0.98 * allowed / expected
        left = steps_after(factor)
    else:
        raise UsageError(
            f"max_minutes={minutes:g}: with as few steps as can be this chain takes about {expected / 60:.1f} minutes "
            "here. Allow more, or take fewer --samples or a method that trains less."
        )
    cut = {name: [requested[name], left[name]] for name in stages if left[name] < requested[name]}
    found = {"minutes": minutes, "factor": factor, "seconds": round(expected, 1), "steps": cut}
    if auto := [name for name, method in stages.items() if _continues(method)]:
        others = expected - sum(seconds[name] * left[name] for name in auto)
        found["max_steps"] = max(1, math.floor((allowed - others) / max(sum(seconds[name] for name in auto), 1e-9)))
    return found


def shorten(chain: Chain, cut: Mapping[str, Any] | None) -> Chain:
    """The chain with its training cut; as it is without a cut."""
    if not cut:
        return chain
    allocate, repair = scale_steps((chain.allocate, chain.repair), cut["factor"])
    return limit_steps(replace(chain, allocate=allocate, repair=repair), cut.get("max_steps"))


def limit_steps(chain: Chain, most: int | None, *, required: bool = False) -> Chain:
    """The chain in which each training with steps=auto takes at most `most` steps; None: as it is.

    Args:
        required: whether there has to be such a training.
    Raises:
        UsageError: there is none, or `most` is no whole number above 0.
    """
    if most is None:
        return chain
    check_number("max_steps", most, 1, whole=True)
    if required and not any(map(_continues, chain.repair)):
        pairs = zip(chain.names.repair, chain.repair, strict=True)
        trains = next((name for name, method in pairs if hasattr(method, "training")), None)
        advice = f"give --set options.{trains}.steps=auto" if trains else "none of its repairs trains"
        raise UsageError(
            f"max_steps={most}: it limits training with steps=auto, and no repair of this run has that: {advice}."
        )

    def limited(method: Method) -> Method:
        if not _continues(method):
            return method
        part: Any = method
        training = replace(part.training, max_steps=most)
        return cast(Method, replace(part, training=training))

    return replace(chain, repair=tuple(map(limited, chain.repair)))


def scale_steps(value: Any, factor: float) -> Any:
    """A method in which every part that trains takes `factor` times its `steps` (in its first round, if it continues
    while it pays), or `passes`, at least 1.
    """
    if isinstance(value, tuple):
        return tuple(scale_steps(part, factor) for part in value)
    if not is_dataclass(value) or isinstance(value, type) or factor == 1:
        return value
    changed = {f.name: scale_steps(getattr(value, f.name), factor) for f in fields(value) if f.init}
    for name in ("first" if changed.get("steps") == AUTO else "steps", "passes"):
        if isinstance(count := changed.get(name), int):
            changed[name] = max(1, round(factor * count))
    return replace(value, **changed)


def _continues(method: Method) -> bool:
    return getattr(getattr(method, "training", None), "steps", None) == AUTO


def _steps(method: Method, problem: Problem, candidate: Candidate, stage: str) -> int:
    with repeatable(problem.model, problem.seed, stage):
        return int(method.init(problem, candidate)["steps"])


def _seconds_per_step(method: Method, problem: Problem, candidate: Candidate, stage: str) -> float:
    """The mean over the steps after the first one, where there are several."""
    with repeatable(problem.model, problem.seed, stage):
        state = method.init(problem, candidate)
        times: list[float] = []
        while len(times) < TRIED and not finished(state):
            started = time.perf_counter()
            method.step(problem, candidate, state)
            times.append(time.perf_counter() - started)
    warm = times[1:] or times
    return sum(warm) / len(warm) if warm else 0.0
