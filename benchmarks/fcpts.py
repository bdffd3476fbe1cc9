"""FCPTS against its controls, and its ablation: `python -m benchmarks.fcpts`.

Writes docs/fcpts-results.md, the summary in docs/methods/fcpts.md, and the pictures of both.

Every run goes through `allot.prune` with names and options that anyone can give. Scores are top-1 on the held-out test
split after the last step; nothing is chosen by it. Mean and spread (standard deviation) over three seeds, which decide
the draw of 512 calibration images and their order. Measured runs are kept in runs/fcpts.json, so that an interrupted
command goes on (delete it to start afresh). About three hours on two cores; `--only main` and the like do a part.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.logging import RichHandler

import allot
from allot.sources import zoo
from benchmarks import fcpts_pictures
from benchmarks.runs import cell, fill, measured

NETS = ("digits-resnet20", "glyph-resnet20", "glyph-mobilenetv2", "glyph-vit")
SEEDS = (0, 1, 2)
CONTROL: dict[str, Any] = {"repair": "distill,bn"}
CHAINS: dict[str, dict[str, Any]] = {
    "uniform": {"allocate": "uniform", **CONTROL},
    "uniform, ramp": {"allocate": "uniform", **CONTROL, "options": {"distill": {"ramp": 8.0}}},
    "erk": {"allocate": "erk", **CONTROL},
    "erk, ramp": {"allocate": "erk", **CONTROL, "options": {"distill": {"ramp": 8.0}}},
    "fcpts from uniform": {"method": "fcpts", "options": {"fcpts": {"start": "uniform"}}},
    "fcpts": {"method": "fcpts"},
}
ABLATION: dict[str, dict[str, Any]] = {
    "fcpts": {},
    "no learning": {"distance": 0.0},
    "no ramp": {"ramp": 1.0},
    "learning after the ramp": {"learn_from": 0.6},
    "narrow window": {"window": 0.1},
}
SHORT, LONG = 60, 1000


def cells(only: str) -> Iterator[tuple[str, str, float, dict[str, Any], int]]:
    """(key, net, sparsity, arguments of `prune`, seed) of every run."""
    parts: dict[str, list[tuple[str, float, dict[str, Any]]]] = {
        "main": [(f"{s} {name}", s, chain) for s in (0.98, 0.95) for name, chain in CHAINS.items()],
        "ablation": [
            (f"0.98 ablation {name}", 0.98, {"method": "fcpts", "options": {"fcpts": changed}})
            for name, changed in ABLATION.items()
            if changed
        ],
        "far": [(f"0.99 {name}", 0.99, CHAINS[name]) for name in ("uniform", "erk", "fcpts")],
        "auto": [("0.98 fcpts from auto", 0.98, {"method": "fcpts", "options": {"fcpts": {"start": "auto"}}})],
        "short": [
            (f"0.95 short {name}", 0.95, {**CHAINS[name], "options": {method: {"steps": SHORT, **start}}})
            for name, method, start in (
                ("uniform", "distill", {}),
                ("erk", "distill", {}),
                ("fcpts from uniform", "fcpts", {"start": "uniform"}),
                ("fcpts", "fcpts", {}),
            )
        ],
        "paper": [("0.98 fcpts-paper", 0.98, {"method": "fcpts-paper"})],
        "long": [
            (f"0.98 long {name}", 0.98, {**CHAINS[name], "options": {method: {"steps": LONG}}})
            for name, method in (("erk", "distill"), ("fcpts", "fcpts"))
        ],
    }
    for part in parts if only == "all" else [only] if only in parts else []:
        for seed in SEEDS:
            for name, sparsity, chain in parts[part]:
                for net in NETS:
                    yield f"{net} {name} {seed}", net, sparsity, chain, seed


def measure(net: str, sparsity: float, chain: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One run: test score, what was kept, what it cost, and how densities moved."""
    torch.set_num_threads(1)
    started = time.monotonic()
    data = zoo.data(net, "calibration")
    result = allot.prune(zoo.model(net), data, allot.Budget(sparsity=sparsity), seed=seed, **chain)
    seconds = time.monotonic() - started
    report = result.report()
    return {
        "score": allot.evaluate(result.model(), zoo.data(net, "test")).score,
        "kept": report["kept"],
        "macs": report["macs"],
        "images": report["images"],
        "seconds": seconds,
        "density": dict(result.allocation),
        "total": result.allocation.total,
        "trajectory": report["diagnostics"].get("fcpts", {}).get("trajectory"),
    }


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/fcpts-results.md."""
    lines = [
        "# Results: FCPTS",
        "",
        f"Made by `python -m benchmarks.fcpts` (torch {torch.__version__.split('+')[0]}, CPU, one thread a run).",
        "",
        "Top-1 on the held-out test split after the last step, in percent: mean ± standard deviation over three seeds",
        "(draw and order of 512 unlabelled calibration images). Every row of a table has the same images, steps and",
        "repair (network-wise distillation, then batch-norm re-estimation). *uniform*, *erk*: densities fixed;",
        "*ramp*: the same with the budget coming down from eight times as much, as in *fcpts*.",
        "",
    ]
    for sparsity in (0.95, 0.98, 0.99):
        if rows := _rows(found, {name: f"{sparsity} {name}" for name in (*CHAINS, "fcpts from auto", "fcpts-paper")}):
            lines += [f"## {100 * sparsity:.0f} % of the weights gone", "", *rows, ""]
            lines += [*_gains(found, sparsity), ""]
    names = {name: f"0.95 short {name}" for name in ("uniform", "erk", "fcpts from uniform", "fcpts")}
    if rows := _rows(found, names):
        lines += ["## Shorter", "", f"95 %, {SHORT} steps instead of {_steps():,}.", "", *rows, ""]
    if rows := _rows(found, {f"{name}, {LONG:,} steps": f"0.98 long {name}" for name in ("erk", "fcpts")}):
        lines += ["## Longer", "", f"98 %, {LONG:,} steps instead of {_steps():,}.", "", *rows, ""]
    names = {name: f"0.98 ablation {name}" if changed else "0.98 fcpts" for name, changed in ABLATION.items()}
    if rows := _rows(found, names):
        lines += ["## Ablation", "", "98 %, from erk. One ingredient taken away or changed at a time.", "", *rows, ""]
    return "\n".join(lines)


def _steps() -> int:
    return allot.METHODS["fcpts"].training.steps  # type: ignore[attr-defined]


def _scores(found: Mapping[str, Mapping[str, Any]], net: str, name: str) -> list[float]:
    return [100 * found[key]["score"] for seed in SEEDS if (key := f"{net} {name} {seed}") in found]


def _rows(found: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], *, macs: bool = True) -> list[str]:
    """A table: one row a name, one column a net, MACs kept of the first seed; [] where nothing is measured."""
    head = ["| | " + " | ".join(NETS) + " | mean |", "|---|" + "--:|" * (len(NETS) + 1)]
    if macs:
        head = [head[0] + " MACs kept |", head[1] + "--:|"]
    rows = []
    for shown, name in names.items():
        scores = [_scores(found, net, name) for net in NETS]
        if all(scores):
            cells = [cell(some) for some in scores]
            mean = statistics.mean(statistics.mean(some) for some in scores)
            shares = [
                100 * run["macs"]["sparse"] / run["macs"]["dense"]
                for net in NETS
                if (run := found[f"{net} {name} {SEEDS[0]}"])
            ]
            kept = " / ".join(f"{share:.1f}" for share in shares)
            rows.append(f"| {shown} | {' | '.join(cells)} | {mean:.1f} |" + (f" {kept} % |" if macs else ""))
    return head + rows if rows else []


def _gains(found: Mapping[str, Mapping[str, Any]], sparsity: float) -> list[str]:
    """Paired differences, seed by seed."""
    lines = []
    pairs = (("fcpts", "erk"), ("fcpts", "erk, ramp"), *(("fcpts from uniform", f"uniform{x}") for x in ("", ", ramp")))
    for name, control in pairs:
        parts = []
        for net in NETS:
            ours, theirs = (_scores(found, net, f"{sparsity} {n}") for n in (name, control))
            if not ours or len(ours) != len(theirs):
                break
            parts.append([a - b for a, b in zip(ours, theirs, strict=True)])
        if len(parts) == len(NETS):
            mean = statistics.mean(statistics.mean(part) for part in parts)
            shown = ", ".join(f"{net} {cell(part, signed=True)}" for net, part in zip(NETS, parts, strict=True))
            lines.append(f"- {name} minus {control}, paired by seed: {shown}; mean {mean:+.1f}.")
    runs = [[found.get(f"{net} {sparsity} fcpts from uniform {seed}") for seed in SEEDS] for net in NETS]
    if all(all(some) for some in runs):
        moves = [
            (net, name, run["density"][name])
            for net, some in zip(NETS, runs, strict=True)
            for run in some[:1]
            if run
            for name in [max(run["density"], key=lambda name: abs(run["density"][name] - (1 - sparsity)))]
        ]
        shown = ", ".join(f"{net}: {name} to {density:.2f}" for net, name, density in moves)
        lines.append(
            f"- from uniform, all layers at {1 - sparsity:.2f}, the layer that moved most (first seed): {shown}."
        )
    return lines


def main() -> None:
    """Measure what is missing, write the page and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fcpts", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=("all", "main", "ablation", "far", "auto", "short", "paper", "long", "none"), default="all"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("docs/fcpts-results.md"))
    parser.add_argument("--cache", type=Path, default=Path("runs/fcpts.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    jobs = ((key, rest) for key, *rest in cells(options.only))
    found = measured(jobs, measure, options.cache, options.workers)
    options.out.write_text(page(found))
    rows = _rows(found, {name: f"0.98 {name}" for name in CHAINS}, macs=False)
    fill(Path("docs/methods/fcpts.md"), "98 %", rows)
    fcpts_pictures.draw(found, NETS, tuple(ABLATION), SEEDS, Path("docs/pictures"))


if __name__ == "__main__":
    main()
