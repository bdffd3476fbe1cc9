"""report.html: one run, or several side by side, as one file that needs nothing else and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from allot.budget.units import unit
from allot.errors import UsageError
from allot.export.certificate.rows import checked, sealed
from allot.report.charts import Line, Mark, legend, lines, marks
from allot.report.explanation import explanation, kept_rows, layer_rows, number
from allot.report.seed_groups import (
    Labelled,
    SeedGroup,
    budget_of,
    macs_left,
    reading_report,
    seed_groups,
    without_copies,
)
from allot.report.table import check_text, speed
from allot.report.trajectories import budget_chart, density_chart, loss_charts, read_steps
from allot.run.store import write

Report = Mapping[str, Any]

FELL = 0.9  # of the dense score, below which a score is called bad


def write_run(run: Path, report: Report, page: Path | None = None) -> Path:
    """Write RUN/report.html, or `page`, from report.json and what lies beside it; where it is.

    Raises:
        UsageError: one of these files does not hold what a report needs, or the page cannot be written.
    """
    page = page or run / "report.html"
    certificate, recipe, steps = _certificate(run), _text(run / "recipe.yaml"), read_steps(run)
    with reading_report(run):
        text = run_page(report, certificate, recipe, steps)
    write(page, text)
    return page


def run_page(report: Report, certificate: Report, recipe: str, steps: Sequence[Report]) -> str:
    """One run: promise, certificate, before and after, every layer and why, how it came to this, how to repeat it."""
    rows = kept_rows(report)
    ranked = sorted(rows, key=lambda row: (row["density"], row["name"]))
    return _template("run.html").render(
        report=report,
        lead=_lead(report),
        fell=_fell(report["scores"]),
        fast=speed(report),
        checks=certificate.get("rows", []),
        passed=bool(certificate.get("passed")) and all(row["passed"] for row in certificate.get("rows", [])),
        recipe=recipe,
        rows=rows,
        explanation=explanation(report),
        layers=layer_rows(report),
        most=ranked[-1] if ranked else None,
        least=ranked[0] if ranked else None,
        budget=[_budget_row(row, report) for row in report["budget"]],
        density_chart=density_chart(report),
        budget_chart=budget_chart(steps),
        loss_charts=loss_charts(steps),
        exports=report.get("exports", []),
        memory=report["diagnostics"].get("memory", {}),
        fit=report["diagnostics"].get("fit", {}),
        compute=[_COMPUTE[name].format(value) for name, value in report.get("compute", {}).items() if name in _COMPUTE],
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
        (title, lines(some, x, "times as fast", limit=1.0, ends=False), legend(some) if len(some) > 1 else "")
        for title, some, x in drawn
        if some and len(some[0].points) > 1 and any(times != 1 for line in some for _, times in line.points)
    ]
    return _template("advice.html").render(told=told, charts=charts)


def comparison_page(reports: Labelled, failed: Sequence[Report] = ()) -> str:
    """Several runs: what each method came to at each budget, score against size, and every run.

    Args:
        reports: (label, report) each; one that is given twice counts once.
        failed: `{method, budget, seed, error}` of runs that came to nothing.
    Raises:
        UsageError: a report that does not hold what it needs.
    """
    reports = without_copies(reports)
    groups = seed_groups(reports)
    rows = []
    for label, report in reports:
        with reading_report(label):
            rows.append(_row(label, report, groups))
            _summary(SeedGroup(label, 0, "", (report,)))  # what this one lacks is said of this one
    with reading_report(", ".join(label for label, _ in reports)):
        return _template("comparison.html").render(
            rows=rows,
            summaries=[_summary(group) for group in groups],
            series=list(dict.fromkeys(group.name for group in groups)),
            charts=[chart for metric in _metrics(groups) for chart in _charts(metric, groups)],
            dense={metric: level for metric in _metrics(groups) if (level := _dense(metric, groups)) is not None},
            best=_best(groups),
            scored=bool(_metrics(groups)),
            failed=_failed(failed),
        )


_AXES = {
    "weights removed, %": lambda report: 100 * report["sparsity"],
    "MACs left, %": lambda report: None if (share := macs_left(report)) is None else 100 * share,
    "file size, kB": lambda report: report["bytes"]["file"] / 1000 if report["bytes"]["file"] else None,
}


def _metrics(groups: Sequence[SeedGroup]) -> list[str]:
    return list(dict.fromkeys(group.metric for group in groups if group.metric is not None))


def _dense(metric: str, groups: Sequence[SeedGroup]) -> float | None:
    """What the dense net scores, where that is one number."""
    scores = {run["scores"]["dense"] for group in groups if group.metric == metric for run in group.runs}
    return scores.pop() if len(scores) == 1 else None


def _charts(metric: str, groups: Sequence[SeedGroup]) -> list[tuple[str, str]]:
    """(caption, chart) for each axis: a point for all seeds of a series at a budget."""
    scored, dense, found = [g for g in groups if g.metric == metric and g.scores], _dense(metric, groups), []
    for axis, of in _AXES.items():
        points = [
            Mark(group.caption, x, group.score, group.spread or 0.0, group.series)
            for group in scored
            if (x := group.mean(of)) is not None and group.score is not None
        ]
        if len(points) > 1:
            bars = "; mean over seeds, bars: one standard deviation" if any(len(g.scores) > 1 for g in scored) else ""
            level = "" if dense is None else "; dashed: the dense model"
            caption = f"Score ({metric}) on held-out data against {axis.partition(',')[0]}{bars}{level}."
            found.append((caption, marks(points, axis, metric, level=dense)))
    return found


def _summary(group: SeedGroup) -> dict[str, Any]:
    first = group.runs[0]
    dense = first["scores"]["dense"] if first["scores"] else None
    size, full = group.mean(lambda run: run["bytes"]["file"]), group.mean(lambda run: run["bytes"]["dense"])
    return {
        "name": group.name,
        "series": group.series % 8,
        "budget": group.budget,
        "score": group.score,
        "spread": group.spread,
        "seeds": len(group.scores),
        "scored": group.metric is not None,
        "fell": group.score is not None and dense is not None and group.score < FELL * dense,
        "removed": group.mean(lambda run: run["sparsity"]),
        "bytes": size,
        "share": size / full if size and full else None,
        "macs": group.mean(macs_left),
        "speedup": group.speedup,
        "verdict": group.verdict,
        "densest": group.densest,
    }


def _best(groups: Sequence[SeedGroup]) -> str:
    """Which is best in score, in size and in speed, in a sentence."""
    scored = [group for group in groups if group.score is not None]
    said = []
    if len({(group.metric, group.runs[0]["scores"]["dense"]) for group in scored}) == 1:  # one model, one test
        best = max(scored, key=lambda group: group.score or 0.0)
        said.append(f"the highest score is that of {best.name} at {best.budget} ({_percent(best.score or 0.0)})")
    sizes = [(size, group) for group in groups if (size := group.mean(lambda run: run["bytes"]["file"]))]
    if sizes:
        size, least = min(sizes, key=lambda pair: pair[0])
        said.append(f"the smallest file that of {least.name} at {least.budget} ({round(size):,} bytes)")
    faster = [group for group in groups if group.verdict == "faster"]
    if faster:
        fast, quick = max(((group.speedup or 0.0, group) for group in faster), key=lambda pair: pair[0])
        said.append(f"the fastest as measured is {quick.name} at {quick.budget} ({fast:.2f}x as fast as dense)")
    elif any(group.verdict for group in groups):
        said.append("as measured here, none is faster than the dense model")
    else:
        said.append("none was timed: a smaller file is no faster by itself")
    text = "; ".join(said) + "."
    return text[0].upper() + text[1:]


def _failed(rows: Sequence[Report]) -> list[dict[str, Any]]:
    """What failed in the same way with several seeds, as one."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        found.setdefault((row["method"], row["budget"], row["error"]), []).append(row["seed"])
    return [{"method": m, "budget": b, "error": e, "seeds": seeds} for (m, b, e), seeds in found.items()]


def _row(label: str, report: Report, groups: Sequence[SeedGroup]) -> dict[str, Any]:
    own = next(group for group in groups if any(report is run for run in group.runs))
    told = {"label": label, "report": report, "series": own.series % 8, "budget": budget_of(report)}
    return {**told, "macs": macs_left(report), "fell": _fell(report["scores"]), **speed(report)}


def _fell(scores: Report | None) -> bool:
    """Whether a score is so far below the dense one that nobody should overlook it."""
    return scores is not None and not scores["sparse"] >= FELL * scores["dense"]


def _lead(report: Report) -> Markup:
    """What a run came to, in a sentence for those who read no further."""
    size, scores, fast = report["bytes"], report["scores"], speed(report)
    said: list[str] = [f"{_percent(report['kept'] / report['total'])} of the weights are left"]
    if size["file"] and size["dense"]:
        said.append(f"the file takes {_percent(size['file'] / size['dense'])} of the dense one's bytes")
    if scores:
        before, after = (_percent(scores[key]) for key in ("dense", "sparse"))
        went = f"{scores['metric']} went from {before} to {after} on the test data"
        far = Markup('<span class="bad">{}, far below the dense model: look before you use it</span>')
        said.append(far.format(went) if _fell(scores) else went)
    else:
        said.append("it was not scored")
    if fast["speedup"] is None:
        said.append("and it was not timed: a smaller file is no faster by itself")
    else:
        said.append(f"and it was measured to be {fast['verdict']} here: {fast['speedup']:.2f}x ({fast['form']})")
    return Markup(", ").join(said) + "."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _budget_row(row: Report, report: Report) -> dict[str, Any]:
    achieved, limit, units = row["achieved"], row["limit"], unit(row["kind"])
    if row["kind"] == "sparsity":
        return {**row, "text": f"{report['kept']:,} of {report['total']:,} weights kept"}
    if row["kind"] == "latency":
        return {**row, "text": f"{achieved / 1e6:.3f} of {limit / 1e6:.3f} ms allowed, by the tables"}
    return {**row, "text": f"{achieved:,} of {limit:,} {units} allowed"}


_COMPUTE = {
    "micro_batch": "activations of {} samples at a time (micro_batch)",
    "amp": "training in {} (amp)",
    "channels_last": "images laid out with channels last (channels_last)",
    "compile": "the model compiled (compile)",
    "checkpoint": "activations computed again instead of kept (checkpoint)",
    "cached": "at most {:,} bytes of the dense model's outputs kept (cached)",
}


def _certificate(run: Path) -> dict[str, Any]:
    """`{rows, passed}`: the checks of certificate.json, and the one of its own text, as `allot verify` makes it.

    Raises:
        UsageError: it cannot be read.
    """
    path = run / "certificate.json"
    try:
        text = path.read_text()
        content = json.loads(text)
        whole = text == json.dumps(sealed(content), indent=2) + "\n"
        keys = ("file", "check", "promised", "found", "passed")
        rows = [{key: row[key] for key in keys} for row in content["rows"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    rows.insert(0, checked(path.name, "untouched", "yes", "yes" if whole else "no"))
    return {"rows": rows, "passed": all(row["passed"] for row in rows)}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@cache  # compiling takes longer than all of a small run
def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    known = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    known.filters["count"] = lambda value: f"{value:,}"
    known.filters["number"] = number
    known.filters["percent"] = _percent
    known.filters["check_text"] = check_text
    known.filters["folding"] = lambda name: Markup(".<wbr>").join(escape(part) for part in str(name).split("."))
    return known.get_template(name)
