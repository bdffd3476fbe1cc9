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
from allot.budget.unused import MUCH, unused
from allot.errors import UsageError
from allot.export.certificate.records import rewrite
from allot.export.certificate.rows import seal_row
from allot.export.files.formats import CERTIFICATE, PAGE, RECIPE
from allot.export.timing.clock import AS_DENSE
from allot.report.charts import Line, Mark, coloured_lines, legend, lines, marks
from allot.report.explanation import explanation, kept_rows, number
from allot.report.fidelity import compared_as, fidelity, measurements, warnings
from allot.report.scores import change_text, is_far_off, is_share, lower_is_better, score_text
from allot.report.seed_groups import (
    Labelled,
    SeedGroup,
    budget_of,
    macs_left,
    reading_report,
    seed_groups,
    without_copies,
)
from allot.report.table import check_text, macs_kept, speed
from allot.report.trajectories import budget_chart, density_chart, loss_charts, read_steps
from allot.run.store import write

Report = Mapping[str, Any]


def write_run(run: Path, report: Report, page: Path | None = None) -> Path:
    """Write RUN/report.html, or `page`, from report.json and the files beside it; returns the path of the page.

    Raises:
        UsageError: one of these files does not hold what a report needs, or the page cannot be written.
    """
    text = page_of(run, report)
    if page is None or page.resolve() == (run / PAGE).resolve():
        rewrite(run, {PAGE: text})
    else:
        write(page, text)
    return page or run / PAGE


def page_of(run: Path, report: Report) -> str:
    """The page of a run, from report.json and the files beside it.

    Raises:
        UsageError: one of these files does not hold what a report needs.
    """
    recipe, certificate, steps = run / RECIPE, _certificate(run), read_steps(run)
    with reading_report(run):
        return run_page(report, certificate, recipe.read_text(errors="replace") if recipe.exists() else "", steps)


def run_page(report: Report, certificate: Report, recipe: str, steps: Sequence[Report]) -> str:
    """One run: budget, certificate, dense and sparse figures, every layer, every step, and how to repeat the run."""
    rows = kept_rows(report)
    ranked = sorted(rows, key=lambda row: (row["density"], row["name"]))
    return _template("run.html").render(
        report=report,
        lead=_lead_sentence(report),
        bad_score=is_far_off(report["scores"]),
        speed=speed(report),
        checks=certificate.get("rows", []),
        passed=certificate.get("passed", False),
        recipe=recipe,
        rows=rows,
        explanation=explanation(report),
        most=ranked[-1] if ranked else None,
        least=ranked[0] if ranked else None,
        budget=[{**row, "text": _budget_text(row, report)} for row in report["budget"]],
        density_chart=density_chart(report),
        budget_chart=budget_chart(steps),
        loss_charts=loss_charts(steps),
        exports=report.get("exports", []),
        close=fidelity(report),
        measurements=measurements(report),
        compared_as=compared_as(report),
        warnings=warnings(report),
        memory=report["diagnostics"].get("memory", {}),
        fit=report["diagnostics"].get("fit", {}),
        compute=[_COMPUTE[name].format(value) for name, value in report.get("compute", {}).items() if name in _COMPUTE],
    )


def advice_page(advice: Report) -> str:
    """What pays on this machine, with the measured and predicted curves."""
    channels = Line("channels", [(100 * row["macs"], row["faster"]) for row in advice["channels"]])
    net = Line("net", [(float(d), speedup) for d, speedup in (advice["net"] or {"faster": {}})["faster"].items()])
    layers = {row["layer"]: [(float(d), speedup) for d, speedup in row["faster"].items()] for row in advice["linear"]}
    title = f"Channels ({advice['pattern']}, {advice['runtime']}), predicted for the same density in every layer"
    curves = [
        (title, [channels], "MACs left, %"),
        ("Sparse matrices, PyTorch, predicted for the whole net", [net], "density"),
        ("Linear layers as sparse matrices, PyTorch, measured", coloured_lines(layers), "density"),
    ]
    charts = [
        (title, lines(drawn, x, "times as fast", limit=1.0, ends=False), legend(drawn) if len(drawn) > 1 else "")
        for title, drawn, x in curves
        if drawn and len(drawn[0].points) > 1 and any(speedup != 1 for line in drawn for _, speedup in line.points)
    ]
    return _template("advice.html").render(advice=advice, charts=charts)


def comparison_page(reports: Labelled, failed: Sequence[Report] = ()) -> str:
    """Several runs: the figures of each method at each budget, score against size, and every run.

    Args:
        reports: (label, report) each; a report that is given twice counts once.
        failed: `{method, budget, seed, error}` of runs that failed.
    Raises:
        UsageError: a report that does not hold what the page needs.
    """
    reports = without_copies(reports)
    groups = seed_groups(reports)
    rows = []
    for label, report in reports:
        with reading_report(label):
            rows.append(_run_row(label, report, groups))
            _group_row(SeedGroup(label, 0, "", (report,)))  # an error about this report names this report
    metrics = list(dict.fromkeys(group.metric for group in groups if group.metric is not None))
    with reading_report(", ".join(label for label, _ in reports)):
        return _template("comparison.html").render(
            rows=rows,
            summaries=[_group_row(group) for group in groups],
            series=list(dict.fromkeys(group.name for group in groups)),
            charts=[chart for metric in metrics for chart in _score_charts(metric, groups)],
            dense={metric: text for metric in metrics if (text := _dense_text(metric, groups))},
            best=_best_sentence(groups),
            scored=bool(metrics),
            failed=_failure_rows(failed),
        )


_AXES = {
    "weights removed, %": lambda report: 100 * report["sparsity"],
    "MACs left, %": lambda report: None if (share := macs_left(report)) is None else 100 * share,
    "file size, kB": lambda report: report["bytes"]["file"] / 1000 if report["bytes"]["file"] else None,
}


def _dense_score(metric: str, groups: Sequence[SeedGroup]) -> float | None:
    """The score of the dense model; None where the runs differ in it."""
    scores = {run["scores"]["dense"] for group in groups if group.metric == metric for run in group.runs}
    return scores.pop() if len(scores) == 1 else None


def _dense_text(metric: str, groups: Sequence[SeedGroup]) -> str:
    """The score of the dense model in words; empty where the runs differ in it."""
    dense, scores = _dense_score(metric, groups), next(g.runs[0]["scores"] for g in groups if g.metric == metric)
    return "" if dense is None else score_text(dense, scores)


def _score_charts(metric: str, groups: Sequence[SeedGroup]) -> list[tuple[str, str]]:
    """(caption, chart) for each axis: a point for all seeds of a series at a budget."""
    scored, dense, charts = [g for g in groups if g.metric == metric and g.scores], _dense_score(metric, groups), []
    for axis, figure in _AXES.items():
        points = [
            Mark(group.caption, x, group.score, group.spread or 0.0, group.series)
            for group in scored
            if (x := group.mean(figure)) is not None and group.score is not None
        ]
        if len(points) > 1:
            bars = "; mean over seeds, bars: one standard deviation" if any(len(g.scores) > 1 for g in scored) else ""
            level = "" if dense is None else "; dashed: the dense model"
            caption = f"Score ({metric}) on held-out data against {axis.partition(',')[0]}{bars}{level}."
            charts.append((caption, marks(points, axis, metric, level=dense)))
    return charts


def _group_row(group: SeedGroup) -> dict[str, Any]:
    size, dense_size = group.mean(lambda run: run["bytes"]["file"]), group.mean(lambda run: run["bytes"]["dense"])
    scores = {**group.runs[0]["scores"], "sparse": group.score} if group.score is not None else None
    return {
        **{
            name: getattr(group, name)
            for name in ("name", "budget", "score", "spread", "speedup", "verdict", "densest")
        },
        "series": group.series % 8,
        "seeds": len(group.scores),
        "scored": group.metric is not None,
        "bad_score": is_far_off(scores),
        "score_text": _mean_text(group),
        "removed": group.mean(lambda run: run["sparsity"]),
        "bytes": size,
        "share": size / dense_size if size and dense_size else None,
        "macs": group.mean(macs_left),
    }


def _mean_text(group: SeedGroup) -> str:
    """Mean and standard deviation of the scores in words; empty without a score."""
    if group.score is None:
        return ""
    scores, spread = group.runs[0]["scores"], ""
    if group.spread is not None:
        spread = f" ± {100 * group.spread:.2f}" if is_share(scores) else f" ± {group.spread:.2g}"
    return score_text(group.score, scores) + spread


def _best_sentence(groups: Sequence[SeedGroup]) -> str:
    """The best score, the smallest file and the highest speed, in a sentence."""
    scored = [group for group in groups if group.score is not None]
    clauses = []
    if len({(group.metric, group.runs[0]["scores"]["dense"]) for group in scored}) == 1:  # one model, one test
        scores = scored[0].runs[0]["scores"]
        sign, which = (-1, "lowest") if lower_is_better(scores) else (1, "highest")
        best = max(scored, key=lambda group: sign * (group.score or 0.0))
        text = score_text(best.score or 0.0, scores)
        clauses.append(f"the {which} score is that of {best.name} at {best.budget} ({text})")
    sizes = [(size, group) for group in groups if (size := group.mean(lambda run: run["bytes"]["file"]))]
    if sizes:
        size, least = min(sizes, key=lambda pair: pair[0])
        clauses.append(f"the smallest file is that of {least.name} at {least.budget} ({round(size):,} bytes)")
    faster = [group for group in groups if group.verdict == "faster"]
    if faster:
        fast = max(faster, key=lambda group: group.speedup or 0.0)
        clauses.append(
            f"the fastest as measured is {fast.name} at {fast.budget} ({fast.speedup:.2f}x as fast as dense)"
        )
    elif any(group.verdict not in (None, AS_DENSE) for group in groups):
        clauses.append("as measured here, none is faster than the dense model")
    elif any(group.verdict for group in groups):
        clauses.append(f"what was exported {AS_DENSE}: a smaller file is no faster by itself")
    else:
        clauses.append("none was timed: a smaller file is no faster by itself")
    sentence = "; ".join(clauses) + "."
    return sentence[0].upper() + sentence[1:]


def _failure_rows(failed: Sequence[Report]) -> list[dict[str, Any]]:
    """Runs that failed in the same way with several seeds, as one row."""
    seeds: dict[tuple[str, ...], list[Any]] = {}
    for row in failed:
        seeds.setdefault((row["method"], row["budget"], row["error"]), []).append(row["seed"])
    return [{"method": m, "budget": b, "error": e, "seeds": s} for (m, b, e), s in seeds.items()]


def _run_row(label: str, report: Report, groups: Sequence[SeedGroup]) -> dict[str, Any]:
    series = next(group.series for group in groups if any(report is run for run in group.runs)) % 8
    figures = {"close": fidelity(report), "macs": macs_left(report), "bad_score": is_far_off(report["scores"])}
    figures |= speed(report)
    return {"label": label, "report": report, "series": series, "budget": budget_of(report), **figures}


def _lead_sentence(report: Report) -> Markup:
    """What the run achieved, in a sentence for those who read no further."""
    size, scores, fast = report["bytes"], report["scores"], speed(report)
    clauses: list[str] = [f"{_percent(report['kept'] / report['total'])} of the weights are left"]
    if size["file"] and size["dense"]:
        clauses.append(f"the file takes {_percent(size['file'] / size['dense'])} of the dense one's bytes")
    if scores:
        dense, sparse = (score_text(scores[key], scores) for key in ("dense", "sparse"))
        change = f"{scores['metric']} went from {dense} to {sparse} on the test data"
        if perplexity := scores.get("perplexity"):
            change = f"perplexity went from {perplexity['dense']:,.2f} to {perplexity['sparse']:,.2f} on the test data"
        bad = Markup('<span class="bad">{}, far {} the dense model: look before you use it</span>')
        side = "above" if lower_is_better(scores) else "below"
        clauses.append(bad.format(change, side) if is_far_off(scores) else change)
    else:
        clauses.append("it was not scored")
    if fast["verdict"] == AS_DENSE:
        clauses.append(f"and it {AS_DENSE}: a smaller file is no faster by itself")
    elif fast["speedup"] is None:
        clauses.append("and it was not timed: a smaller file is no faster by itself")
    else:
        clauses.append(f"and it was measured to be {fast['verdict']} here: {fast['speedup']:.2f}x ({fast['form']})")
    return Markup(", ").join(clauses) + "."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _budget_text(row: Report, report: Report) -> str:
    left = unused(report["budget"])
    note = f"; {_percent(left)} unused" if left > MUCH else ""
    if row["kind"] == "sparsity":
        return f"{report['kept']:,} of {report['total']:,} weights kept{note}"
    if row["kind"] == "latency":
        return f"{row['achieved'] / 1e6:.3f} of {row['limit'] / 1e6:.3f} ms allowed, by the tables{note}"
    return f"{row['achieved']:,} of {row['limit']:,} {unit(row['kind'])} allowed{note}"


_COMPUTE = {
    "micro_batch": "activations of {} samples at a time (micro_batch)",
    "amp": "training in {} (amp)",
    "channels_last": "images laid out with channels last (channels_last)",
    "compile": "the model compiled (compile)",
    "checkpoint": "activations computed again instead of kept (checkpoint)",
    "cached": "at most {:,} bytes of the dense model's outputs kept (cached)",
}


def _certificate(run: Path) -> dict[str, Any]:
    """`{rows, passed}`: the checks of certificate.json, and the check of its text that `allot verify` makes.

    Raises:
        UsageError: the file cannot be read.
    """
    path = run / CERTIFICATE
    try:
        content = path.read_bytes()
        keys = ("file", "check", "promised", "found", "passed")
        rows = [seal_row(path.name, content), *({key: row[key] for key in keys} for row in json.loads(content)["rows"])]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    return {"rows": rows, "passed": all(row["passed"] for row in rows)}


@cache  # compiling takes longer than all of a small run
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "number": number,
        "percent": _percent,
        "score": score_text,
        "change": lambda scores: change_text(scores["dense"], scores["sparse"], scores),
        "check_text": check_text,
        "macs_kept": macs_kept,
        "folding": lambda name: Markup(".<wbr>").join(escape(part) for part in str(name).split(".")),
    }
    return environment.get_template(name)
