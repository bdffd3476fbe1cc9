"""Whole chains on the zoo: `python -m benchmarks.sweeps` runs `allot sweep` and fills docs/results.md.

Four sparsities, three methods, three seeds a net, and the control: uniform with what fcpts trains and repairs by. The
last step counts, on the held-out test split. A cell is a run in runs/sweeps/NET, from which an interrupted command goes
on; about 30 minutes a net on one core. The tables behind the page are kept in benchmarks/measured/sweep-NET.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.logging import RichHandler

from allot.pruning.sweep import cells_of, sweep
from allot.sources import zoo
from benchmarks.runs import cell, fill

BUDGETS = ("sparsity=0.5", "sparsity=0.8", "sparsity=0.9", "sparsity=0.95")
METHODS = ("erk", "fcpts", "unipts")
NETS = ("digits-resnet20", "glyph-vit")
MEASURED = Path(__file__).parent / "measured"
log = logging.getLogger("allot")


def swept(net: str, out: Path) -> None:
    """Run what is missing of a net, the control too, and keep the two tables."""
    given = (zoo.model(net), zoo.data(net, "calibration"))
    given_to_all: dict[str, Any] = {"test": zoo.data(net, "test"), "label": f"zoo:{net}"}

    def tell(number: int, of: int, at: object) -> None:
        log.info("%s: %d of %d: %s", net, number, of, at)

    sweep(*given, cells_of(METHODS, BUDGETS, 3), out / net, on_cell=tell, **given_to_all)
    control = {**given_to_all, "allocate": "uniform", "repair": "distill,bn"}
    sweep(*given, cells_of(("erk",), BUDGETS, 3), out / f"{net}-control", on_cell=tell, **control)
    for name in (net, f"{net}-control"):
        shutil.copy(out / name / "results.json", MEASURED / f"sweep-{name}.json")


def table(net: str) -> list[str]:
    """Top-1, mean and spread, of every method at every budget; MACs left and seconds, means."""
    lines = [f"### {net}", "", "| sparsity | method | top-1 | MACs left | seconds |", "|---|---|--:|--:|--:|"]
    rows = {
        name: json.loads((MEASURED / f"sweep-{name}.json").read_text())["cells"] for name in (net, f"{net}-control")
    }
    for budget in BUDGETS:
        groups = {"uniform + distill, bn": [row for row in rows[f"{net}-control"] if row["budget"] == budget]}
        groups |= {m: [row for row in rows[net] if (row["budget"], row["method"]) == (budget, m)] for m in METHODS}
        for method, some in groups.items():
            if not some or any("error" in row for row in some):
                continue
            macs = sum(row["macs"] / row["dense_macs"] for row in some) / len(some)
            seconds = sum(row["seconds"] for row in some) / len(some)
            score = cell([100 * row["score"] for row in some])
            share = 100 * (1 - some[0]["kept"] / some[0]["total"])
            lines.append(f"| {share:.1f} % | {method} | {score} | {100 * macs:.1f} % | {seconds:.0f} |")
    return [*lines, ""]


def main() -> None:
    """Measure what is missing and fill the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sweeps"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--net", action="append", choices=NETS, help="this net only")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(1)
    for net in options.net or NETS:
        swept(net, options.out)
    lines = [line for net in NETS if (MEASURED / f"sweep-{net}.json").exists() for line in table(net)]
    fill(options.page, "sweeps", lines)
    log.info("filled %s", options.page)


if __name__ == "__main__":
    main()
