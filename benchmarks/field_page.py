"""Tables of `benchmarks.field`: a row for each budget and method that was measured or failed; the others are named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allot.errors import UsageError
from allot.run.outputs import NAMES
from benchmarks.runs import Found, cell, fill

PAGE = Path("docs/field-results.md")
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What the tables show of one net.

    Attributes:
        metrics: name -> meaning, in the order of the table; the first one decides.
        cells: key -> what was asked.
        found: key -> what was measured.
        failed: key -> why it failed.
    """

    net: str
    metrics: Mapping[str, str]
    cells: Mapping[str, Run]
    found: Found
    failed: Mapping[str, str]

    @property
    def missing(self) -> dict[str, list[str]]:
        """Budget -> methods whose cells were not measured, or failed; with their seeds where others were measured."""
        missing: dict[str, list[str]] = {}
        for (budget, method), keys in self.rows.items():
            seeds = [str(self.cells[key]["seed"]) for key in keys if key not in self.found]
            if seeds:
                some = f" (seeds {' '.join(seeds)})" if len(seeds) < len(keys) else ""
                missing.setdefault(budget, []).append(method + some)
        return missing

    @property
    def dense(self) -> list[str]:
        """The dense net's metrics, as text."""
        (key,) = (key for key, asked in self.cells.items() if asked["method"] == "dense")
        return self.scores([key])

    def scores(self, keys: Sequence[str]) -> list[str]:
        """The metrics of the cells, as text; the first one says why there are none."""
        runs = [self.found[key] for key in keys if key in self.found]
        if runs:
            return [number([run[name] for run in runs]) for name in self.metrics]
        state = "failed" if any(key in self.failed for key in keys) else "not run"
        return [state, *[""] * (len(self.metrics) - 1)]

    @property
    def rows(self) -> dict[tuple[str, str], list[str]]:
        """(budget, method) -> keys, one a seed; budget by budget."""
        rows: dict[tuple[str, str], list[str]] = {}
        for key, asked in self.cells.items():
            if asked["method"] != "dense":
                rows.setdefault((asked["budget"], asked["method"]), []).append(key)
        return rows

    @property
    def tried(self) -> dict[tuple[str, str], list[str]]:
        """Those of `rows` with a cell that was measured or failed."""
        return {row: keys for row, keys in self.rows.items() if any(k in self.found or k in self.failed for k in keys)}

    @property
    def not_run(self) -> dict[str, list[str]]:
        """Budget -> methods of the other rows."""
        left: dict[str, list[str]] = {}
        for budget, method in self.rows:
            if (budget, method) not in self.tried:
                left.setdefault(budget, []).append(method)
        return left


def write(page: Path, parts: Sequence[Part]) -> None:
    """Puts the tables into the marked block of a page.

    Raises:
        UsageError: the page has no such block.
    """
    if not page.exists() or "<!-- field -->\n" not in page.read_text():
        raise UsageError(f"{page}: there is no line <!-- field --> to write tables below.")
    sections = [line for part in parts for line in ("", f"## {part.net}", "", *section(part))]
    fill(page, "field", ["", *overview(parts), "", *against_controls(parts), *sections])


def overview(parts: Sequence[Part]) -> list[str]:
    """The first metric of each net, dense and after each method that prunes single weights; means over seeds."""
    tried = [(part, *row) for part in parts for row in part.tried if row[0].startswith("sparsity")]
    methods = [m for m in dict.fromkeys(m for part in parts for _, m in part.rows) if m in {row[2] for row in tried}]
    lines = [f"| net: metric | budget | dense | {' | '.join(methods)} |", "|---|---|" + "--:|" * (len(methods) + 1)]
    for net, budget in dict.fromkeys((part.net, budget) for part, budget, _ in tried):
        part = next(part for part in parts if part.net == net)
        means = [part.scores(part.rows.get((budget, method), []))[0].partition(" ±")[0] for method in methods]
        values = [f"{net}: {next(iter(part.metrics))}", budget, part.dense[0], *means]
        lines.append(f"| {' | '.join(values)} |")
    return lines


def against_controls(parts: Sequence[Part]) -> list[str]:
    """In how many nets and budgets a recipe is ahead of its control by the first metric, of which more is better.

    Means that are closer than the larger of their deviations are equal.
    """
    counts: dict[str, list[int]] = {}  # recipe -> ahead, equal, behind, not measured
    for part in parts:
        first, rows = next(iter(part.metrics)), part.rows
        for budget, recipe in rows:
            if (control := (budget, f"uniform+{recipe}")) not in rows:
                continue
            count = counts.setdefault(recipe, [0, 0, 0, 0])
            keys = rows[budget, recipe], rows[control]
            values = [[part.found[key][first] for key in some if key in part.found] for some in keys]
            if not all(values):
                count[3] += 1
                continue
            means, spread = [statistics.mean(some) for some in values], max(map(_deviation, values))
            count[1 if abs(means[0] - means[1]) <= spread else 0 if means[0] > means[1] else 2] += 1
    lines = ["| recipe | ahead of uniform+recipe | equal within the spread | behind | not measured |"]
    lines.append("|---|--:|--:|--:|--:|")
    return lines + [f"| {recipe} | {' | '.join(map(str, count))} |" for recipe, count in counts.items()]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def section(part: Part) -> list[str]:
    """The metrics of a net and their table: mean ± standard deviation over the seeds that were measured."""
    heading = ["budget", "method", *part.metrics, "watched: distance", "watched: agreement, %", "CPU-s"]
    lines = ["; ".join(f"*{name}*: {meaning}" for name, meaning in part.metrics.items()) + ".", ""]
    lines.append(f"| {' | '.join([*heading, 'inputs forward / backward', 'seeds'])} |")
    lines.append("|---|---|" + "--:|" * (len(part.metrics) + 5))
    lines.append(f"| | dense | {' | '.join(part.dense)} |" + " |" * 5)
    for (budget, method), keys in part.tried.items():
        runs = [part.found[key] for key in keys if key in part.found]
        failed = sum(key in part.failed for key in keys)
        count = f"{len(runs)} of {len(keys)}" + (f", {failed} failed" if failed else "")
        lines.append(f"| {' | '.join([budget, method, *part.scores(keys), *watched(runs), *cost(runs), count])} |")
    if left := [f"{budget}: {', '.join(methods)}" for budget, methods in part.not_run.items()]:
        lines += ["", f"Not run: {'; '.join(left)}."]
    reasons = [f"- {key}: {reason}" for key, reason in part.failed.items()]
    return [*lines, *(["", "Failed:", "", *reasons] if reasons else []), ""]


def watched(runs: Sequence[Run]) -> list[str]:
    """(distance, agreement) of the end of the runs, on the inputs that they watched; empty of a control."""
    ends = [run.get("fidelity") or {} for run in runs]
    kind = next((kind for kind in NAMES if ends and all(kind in end for end in ends)), None)
    distance = f"{NAMES[kind]} {number([end[kind] for end in ends])}" if kind else ""
    agreement = [end.get("agreement") for end in ends]
    return [distance, number([100 * value for value in agreement if value is not None])]


def cost(runs: Sequence[Run]) -> list[str]:
    """(CPU-seconds, inputs forward and backward)."""
    if not runs:
        return ["", ""]
    images = [[run["images"][i] for run in runs if "images" in run] for i in (0, 1)]
    shown = " / ".join(f"{round(statistics.mean(counts)):,}" for counts in images if counts)
    return [cell([run["cpu"] for run in runs], digits=0), shown]


def number(values: Sequence[float | None]) -> str:
    """Mean and spread with three digits that count, percents with one after the point.

    >>> number([98.64, 99.0]), number([0.01234]), number([]), number([1.0, None])
    ('98.8 ± 0.3', '0.0123', '', 'not finite')
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < len(values):
        return "not finite"
    if not finite:
        return ""
    largest = max(map(abs, finite))
    return cell(finite, digits=min(6, max(1, 2 - math.floor(math.log10(largest)))) if largest else 3)
