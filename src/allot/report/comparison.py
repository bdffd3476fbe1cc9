"""Several runs side by side, as one page: like is ranked with like, budget by budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from allot.export.files.destination import is_run
from allot.export.files.formats import PAGE
from allot.export.timing.clock import AS_DENSE
from allot.report.charts import Mark, marks
from allot.report.fidelity import fidelity
from allot.report.frame import template
from allot.report.headline import Headline
from allot.report.scores import change_text, is_share, lower_is_better, score_text
from allot.report.seed_groups import (
    Labelled,
    SeedGroup,
    budget_of,
    macs_left,
    reading_report,
    seed_groups,
    without_copies,
)
from allot.report.table import speed

Report = Mapping[str, Any]

TONES = {"close": "", "loss": "warn", "far": "bad", "": ""}  # of the grade of a score


def comparison_page(
    reports: Labelled, failed: Sequence[Report] = (), *, links: Callable[[str], str] | None = None
) -> str:
    """Several runs: the figures of each method at each budget, score against size, and every run.

    Runs are ranked with those of the same model, data and scope alone.

    Args:
        reports: (label, report) each; a report that is given twice counts once.
        failed: `{method, budget, seed, error}` of runs that failed.
        links: the path of a run's page, as seen from this page, by label; None: runs are not linked.
    Raises:
        UsageError: a report that does not hold what the page needs.
    """
    reports = without_copies(reports)
    groups = seed_groups(reports)
    rows = []
    for label, report in reports:
        with reading_report(label):
            link = quote(links(label)) if links else ""
            rows.append({**_run_row(label, report, groups), "link": link})
            _group_row(SeedGroup(label, 0, "", (report,)))  # an error about this report names this report
    with reading_report(", ".join(label for label, _ in reports)):
        return template("comparison.html").render(
            rows=rows,
            fields=[_field_of(like) for like in _alike(groups)],
            scored=any(group.metric is not None for group in groups),
            failed=_failure_rows(failed),
        )


def page_in(run: str | Path, seen_from: str | Path = ".") -> str:
    """The path of the page of a run, as seen from a directory.

    >>> page_in("runs/erk/seed-0", seen_from="runs")
    'erk/seed-0/report.html'
    """
    return Path(os.path.relpath(Path(run) / PAGE, seen_from)).as_posix()


def common_page(runs: Sequence[Path]) -> Path:
    """Where the page of several runs goes: into the folder that holds them all, and is no run itself.

    >>> str(common_page([Path("runs/a"), Path("runs/b/c")]))
    'runs/report.html'
    """
    folder = Path(os.path.commonpath([os.path.abspath(run) for run in runs]))
    folder = folder.parent if is_run(folder) else folder
    absolute = any(run.is_absolute() for run in runs)
    return (folder if absolute else Path(os.path.relpath(folder))) / PAGE


def _alike(groups: Sequence[SeedGroup]) -> list[list[SeedGroup]]:
    """The groups that can be ranked with one another: of one model, tested on the same data, and of one scope."""
    alike: dict[Any, list[SeedGroup]] = {}
    for group in groups:
        report, scores = group.runs[0], group.runs[0]["scores"] or {}
        settings = report.get("settings") or {}
        data = settings.get("test") or settings.get("data")
        key = report["model"], settings.get("digest"), data, report["total"], bool(report["groups"])
        score = scores.get("metric"), scores.get("samples"), scores.get("dense")
        alike.setdefault((*key, *score), []).append(group)
    return list(alike.values())


def _field_of(groups: Sequence[SeedGroup]) -> dict[str, Any]:
    """What the page says of groups that are ranked with one another, by budget, the best score of a budget first."""
    report, metric = groups[0].runs[0], groups[0].metric
    scores = report["scores"]
    of = "channels" if report["groups"] else "weights"
    tested = f", {metric} on {scores.get('samples', 0):,} samples" if scores else ""
    return {
        "title": f"{report['model']}: {of} removed of {report['total']:,} in scope{tested}",
        "best": _best_sentence(groups),
        "dense": f"{score_text(scores['dense'], scores)} {metric}" if scores else "",
        "summaries": [_group_row(group) for group in sorted(groups, key=_order)],
        "series": list(dict.fromkeys((group.name, group.series % 8) for group in groups)),
        "charts": _score_charts(groups),
    }


def _order(group: SeedGroup) -> tuple[Any, ...]:
    """Kinds of limits, then from the mildest budget to the strictest, then the best score first."""
    rows, scores = group.runs[0]["budget"], group.runs[0]["scores"]
    strictness = [row["limit"] if row["kind"] == "sparsity" else -row["limit"] for row in rows]
    sign = -1 if scores and not lower_is_better(scores) else 1
    return [row["kind"] for row in rows], strictness, group.score is None, sign * (group.score or 0.0)


_AXES = {
    "weights removed, %": lambda report: 100 * report["sparsity"],
    "MACs left, %": lambda report: None if (share := macs_left(report)) is None else 100 * share,
    "file size, kB": lambda report: report["bytes"]["file"] / 1000 if report["bytes"]["file"] else None,
}


def _score_charts(groups: Sequence[SeedGroup]) -> list[tuple[str, str]]:
    """(caption, chart) for each axis: a point for all seeds of a series at a budget."""
    scored, charts = [group for group in groups if group.score is not None], []
    if not scored:
        return []
    scores = scored[0].runs[0]["scores"]
    metric, unit, factor = scores["metric"], *((", %", 100) if is_share(scores) else ("", 1))
    for axis, figure in _AXES.items():
        points = [
            Mark(group.caption, x, factor * (group.score or 0.0), factor * (group.spread or 0.0), group.series)
            for group in scored
            if (x := group.mean(figure)) is not None
        ]
        if len(points) > 1:
            bars = "; mean over seeds, bars: one standard deviation" if any(len(g.scores) > 1 for g in scored) else ""
            caption = (
                f"Score ({metric}) on held-out data against {axis.partition(',')[0]}{bars}; dashed: the dense model."
            )
            charts.append((caption, marks(points, axis, f"{metric}{unit}", level=factor * scores["dense"])))
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
        "tone": TONES[Headline.of({**group.runs[0], "scores": scores}).grade],
        "score_text": _mean_text(group),
        "change": change_text(scores["dense"], scores["sparse"], scores) if scores else "",
        "change_value": scores["sparse"] - scores["dense"] if scores else "",
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
    if scored:
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
    figures = {"close": fidelity(report), "macs": macs_left(report), "tone": TONES[Headline.of(report).grade]}
    figures |= speed(report)
    return {"label": label, "report": report, "series": series, "budget": budget_of(report), **figures}
