"""Several budgets, methods and seeds on one model: a run directory for each, a table of all.

OUT/METHOD/BUDGET/seed-N are ordinary runs. A cell that is done is opened, one that was interrupted goes on, so that the
same call ends in the same table however often it was stopped. Model, data and the dense model's score are there once
for all cells; nothing else is shared, so that what a cell costs does not depend on which cells ran before it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from allot.budget.budget import Budget
from allot.budget.units import meaning
from allot.errors import BudgetError, PatternError, UsageError
from allot.processes import on_first_process
from allot.pruning.assemble import assemble
from allot.pruning.prune import prune
from allot.report.page import comparison_page
from allot.report.table import speed
from allot.run.evaluate import evaluate
from allot.run.store import write

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    method: str
    budget: str
    seed: int

    def directory(self, out: Path) -> Path:
        """Where it lives."""
        return out / self.method / re.sub(r"[^\w.=%-]+", "_", self.budget) / f"seed-{self.seed}"


def budgets_of(texts: Sequence[str]) -> list[str]:
    """Budgets to try: `sparsity=0.5,0.9` is two, `macs=50% and bytes=3MB` is one, and so is `sparsity=0.9,90%`.

    Raises:
        BudgetError: a limit that cannot be read.
    """
    found: list[str] = []
    for text in texts:
        kind = ""
        for part in (piece.strip() for piece in text.split(",")):
            if "=" in part:
                kind = part.partition("=")[0].strip()
            found.append(part if "=" in part else f"{kind}={part}")
    return _distinct(found, _meaning)


def cells_of(methods: Sequence[str], budgets: Sequence[str], seeds: int) -> list[Cell]:
    """Every cell once, in the order in which a first comparison is there soonest: seed by seed.

    Raises:
        BudgetError: a budget that cannot be read.
    """
    return _once([Cell(method, budget, seed) for seed in range(seeds) for budget in budgets for method in methods])


def sweep(
    model: nn.Module,
    calibration: Any,
    cells: Sequence[Cell],
    out: str | Path,
    *,
    on_cell: Callable[[int, int, Cell], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run what is missing, then write OUT/report.html and OUT/results.json; returns what the latter holds.

    Args:
        cells: see `cells_of`.
        on_cell: called before each cell with (number, of, cell).
        settings: what else `prune` takes; of `options`, each method gets those that are its own.
    Returns:
        `{"cells": [...], "means": [...]}`: one row a run (or the `error` of one that met no budget), and one for all
        seeds of a method at a budget, mean and standard deviation.
    Raises:
        UsageError, Stopped: as `prune`; the same call goes on.
        BudgetError: a budget that cannot be read.
    """
    out, cells = Path(out), _once(cells)
    if not cells:
        raise UsageError("a sweep of no cells: methods, budgets and a number of seeds are accepted.")
    options = dict(settings.pop("options", None) or {})
    own = {method: own_options(method, options, settings) for method in dict.fromkeys(cell.method for cell in cells)}
    if unused := sorted(options.keys() - {name for some in own.values() for name in some}):
        raise UsageError(f"options: {unused[0]} is no method of any cell.")
    if isinstance(calibration, Iterator):  # every cell reads it
        calibration = list(itertools.islice(calibration, settings.get("samples", 512)))
    test = settings.pop("test", None)
    test = list(test) if isinstance(test, Iterator) else test
    dense = evaluate(model, test, workers=settings.get("workers") or 0) if test is not None else None
    rows: list[dict[str, Any]] = []
    reports: list[tuple[str, dict[str, Any]]] = []
    for number, cell in enumerate(cells, 1):
        if on_cell:
            on_cell(number, len(cells), cell)
        directory = cell.directory(out)
        told = {"method": cell.method, "budget": cell.budget, "seed": cell.seed}
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            chosen = {
                **settings,
                "method": cell.method,
                "seed": cell.seed,
                "save_to": directory,
                "test": test,
                "dense_score": dense,
            }
            report = on_first_process(prune(model, calibration, cell.budget, options=own[cell.method], **chosen).timed)
        except (BudgetError, PatternError) as error:
            rows.append({**told, "error": str(error)})
            continue
        reports.append((str(directory.relative_to(out)), report))
        rows.append({**told, "run": str(directory.relative_to(out)), **_figures(report)})
    table = {"cells": rows, "means": list(_means(rows))}
    on_first_process(lambda: write(out / "results.json", json.dumps(table, indent=2) + "\n"))
    if not reports:
        raise UsageError(f"no cell met its budget; the first: {rows[0]['error']}")
    failed = [row for row in rows if "error" in row]
    on_first_process(lambda: write(out / "report.html", comparison_page(reports, failed=failed)))
    return table


def _meaning(budget: str) -> frozenset[Any]:
    return meaning(Budget.parse(budget).asked)


def _once(cells: Sequence[Cell]) -> list[Cell]:
    """Without those that say again, in other words or not, what an earlier one does."""
    return _distinct(cells, lambda cell: (cell.method, _meaning(cell.budget), cell.seed))


def _distinct(some: Iterable[T], key: Callable[[T], Any]) -> list[T]:
    found: dict[Any, T] = {}
    for one in some:
        found.setdefault(key(one), one)
    return list(found.values())


def own_options(method: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a part of this recipe takes."""
    chain = {key: settings.get(key) for key in ("allocate", "score", "pattern", "repair")}

    def takes(name: str) -> bool:
        try:
            assemble(method, options={name: {}}, **chain)
        except UsageError:
            return False
        return True

    assemble(method, **chain)  # what is wrong with the chain itself is said here
    return {name: given for name, given in options.items() if takes(name)}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    scores, macs = report["scores"], report["macs"]
    return {
        "score": scores["sparse"] if scores else None,
        "dense": scores["dense"] if scores else None,
        "nll": scores["nll"]["sparse"] if scores else None,
        "kept": report["kept"],
        "total": report["total"],
        "macs": macs["sparse"] if macs else None,
        "dense_macs": macs["dense"] if macs else None,
        "bytes": report["bytes"]["file"],
        "faster": speed(report)["speedup"],
        "images": report["images"],
        "seconds": round(sum(report["seconds"].values()), 1),
    }


def _means(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    pairs = dict.fromkeys((row["budget"], row["method"]) for row in rows)
    for budget, method in pairs:
        own = [row for row in rows if (row["budget"], row["method"]) == (budget, method)]
        scores = [row["score"] for row in own if row.get("score") is not None and math.isfinite(row["score"])]
        yield {
            "budget": budget,
            "method": method,
            "seeds": len(own),
            "failed": sum("error" in row for row in own),
            "score": statistics.mean(scores) if scores else None,
            "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        }
