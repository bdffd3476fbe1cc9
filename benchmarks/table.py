"""Data-free allocators on the zoo, one shot and repaired: `python -m benchmarks.table` writes docs/results.md.

Every cell is the top-1 score on the held-out test split after the last step; nothing is chosen by it. Cells with a
repair are mean and spread (standard deviation) over three seeds, which decide the draw of 512 calibration images and
their order; one shot there is nothing random. Takes about 20 minutes on one core; measured cells are kept in
runs/table.json, so that an interrupted command goes on (delete it to start afresh).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.logging import RichHandler

import allot
from allot.sources import zoo

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
ALLOCATORS = ("uniform", "erk", "lamp", "global", "global-normalised")
SEEDS = (0, 1, 2)
REPAIRS = {
    "digits-resnet20": ("none", "bn", "bn,variance"),
    "glyph-resnet20": ("none", "bn", "bn,variance"),
    "glyph-mobilenetv2": ("none", "bn", "bn,variance"),
    "glyph-vit": ("none", "bias", "variance"),
}
log = logging.getLogger("allot")


def measure(model: str, sparsity: float, allocator: str, repair: str, seed: int) -> dict[str, Any]:
    """One cell: test score, kept weights, MACs and seconds."""
    net = zoo.model(model)
    started = time.monotonic()
    result = allot.prune(
        net, zoo.data(model, "calibration"), allot.Budget(sparsity=sparsity), method=allocator, repair=repair, seed=seed
    )
    seconds = time.monotonic() - started
    report = result.report()
    score = allot.evaluate(result.model(), zoo.data(model, "test")).score
    return {
        "score": score,
        "kept": report["kept"],
        "total": report["total"],
        "macs": report["macs"],
        "seconds": seconds,
    }


def measured(cache: Path) -> dict[str, dict[str, Any]]:
    """Every cell, from the cache where it is there."""
    cells: dict[str, dict[str, Any]] = json.loads(cache.read_text()) if cache.exists() else {}
    for model, repairs in REPAIRS.items():
        for sparsity in SPARSITIES:
            for allocator in ALLOCATORS:
                for repair in repairs:
                    for seed in SEEDS if repair != "none" else SEEDS[:1]:
                        key = f"{model} {sparsity} {allocator} {repair} {seed}"
                        if key not in cells:
                            cells[key] = measure(model, sparsity, allocator, repair, seed)
                            log.info("%s: %.4f", key, cells[key]["score"])
                            cache.parent.mkdir(exist_ok=True)
                            cache.write_text(json.dumps(cells))
    return cells


def page(cells: dict[str, dict[str, Any]]) -> str:
    """docs/results.md."""
    lines = [
        "# Results: data-free allocation on the zoo",
        "",
        f"Made by `python -m benchmarks.table` (torch {torch.__version__.split('+')[0]}, CPU, one thread).",
        "",
        "Top-1 on the held-out test split, in percent. *One shot* is magnitude selection and nothing else. With a",
        "repair, mean ± standard deviation over three seeds (draw and order of 512 unlabelled calibration images). The",
        "control of every row is *uniform* with the same repair. `kept` and `MACs` are what is left, in scope: every",
        "convolution and linear weight, stem and classifier included. Best mean of a column in bold.",
        "",
    ]
    for model, repairs in REPAIRS.items():
        net = zoo.model(model)
        dense = allot.evaluate(net, zoo.data(model, "test"))
        first = cells[f"{model} {SPARSITIES[0]} uniform none 0"]
        lines += [
            f"## {model}",
            "",
            f"Dense: {100 * dense.score:.1f} % on {dense.samples:,} test images, {first['total']:,} weights in scope, "
            f"{first['macs']['dense']:,} MACs.",
            "",
            "| sparsity | allocation | kept | MACs | " + " | ".join(_heading(repair) for repair in repairs) + " |",
            "|---|---|--:|--:|" + "--:|" * len(repairs),
        ]
        for sparsity in SPARSITIES:
            grid = {a: [_scores(cells, model, sparsity, a, repair) for repair in repairs] for a in ALLOCATORS}
            best = [max(statistics.mean(row[i]) for row in grid.values()) for i in range(len(repairs))]
            for allocator, row in grid.items():
                cell = cells[f"{model} {sparsity} {allocator} none 0"]
                shown = [_cell(scores, statistics.mean(scores) == top) for scores, top in zip(row, best, strict=True)]
                share = 100 * cell["macs"]["sparse"] / cell["macs"]["dense"]
                lines.append(
                    f"| {100 * sparsity:.0f} % | {allocator} | {cell['kept']:,} | {share:.1f} % | {' | '.join(shown)} |"
                )
        lines.append("")
    return "\n".join(lines)


def _scores(cells: dict[str, dict[str, Any]], model: str, sparsity: float, allocator: str, repair: str) -> list[float]:
    prefix = f"{model} {sparsity} {allocator} {repair} "
    return [100 * cell["score"] for key, cell in cells.items() if key.startswith(prefix)]


def _cell(scores: list[float], best: bool) -> str:  # noqa: FBT001
    text = f"{statistics.mean(scores):.1f}"
    text = f"**{text}**" if best else text
    return f"{text} ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else text


def _heading(repair: str) -> str:
    return "one shot" if repair == "none" else " + ".join(repair.split(","))


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--cache", type=Path, default=Path("runs/table.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(1)
    rest = options.out.read_text().partition("## Whole chains")[1:] if options.out.exists() else ()
    options.out.write_text(page(measured(options.cache)) + "".join(rest))  # the second part is benchmarks.sweeps'
    log.info("wrote %s", options.out)


if __name__ == "__main__":
    main()
