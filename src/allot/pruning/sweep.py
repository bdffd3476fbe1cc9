"""Several budgets, methods and seeds on one model: a run directory for each, a table of all.

OUT/METHOD/BUDGET/seed-N are ordinary runs. A finished cell is opened and an interrupted one resumes, so that the same
call ends in the same table however often it was stopped. All cells share the model, the data and the dense model's
score, and nothing else, so that the cost of a cell does not depend on the cells before it.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Unpack

from torch import nn

from allot.budget.budget import Budget
from allot.budget.units import meaning
from allot.errors import BudgetError, PatternError, UsageError
from allot.export.files.formats import PAGE
from allot.network.arguments import typed
from allot.processes import on_first_process
from allot.pruning.assemble import assemble
from allot.pruning.prune import prune
from allot.pruning.settings import SweepSettings, check_settings
from allot.report.comparison import comparison_page, page_in
from allot.report.table import speed
from allot.run.calibration import SAMPLES, Data, readable_again
from allot.run.evaluate import evaluate
from allot.run.places import check_directory_place
from allot.run.store import write, write_json

T = TypeVar("T")

UNIFORM = "uniform"  # the allocator of a control


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        allocate: the allocator in place of that of the method.
    """

    method: str
    budget: str
    seed: int
    allocate: str | None = None

    @property
    def name(self) -> str:
        """The method, with the allocator that takes the place of its own before it."""
        return self.method if self.allocate is None else f"{self.allocate}+{self.method}"

    def __str__(self) -> str:
        return f"{self.name}, {self.budget}, seed {self.seed}"

    def directory(self, out: Path) -> Path:
        """The run directory of this cell."""
        return out / self.name / re.sub(r"[^\w.=%-]+", "_", self.budget) / f"seed-{self.seed}"


@typed
def budgets_of(texts: Sequence[str]) -> list[str]:
    """Budgets to try: `sparsity=0.5,0.9` is two, `macs=50% and bytes=3MB` is one, and so is `sparsity=0.9,90%`.

    Numbers alone are sparsities.

    Raises:
        InvalidBudget: a limit that cannot be read.
    """
    budgets: list[str] = []
    for text in texts:
        kind = ""
        for part in (piece.strip() for piece in text.split(",")):
            if "=" in part:
                kind = part.partition("=")[0].strip()
            budgets.append(part if "=" in part else f"{kind or 'sparsity'}={part}")
    return _unique(budgets, _meaning)


@typed
def cells_of(methods: Sequence[str], budgets: Sequence[str], seeds: int) -> list[Cell]:
    """Every cell once, seed by seed: the first comparison is complete soonest.

    Raises:
        InvalidBudget: a budget that cannot be read.

    >>> [cell.budget for cell in cells_of(["erk"], budgets_of(["sparsity=0.5,0.9"]), seeds=1)]
    ['sparsity=0.5', 'sparsity=0.9']
    """
    return _unique_cells(
        [Cell(method, budget, seed) for seed in range(seeds) for budget in budgets for method in methods]
    )


def with_controls(cells: Sequence[Cell], **settings: Any) -> list[Cell]:
    """The cells, and after each that does not allocate uniformly its control: uniform densities, the same repair.

    Methods that differ in nothing but the allocator share one control.

    Args:
        settings: the arguments of `prune` that all cells have.

    >>> [cell.name for cell in with_controls(cells_of(["erk", "lamp", "best"], ["sparsity=0.5"], seeds=1))]
    ['erk', 'uniform+erk', 'lamp', 'best', 'uniform+best']
    """
    parts = {key: settings.get(key) for key in ("score", "pattern", "repair")}
    methods = dict.fromkeys(cell.method for cell in cells)
    names = {method: assemble(method, allocate=settings.get("allocate"), **parts).names for method in methods}

    def control_of(cell: Cell) -> tuple[Any, ...]:
        chain = names[cell.method]
        return cell.budget, cell.seed, chain.score, chain.pattern, chain.repair

    controlled = {control_of(cell) for cell in cells if UNIFORM in (cell.allocate, names[cell.method].allocate)}
    found: list[Cell] = []
    for cell in cells:
        found.append(cell)
        if (control := control_of(cell)) not in controlled:
            controlled.add(control)
            found.append(replace(cell, allocate=UNIFORM))
    return found


@typed
def sweep(
    model: nn.Module,
    calibration: Data | None,
    cells: Sequence[Cell],
    out: str | os.PathLike[str],
    *,
    on_cell: Callable[[int, int, Cell], None] | None = None,
    **settings: Unpack[SweepSettings],
) -> dict[str, Any]:
    """Run the missing cells, then write OUT/report.html and OUT/results.json; returns the content of results.json.

    Args:
        cells: see `cells_of`.
        on_cell: called before each cell with (number, of, cell).
        settings: further arguments of `prune`; each method gets those of the `options` that a part of it takes.
    Returns:
        `{"cells": [...], "means": [...]}`: one row a run (or the `error` of one that met no budget), and one for all
        seeds of a method at a budget, mean and standard deviation.
    Raises:
        UsageError, Stopped: as `prune`; the same call resumes.
        InvalidBudget: a budget that cannot be read.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as out:
    ...     cells = cells_of(["erk"], ["sparsity=0.5"], seeds=1)
    ...     sweep(nn.Linear(4, 4), None, cells, out, repair="none")["cells"][0]["kept"]
    8
    """
    check_settings(settings, SweepSettings)
    out, cells = check_directory_place(out), _unique_cells(cells)
    if not cells:
        raise UsageError("a sweep of no cells: methods, budgets and a number of seeds are accepted.")
    common: dict[str, Any] = {**settings}
    options = dict(common.pop("options", None) or {})
    chains = {(cell.method, cell.allocate): common | _allocate(cell) for cell in cells}
    taken = {chain: options_for(chain[0], options, given) for chain, given in chains.items()}
    if unused := sorted(options.keys() - {name for names in taken.values() for name in names}):
        raise UsageError(f"options: {unused[0]} is no method of any cell.")
    samples = common.get("samples")
    calibration = readable_again(calibration, SAMPLES if samples is None else samples)
    test = readable_again(common.pop("test", None))
    scoring: dict[str, Any] = {"metric": common.get("metric"), "workers": common.get("workers") or 0}
    dense = evaluate(model, test, **scoring) if test is not None else None
    rows: list[dict[str, Any]] = []
    reports: list[tuple[str, dict[str, Any]]] = []
    for number, cell in enumerate(cells, 1):
        if on_cell:
            on_cell(number, len(cells), cell)
        directory = cell.directory(out)
        row = {"method": cell.name, "budget": cell.budget, "seed": cell.seed}
        try:
            chosen = {**common, "method": cell.method, "seed": cell.seed, "save_to": directory}
            chosen |= {"options": taken[cell.method, cell.allocate], "test": test, "dense_score": dense}
            chosen |= _allocate(cell)
            report = on_first_process(prune(model, calibration, cell.budget, **chosen).timed)
        except (BudgetError, PatternError) as error:
            rows.append({**row, "error": str(error)})
            continue
        reports.append((str(directory.relative_to(out)), report))
        rows.append({**row, "run": str(directory.relative_to(out)), **_results(report)})
    table = {"cells": rows, "means": list(_means(rows))}
    out.mkdir(parents=True, exist_ok=True)  # where no cell made it
    on_first_process(lambda: write_json(out / "results.json", table))
    if not reports:
        raise UsageError(f"no cell met its budget; the first: {rows[0]['error']}")
    failed = [row for row in rows if "error" in row]
    on_first_process(lambda: write(out / PAGE, comparison_page(reports, failed=failed, links=page_in)))
    return table


def _allocate(cell: Cell) -> dict[str, str]:
    return {} if cell.allocate is None else {"allocate": cell.allocate}


def _meaning(budget: str) -> frozenset[Any]:
    return meaning(Budget.parse(budget).asked)


def _unique_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells without repetitions, also of a budget in other words."""
    return _unique(cells, lambda cell: (cell.name, _meaning(cell.budget), cell.seed))


def _unique(items: Iterable[T], key: Callable[[T], Any]) -> list[T]:
    """The first item of each key."""
    first: dict[Any, T] = {}
    for item in items:
        first.setdefault(key(item), item)
    return list(first.values())


def options_for(method: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a part of this recipe takes."""
    chain = {key: settings.get(key) for key in ("allocate", "score", "pattern", "repair")}

    def takes(name: str) -> bool:
        try:
            assemble(method, options={name: {}}, **chain)
        except UsageError:
            return False
        return True

    assemble(method, **chain)  # raises the errors of the chain itself
    return {name: given for name, given in options.items() if takes(name)}


def _results(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of a finished cell."""
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
    """A row for all seeds of a method at a budget."""
    pairs = dict.fromkeys((row["budget"], row["method"]) for row in rows)
    for budget, method in pairs:
        cells = [row for row in rows if (row["budget"], row["method"]) == (budget, method)]
        scores = [row["score"] for row in cells if row.get("score") is not None and math.isfinite(row["score"])]
        yield {
            "budget": budget,
            "method": method,
            "seeds": len(cells),
            "failed": sum("error" in row for row in cells),
            "score": statistics.mean(scores) if scores else None,
            "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        }
