"""What a run did on its way, as charts: densities, what is used of the budget, losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allot.report.charts import Line, lines

Report = Mapping[str, Any]
Paths = dict[str, list[tuple[float, float]]]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Lines of steps.jsonl, the numbers in them; what is no step, or was cut short, is left out."""
    path, found = run / "steps.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("stage"), str) and _is_number(content.get("step")):
            found.append({key: value for key, value in content.items() if key == "stage" or _is_number(value)})
    return found


def moved(report: Report) -> str:
    """How densities moved while they were learned; empty where nothing did."""
    told = report["diagnostics"].get(report["allocate"], {})
    total = {row["name"]: row["total"] for row in report["layers"]}
    paths: Paths = {}
    for entry in told.get("trajectory", []):
        for name, kept in entry["kept"].items():
            paths.setdefault(name, []).append((entry["step"], kept / total[name]))
    for step, densities in told.get("densities", []):
        for name, density in zip(told["groups"], densities, strict=True):
            paths.setdefault(name, []).append((step, density))
    return lines(_toned(paths), "step", "density", base=0.0)


def spent(steps: Sequence[Report]) -> str:
    """What is used of every limit while densities are learned, as a share of it."""
    paths: Paths = {}
    for step in steps:
        if step["stage"] != "allocate":
            continue
        if "spent" in step:
            paths.setdefault("the limit that binds", []).append((step["step"], step["spent"]))
        for key, limit in step.items():
            kind = key.removeprefix("limit.")
            if key.startswith("limit.") and limit and f"cost.{kind}" in step:
                paths.setdefault(kind, []).append((step["step"], step[f"cost.{kind}"] / limit))
    return lines(_toned(paths), "step", "used, of what is allowed", limit=1.0, base=0.0) if paths else ""


def losses(steps: Sequence[Report]) -> list[tuple[str, str]]:
    """(stage, chart) of every stage that had a loss in several steps."""
    paths: Paths = {}
    for step in steps:
        if "loss" in step:
            paths.setdefault(step["stage"], []).append((step["step"], step["loss"]))
    return [(stage, lines([Line(stage, p)], "step", "loss")) for stage, p in paths.items() if len(p) > 2]


def _toned(paths: Paths) -> list[Line]:
    last = max(len(paths) - 1, 1)
    return [Line(name, points, i / last) for i, (name, points) in enumerate(paths.items())]


def _is_number(value: object) -> bool:
    """Whether it is a number that a chart can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100
