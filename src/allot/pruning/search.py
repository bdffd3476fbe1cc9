"""The largest share that can be removed within a limit on the score, by bisection over runs.

Between nothing (0) and everything (1) the middle is tried; where the score is kept, the search resumes above the
middle, else below. N runs leave a gap of 2^-N. Where the score falls with every further share that is removed, the
result is the largest share, to that gap. Where it does not, the result still keeps the score, and no run that removed
more did.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from torch import nn

from allot.budget.bisection import bracket
from allot.errors import BudgetError, GuaranteeMissed, UsageError, check_number
from allot.network.arguments import typed
from allot.processes import on_first_process
from allot.pruning.prune import prune
from allot.pruning.settings import SearchSettings, check_settings
from allot.report.comparison import comparison_page, page_in
from allot.run.calibration import SAMPLES, Data, readable_again
from allot.run.evaluate import evaluate
from allot.run.labelled import LabelledData
from allot.run.max_drop import MaxDrop
from allot.run.places import check_directory_place
from allot.run.store import write, write_json

KINDS = ("sparsity", "macs")


@typed
def search(
    model: nn.Module,
    calibration: Data | None,
    out: str | os.PathLike[str],
    *,
    test: LabelledData,
    max_drop: float | str,
    kind: str = "sparsity",
    runs: int = 6,
    on_run: Callable[[int, int, str], None] | None = None,
    **settings: Unpack[SearchSettings],
) -> dict[str, Any]:
    """Prune by bisection for the largest share that keeps the score; writes OUT/results.json and OUT/report.html.

    OUT/sparsity-0.75 and the others are ordinary runs: a finished one is opened and an unfinished one resumes, so that
    the same call ends in the same table however often it was stopped.

    Args:
        test, max_drop: labelled data and how much worse than dense the score may be, as in `prune`.
        kind: what is removed: weights ("sparsity") or arithmetic ("macs").
        runs: how many runs at most.
        on_run: called before each run with (number, of, budget).
        settings: further arguments of `prune`.
    Returns:
        `{"kind", "max_drop", "cells", "best"}`: a row a run, in the order of the search, with `met` and the verdict in
        `text` (or the `error` of a budget that cannot be met), and the name of the run that removes most of those that
        keep the score, or None.
    Raises:
        UsageError, Stopped: as `prune`; the same call resumes.

    >>> from tempfile import TemporaryDirectory
    >>> import torch
    >>> net, x = nn.Linear(4, 4).eval(), torch.eye(4)
    >>> labelled = [(row, int(net(row).argmax())) for row in x]
    >>> with TemporaryDirectory() as out:
    ...     found = search(net, x, out, test=labelled, max_drop="50pt", runs=2, repair="none")
    >>> [cell["budget"] for cell in found["cells"]][0]
    'sparsity=0.5'
    """
    check_settings(settings, SearchSettings)
    out = check_directory_place(out)
    if kind not in KINDS:
        raise UsageError(f"kind={kind!r}: {' or '.join(KINDS)} is accepted.")
    check_number("runs", runs, 1, whole=True)
    drop = MaxDrop.read(max_drop)
    samples = settings.get("samples")
    calibration, test = readable_again(calibration, SAMPLES if samples is None else samples), readable_again(test)
    dense = evaluate(model, test, metric=settings.get("metric"), workers=settings.get("workers") or 0)
    drop.limit(dense.metric, dense.score, lower=dense.metric in dense.lower)  # errors come before the first run
    rows: list[dict[str, Any]] = []
    reports: list[tuple[str, dict[str, Any]]] = []

    def keeps(removed: float) -> bool:
        amount = removed if kind == "sparsity" else 100 * (1 - removed)
        text = f"{amount:.10f}".rstrip("0").rstrip(".") + ("%" if kind == "macs" else "")
        if on_run:
            on_run(len(rows) + 1, runs, f"{kind}={text}")
        row: dict[str, Any] = {"budget": f"{kind}={text}", "removed": removed}
        name = f"{kind}-{text}"
        chosen = {**settings, "test": test, "dense_score": dense, "max_drop": max_drop, "save_to": out / name}
        try:
            report = _report_of(model, calibration, row["budget"], chosen)
        except BudgetError as error:
            rows.append({**row, "met": False, "error": str(error)})
            return False
        (verdict,) = (given for given in report["guarantees"] if given["kind"] == "max-drop")
        scores = {key: report["scores"][key] for key in ("metric", "dense", "sparse")}
        rows.append({**row, "run": name, **scores, "met": verdict["met"], "text": verdict["text"]})
        reports.append((name, report))
        return bool(verdict["met"])

    bracket(keeps, 0.0, 1.0, rounds=runs)
    kept = [row for row in rows if row["met"]]
    best = max(kept, key=lambda row: row["removed"])["run"] if kept else None
    table = {"kind": kind, "max_drop": drop.asked, "cells": rows, "best": best}
    out.mkdir(parents=True, exist_ok=True)  # where no run made it
    on_first_process(lambda: write_json(out / "results.json", table))
    if not reports:
        raise UsageError(f"no run met its budget; the first: {rows[0]['error']}")
    known = {"method": reports[0][1]["method"], "seed": reports[0][1]["seed"]}
    failed = [{**row, **known} for row in rows if "error" in row]
    on_first_process(lambda: write(out / "report.html", comparison_page(reports, failed=failed, links=page_in)))
    return table


def _report_of(model: nn.Module, calibration: Any, budget: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report of one run, whether or not it keeps the score."""
    try:
        result = prune(model, calibration, budget, **settings)
    except GuaranteeMissed as error:
        result = error.result
    return dict(on_first_process(result.report))
