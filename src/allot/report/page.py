"""report.html: one run, or several side by side, as one file that needs nothing else and no network."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from allot.amounts import unit
from allot.errors import UsageError
from allot.report.charts import Line, Mark, histogram, legend, lines, marks
from allot.report.table import short, speed
from allot.store import write

Report = Mapping[str, Any]


def write_run(run: Path, report: Report, page: Path | None = None) -> Path:
    """Write RUN/report.html, or `page`, from report.json and what lies beside it; where it is."""
    page = page or run / "report.html"
    write(page, run_page(report, _read_json(run / "certificate.json"), _text(run / "recipe.yaml"), _steps(run)))
    return page


def run_page(report: Report, certificate: Report, recipe: str, steps: Sequence[Report]) -> str:
    """One run: promise, certificate, before and after, every layer and why, how it came to this, how to repeat it."""
    layers = _layers(report)
    ranked = sorted(layers, key=lambda layer: (layer["density"], layer["name"]))
    return _template("run.html").render(
        report=report,
        lead=_lead(report),
        fast=speed(report),
        certificate=certificate,
        recipe=recipe,
        layers=layers,
        most=ranked[-1] if ranked else None,
        least=ranked[0] if ranked else None,
        budget=[_budget_row(row, report) for row in report["budget"]],
        moved=_moved(report),
        spent=_spent(steps),
        losses=_losses(steps),
        exports=report.get("exports", []),
    )


def advice_page(told: Report) -> str:
    """What pays on this machine, with the curves that say so."""
    channels = Line("channels", [(100 * row["macs"], row["faster"]) for row in told["channels"]])
    net = Line("net", [(float(d), times) for d, times in (told["net"] or {"faster": {}})["faster"].items()])
    last = max(len(told["linear"]) - 1, 1)
    layers = [
        Line(row["layer"], [(float(d), faster) for d, faster in row["faster"].items()], i / last)
        for i, row in enumerate(told["linear"])
    ]
    drawn = [
        (f"Channels ({told['pattern']}, {told['runtime']}), foretold for equal shares", [channels], "MACs left, %"),
        ("Sparse matrices, PyTorch, foretold for the whole net", [net], "density"),
        ("Linear layers as sparse matrices, PyTorch, measured", layers, "density"),
    ]
    charts = [
        (title, lines(some, x, "times as fast", limit=1.0), legend(some) if len(some) > 1 else "")
        for title, some, x in drawn
        if some and len(some[0].points) > 1 and any(times != 1 for line in some for _, times in line.points)
    ]
    return _template("advice.html").render(told=told, charts=charts)


def comparison_page(reports: Sequence[tuple[str, Report]]) -> str:
    """Several runs: one table, and score against sparsity, MACs and bytes, mean and spread over seeds."""
    rows, series = [], list(dict.fromkeys(_series(report) for _, report in reports))
    for label, report in reports:
        rows.append({"label": label, "report": report, "series": series.index(_series(report)) % 8, **speed(report)})
    charts, dense = [], _dense(reports)
    for title, of in _AXES.items():
        found = _marks(reports, series, of)
        if len({mark.x for mark in found}) > 1 or len(found) > 1:
            charts.append((title, marks(found, title, _metric(reports), level=dense)))
    means = _marks(reports, series, lambda report: report["sparsity"])
    return _template("comparison.html").render(rows=rows, series=series, charts=charts, dense=dense, means=means)


_AXES = {
    "weights removed, %": lambda report: 100 * report["sparsity"],
    "MACs left, %": lambda report: (
        100 * report["macs"]["sparse"] / report["macs"]["dense"] if report["macs"] and report["macs"]["dense"] else None
    ),
    "bytes on disk, kB": lambda report: report["bytes"]["file"] / 1000 if report["bytes"]["file"] else None,
}


def _series(report: Report) -> str:
    return f"{report['model']}: {' + '.join((report['method'], *report['repair']))} ({report['pattern']})"


def _metric(reports: Sequence[tuple[str, Report]]) -> str:
    return next((report["scores"]["metric"] for _, report in reports if report["scores"]), "score")


def _dense(reports: Sequence[tuple[str, Report]]) -> float | None:
    """What the dense net scores, where that is one number."""
    scores = {report["scores"]["dense"] for _, report in reports if report["scores"]}
    return scores.pop() if len(scores) == 1 else None


def _marks(reports: Sequence[tuple[str, Report]], series: Sequence[str], of: Any) -> list[Mark]:
    """One point for all seeds of a method at a budget."""
    same: dict[tuple[str, str], list[Report]] = {}
    for _, report in reports:
        if report["scores"] and of(report) is not None:
            asked = ", ".join(f"{row['kind']}={row['asked']}" for row in report["budget"])
            same.setdefault((_series(report), asked), []).append(report)
    found = []
    for (name, asked), some in same.items():
        scores = [report["scores"]["sparse"] for report in some]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        where, mean = statistics.mean(of(report) for report in some), statistics.mean(scores)
        told = f"{name}, {asked}: {mean:.4f}" + (f" ± {spread:.4f}, {len(some)} seeds" if spread else "")
        found.append(Mark(told, where, mean, spread, series.index(name)))
    return found


def _lead(report: Report) -> str:
    """What a run came to, in a sentence for those who read no further."""
    size, scores, fast = report["bytes"], report["scores"], speed(report)
    said = [f"{_percent(report['kept'] / report['total'])} of the weights are left"]
    if size["file"] and size["dense"]:
        said.append(f"the file takes {_percent(size['file'] / size['dense'])} of the dense one's bytes")
    if scores:
        before, after = (_percent(scores[key]) for key in ("dense", "sparse"))
        said.append(f"{scores['metric']} went from {before} to {after} on the test data")
    else:
        said.append("it was not scored")
    if fast["times"] is None:
        said.append("and it was not timed: a smaller file is no faster by itself")
    else:
        said.append(f"and it was measured to be {fast['verdict']} here: {fast['times']:.2f}x ({fast['where']})")
    return ", ".join(said) + "."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _layers(report: Report) -> list[dict[str, Any]]:
    """Layers, or groups of channels, with what is known of why they keep what they keep."""
    told = report["diagnostics"].get(report["allocate"], {})
    gain = told.get("gain", {}) if isinstance(told, Mapping) else {}
    found = []
    for row in report["groups"] or report["layers"]:
        bins = report["histograms"].get(row["name"]) or report["histograms"].get(row["name"] + ".weight")
        drawn = histogram(bins["edges"], bins["dense"], bins["sparse"], f"weight of {row['name']}") if bins else ""
        found.append({**row, "gain": gain.get(row["name"]), "histogram": drawn})
    return found


def _budget_row(row: Report, report: Report) -> dict[str, Any]:
    achieved, limit, units = row["achieved"], row["limit"], unit(row["kind"])
    if row["kind"] == "sparsity":
        return {**row, "text": f"{report['kept']:,} of {report['total']:,} weights kept"}
    if row["kind"] == "latency":
        return {**row, "text": f"{achieved / 1e6:.3f} of {limit / 1e6:.3f} ms allowed, by the tables"}
    return {**row, "text": f"{achieved:,} of {limit:,} {units} allowed"}


def _moved(report: Report) -> str:
    """How densities moved while they were learned; empty where nothing did."""
    told = report["diagnostics"].get(report["allocate"], {})
    total = {row["name"]: row["total"] for row in report["layers"]}
    paths: dict[str, list[tuple[float, float]]] = {}
    for entry in told.get("trajectory", []):
        for name, kept in entry["kept"].items():
            paths.setdefault(name, []).append((entry["step"], kept / total[name]))
    for step, densities in told.get("densities", []):
        for name, density in zip(told["groups"], densities, strict=True):
            paths.setdefault(name, []).append((step, density))
    last = max(len(paths) - 1, 1)
    return lines([Line(name, points, i / last) for i, (name, points) in enumerate(paths.items())], "step", "density")


def _spent(steps: Sequence[Report]) -> str:
    """What is used of every limit while densities are learned, as a share of it."""
    paths: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        if step.get("stage") != "allocate":
            continue
        if "spent" in step:
            paths.setdefault("the limit that binds", []).append((step["step"], step["spent"]))
        for key, limit in step.items():
            kind = key.removeprefix("limit.")
            if key.startswith("limit.") and limit and f"cost.{kind}" in step:
                paths.setdefault(kind, []).append((step["step"], step[f"cost.{kind}"] / limit))
    last = max(len(paths) - 1, 1)
    some = [Line(name, points, i / last) for i, (name, points) in enumerate(paths.items())]
    return lines(some, "step", "used of the limit", limit=1.0) if some else ""


def _losses(steps: Sequence[Report]) -> list[tuple[str, str]]:
    """(stage, chart) of every stage that had a loss in several steps."""
    paths: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        if isinstance(step.get("loss"), int | float):
            paths.setdefault(step["stage"], []).append((step["step"], step["loss"]))
    return [(stage, lines([Line(stage, p)], "step", "loss")) for stage, p in paths.items() if len(p) > 2]


def _steps(run: Path) -> list[dict[str, Any]]:
    """Lines of steps.jsonl; a line that was cut short is left out."""
    found = []
    for line in _text(run / "steps.jsonl").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


@cache  # compiling takes longer than all of a small run
def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    known = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    known.filters["count"] = lambda value: f"{value:,}"
    known.filters["percent"] = _percent
    known.filters["short"] = short
    known.filters["folding"] = lambda name: Markup(".<wbr>").join(escape(part) for part in str(name).split("."))
    return known.get_template(name)
