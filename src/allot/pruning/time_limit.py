"""A chain brought down to a limit of time: steps of training are cut by one factor, from what steps take here and now.

Every stage is begun on a throwaway state and makes a few steps; with n_i steps of s_i seconds each,

    sum_i s_i n_i(f) <= SHARE * minutes * 60         n_i(f): steps, where training takes f times as many

Steps that are no training, like the layers of a layer-wise repair, are not cut. What scoring and writing take, and a
machine that is busier later, is what the rest of the time is for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from allot.errors import UsageError
from allot.methods.rules import uniform
from allot.methods.training.selection import Selection
from allot.processes import all_gather_object, on_first_process
from allot.run.driver import drive, repeatable
from allot.run.problem import Candidate, Chain, Method, Problem, Rule, finished

SHARE = 0.85  # of the time allowed that steps may take
TRIED = 4  # steps of each stage that are timed; the first one warms up


def cut_of(
    problem: Problem, chain: Chain, minutes: float | None, earlier: Callable[[], Mapping[str, Any] | None]
) -> dict[str, Any] | None:
    """How training is cut to these minutes (`fitted`), None without a limit; a resumed run keeps the cut it began with.

    Args:
        earlier: the cut that the run began with, None for a new run.
    """
    if minutes is None:
        return None
    before: dict[str, Any] = on_first_process(lambda: dict(earlier() or {}))
    if before.get("minutes") == minutes:
        return before
    return all_gather_object(fitted(problem, chain, minutes))[0]  # the first process's clock counts


def fitted(problem: Problem, chain: Chain, minutes: float) -> dict[str, Any]:
    """By what factor steps have to be cut: `{"minutes", "factor", "seconds", "steps": {stage: [asked, left]}}`.

    Args:
        minutes: above 0.
    Returns:
        `seconds` is what all steps are expected to take after the cut; `steps` is empty where all fits.
    Raises:
        UsageError: not even one step of training at a time fits.
    """
    if not minutes > 0 or not math.isfinite(minutes):
        raise UsageError(f"max_minutes={minutes}: a number of minutes above 0 is accepted.")
    shares = Rule(uniform, ("weights", "channels"))
    candidate = drive(Selection(), problem, drive(shares, problem, Candidate.dense(problem)))
    stages = _stages(chain)
    taken = {name: _seconds(method, problem, candidate, name) for name, method in stages.items()}
    asked = {name: _steps(method, problem, candidate, name) for name, method in stages.items()}
    allowed, factor, left = SHARE * 60 * minutes, 1.0, dict(asked)
    for _ in range(20):
        expected = sum(taken[name] * count for name, count in left.items())
        if expected <= allowed:
            break
        factor *= 0.98 * allowed / expected
        left = {name: _steps(scaled(m, factor), problem, candidate, name) for name, m in stages.items()}
    else:
        raise UsageError(
            f"max_minutes={minutes:g}: with as few steps as can be this chain takes about {expected / 60:.1f} minutes "
            "here. Allow more, or take fewer --samples or a method that trains less."
        )
    cut = {name: [asked[name], left[name]] for name in stages if left[name] < asked[name]}
    return {"minutes": minutes, "factor": factor, "seconds": round(expected, 1), "steps": cut}


def shortened(chain: Chain, cut: Mapping[str, Any]) -> Chain:
    """The chain with its training cut by that factor."""
    repair = tuple(scaled(part, cut["factor"]) for part in chain.repair)
    return replace(chain, allocate=scaled(chain.allocate, cut["factor"]), repair=repair)


def scaled(value: Any, factor: float) -> Any:
    """A method with the `steps` of everything in it that trains times `factor`, at least 1."""
    if isinstance(value, tuple):
        return tuple(scaled(part, factor) for part in value)
    if not is_dataclass(value) or isinstance(value, type) or factor == 1:
        return value
    changed = {f.name: scaled(getattr(value, f.name), factor) for f in fields(value) if f.init}
    if isinstance(steps := changed.get("steps"), int):
        changed["steps"] = max(1, round(factor * steps))
    return replace(value, **changed)


def _stages(chain: Chain) -> dict[str, Method]:
    named = zip(chain.names.repair, chain.repair, strict=True)
    return {chain.names.allocate: chain.allocate} | {f"{i}. {name}": part for i, (name, part) in enumerate(named, 1)}


def _steps(method: Method, problem: Problem, candidate: Candidate, stage: str) -> int:
    with repeatable(problem.model, problem.seed, stage):
        return int(method.init(problem, candidate)["steps"])


def _seconds(method: Method, problem: Problem, candidate: Candidate, stage: str) -> float:
    """Of one step: the mean of those after the first one, where there are several."""
    with repeatable(problem.model, problem.seed, stage):
        state = method.init(problem, candidate)
        times: list[float] = []
        while len(times) < TRIED and not finished(state):
            started = time.perf_counter()
            method.step(problem, candidate, state)
            times.append(time.perf_counter() - started)
    several = times[1:] or times
    return sum(several) / len(several) if several else 0.0
