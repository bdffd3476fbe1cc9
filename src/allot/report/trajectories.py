"""The steps of a run as charts: densities, the used part of the budget, losses."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allot.report.charts import Line, coloured_lines, lines

Report = Mapping[str, Any]
Points = Mapping[str, list[tuple[float, float]]]


def read_steps(run: Path) -> list[dict[str, Any]]:
    """Lines of steps.jsonl with their numbers; a line that is no step, or was cut short, is left out."""
    path, steps = run / "steps.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("stage"), str) and _fits_a_chart(content.get("step")):
            steps.append({key: value for key, value in content.items() if key == "stage" or _fits_a_chart(value)})
    return steps


def density_chart(report: Report) -> str:
    """The densities while they were learned; empty where none was."""
    diagnostics = report["diagnostics"].get(report["allocate"], {})
    total = {row["name"]: row["total"] for row in report["layers"]}
    points: Points = defaultdict(list)
    for entry in diagnostics.get("trajectory", []):
        for name, kept in entry["kept"].items():
            points[name].append((entry["step"], kept / total[name]))
    for step, densities in diagnostics.get("densities", []):
        for name, density in zip(diagnostics["groups"], densities, strict=True):
            points[name].append((step, density))
    return lines(coloured_lines(points), "step", "density", base=0.0)


def budget_chart(steps: Sequence[Report]) -> str:
    """The cost while densities were learned, as a share of each limit; empty where no step has a limit."""
    points: Points = defaultdict(list)
    repeated = any(step["stage"] == "allocate-again" for step in steps)  # the last allocation is the one that counts
    for step in (step for step in steps if step["stage"] == ("allocate-again" if repeated else "allocate")):
        if "spent" in step:
            points["the limit that binds"].append((step["step"], step["spent"]))
        for key, limit in step.items():
            kind = key.removeprefix("limit.")
            if key.startswith("limit.") and limit and f"cost.{kind}" in step:
                points[kind].append((step["step"], step[f"cost.{kind}"] / limit))
    return lines(coloured_lines(points), "step", "share of the limit that is used", limit=1.0, base=0.0)


def loss_charts(steps: Sequence[Report]) -> list[tuple[str, str]]:
    """(stage, chart) of every stage that had a loss in several steps."""
    points: Points = defaultdict(list)
    for step in (step for step in steps if "loss" in step):
        points[step["stage"]].append((step["step"], step["loss"]))
    return [(stage, lines([Line(stage, p)], "step", "loss")) for stage, p in points.items() if len(p) > 2]


def _fits_a_chart(value: object) -> bool:
    """Whether the value is a number that a chart can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100
