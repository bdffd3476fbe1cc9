"""A chain brought down to a limit of time: steps of training are cut by one factor, from what steps take here and now.

Every stage is begun on a throwaway state and makes a few steps; with n_i steps of s_i seconds each,

    sum_i s_i n_i(f) <= SHARE * minutes * 60         n_i(f): steps, where training takes f times as many

Steps that are no training, like the layers of a layer-wise repair, are not cut. What scoring and writing take, and a
machine that is busier later, is what the rest of the time is for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from allot.errors import UsageError
from allot.methods.rules import uniform
from allot.methods.training.selection import Selection
from allot.processes import all_gather_object, on_first_process
from allot.pruning.assemble import Parts
from allot.run.driver import drive, repeatable
from allot.run.problem import Candidate, Method, Problem, Rule, finished
from allot.run.store import read_run

SHARE = 0.85  # of the time allowed that steps may take
TRIED = 4  # steps of each stage that are timed; the first one warms up


def kept_cut(problem: Problem, parts: Parts, minutes: float | None, run: str | Path | None) -> dict[str, Any] | None:
    """How the chain is brought down to these minutes: as the run began, where it did. None without a limit."""
    if minutes is None:
        return None

    def began() -> dict[str, Any]:
        there = run and (Path(run) / "run.json").exists()
        return read_run(run).get("configuration", {}).get("fit") or {} if run and there else {}

    earlier: dict[str, Any] = on_first_process(began)
    if earlier.get("minutes") == minutes:
        return earlier
    return all_gather_object(fitted(problem, parts, minutes))[0]  # the first process's clock counts


def fitted(problem: Problem, parts: Parts, minutes: float) -> dict[str, Any]:
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
    stages = _stages(parts)
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


def shortened(parts: Parts, cut: Mapping[str, Any]) -> Parts:
    """The chain with its training cut by that factor."""
    repair = tuple(scaled(part, cut["factor"]) for part in parts.repair)
    return replace(parts, allocate=scaled(parts.allocate, cut["factor"]), repair=repair)


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


def _stages(parts: Parts) -> dict[str, Method]:
    named = zip(parts.names.repair, parts.repair, strict=True)
    return {parts.names.allocate: parts.allocate} | {f"{i}. {name}": part for i, (name, part) in enumerate(named, 1)}


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
