"""UniPTS, POT and their controls, the search and the ablation: `python -m benchmarks.unipts`.

Writes docs/unipts-results.md and the pictures of docs/methods/unipts.md and pot.md.

Every run goes through `allot.prune` with names and options that anyone can give. Scores are top-1 and negative
log-likelihood on the held-out test split after the last step; nothing is chosen by them. Mean and spread (standard
deviation) over three seeds, which decide the draw of 512 calibration images and their order. What is measured is kept
in benchmarks/measured/unipts.json: an interrupted command goes on, and only what is missing there is run (delete a
run to measure it again). About five hours on two cores from nothing; `--only main` and the like do a part.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.logging import RichHandler

import allot
from allot.methods.rules import Given
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.methods.training.trial import Trial
from allot.methods.unipts_search import Search
from allot.run.problem import Rule
from allot.sources import zoo
from benchmarks import unipts_pictures
from benchmarks.runs import POT, SEEDS, Found, cell, counting, dense, fill, measured, table, values

NETS = ("digits-resnet20", "glyph-resnet20", "glyph-mobilenetv2", "glyph-vit")
# rows of the main table, grouped by repair; the first of each group is its control
CHAINS: dict[str, dict[str, Any]] = {
    "uniform + unipts": {"allocate": "uniform", "repair": "unipts,bn"},
    "erk + unipts": {"allocate": "erk", "repair": "unipts,bn"},
    "unipts": {"method": "unipts"},
    "fcpts": {"method": "fcpts"},
    "fcpts + unipts": {"allocate": "fcpts", "repair": "unipts,bn"},
    "uniform + pot": {"allocate": "uniform", "repair": POT},
    "pot": {"method": "pot"},
}
# a search that tries: ERK, LAMP and a short FCPTS, each by a repair of 16 steps
CHOICE = Search(
    (
        ("erk", allot.METHODS["erk"]),
        ("lamp", allot.METHODS["lamp"]),
        ("fcpts", replace(allot.METHODS["fcpts"], training=Training(steps=32))),  # type: ignore[type-var]
    ),
    Trial(Training(steps=16), Schedule(ramp=8.0), (allot.METHODS["bn"],)),
)
SEARCHES: dict[str, dict[str, Any]] = {
    "unipts-paper": {"allocate": "unipts-paper", "repair": "unipts,bn"},
    "choice of three": {"allocate": CHOICE, "repair": "unipts,bn"},
    "choice of three, 3 generations": {"allocate": replace(CHOICE, generations=3), "repair": "unipts,bn"},
}
PAPER = {"optimizer": "sgd", "learning_rate": 0.01, "temperature": 4.0, "student_temperature": 1.0}
ABLATION: dict[str, dict[str, Any]] = {
    "unipts": {},
    "masks fixed": {"freeze_at": 0.0, "ramp": 1.0},
    "no ramp": {"ramp": 1.0},
    "base decays": {"base_decay": 0.366},
    "pruned weights decay": {"decay": 0.1},
    "pruned weights decay faster": {"decay": 0.4},
    "growth by gradient": {"growth": "gradient"},
    "growth by saliency": {"growth": "saliency"},
    "student temperature 1": {"temperature": 4.0, "student_temperature": 1.0},
    "as in the paper": {**PAPER, "base_decay": 0.366, "decay": 5e-5, "every": 1, "freeze_at": 1.0, "ramp": 1.0},
    "as in the paper, base fixed": {**PAPER, "decay": 5e-5, "every": 1, "freeze_at": 1.0, "ramp": 1.0},
}
ABLATED = ("glyph-resnet20", "glyph-vit")
# allocations that a fitness has to rank; "erk x": every density of ERK times e to the power of a draw from N(0, 1/4)
RANKED = ("uniform", "erk", "lamp", "global", "global-normalised", "knapsack", "equal-counts", "fcpts")
RANKED += tuple(f"erk x {i}" for i in range(4))

Cell = tuple[str, str, float, dict[str, Any], int]  # key, net, sparsity, arguments of `prune`, seed


def cells(only: str) -> Iterator[Cell]:
    """Every run of a part, the hard sparsities first."""
    parts: dict[str, list[tuple[tuple[str, ...], str, float, dict[str, Any]]]] = {
        "main": [(NETS, f"{s} {name}", s, chain) for s in (0.95, 0.98, 0.9, 0.8) for name, chain in CHAINS.items()],
        "ablation": [
            (ABLATED, f"0.95 ablation {name}", 0.95, {"method": "unipts", "options": {"unipts": changed}})
            for name, changed in ABLATION.items()
            if changed
        ],
        "search": [(NETS, f"{s} {name}", s, chain) for name, chain in SEARCHES.items() for s in (0.98, 0.95)],
    }
    for part in parts if only == "all" else [only] if only in parts else []:
        groups = sorted({s for _, _, s, _ in parts[part]}, key=[s for _, _, s, _ in parts[part]].index)
        for sparsity in groups:
            for seed in SEEDS:
                for nets, name, s, chain in parts[part]:
                    for net in nets if s == sparsity else ():
                        yield f"{net} {name} {seed}", net, s, chain, seed


def measure(net: str, sparsity: float, chain: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One run: scores on test, what was kept, what it cost, in all and to allocate."""
    torch.set_num_threads(1)
    pushed, count = counting()
    started = time.monotonic()
    data = zoo.data(net, "calibration")
    result = allot.prune(zoo.model(net), data, allot.Budget(sparsity=sparsity), seed=seed, on_step=count, **chain)
    seconds = time.monotonic() - started
    report = result.report()
    score = allot.evaluate(result.model(), zoo.data(net, "test"))
    search = report["diagnostics"].get("search", {})
    return {
        "score": score.score,
        "nll": score.nll,
        "kept": report["kept"] / report["total"],
        "macs": report["macs"]["sparse"] / report["macs"]["dense"],
        "images": [report["images"]["forward"], report["images"]["backward"]],
        "allocating": pushed["allocate"],
        "seconds": round(seconds, 1),
        "chosen": search.get("chosen"),
        "best": search.get("best"),
    }


def rank(net: str, sparsity: float) -> dict[str, Any]:
    """Allocations with their one-shot loss, their loss by the default fitness, and their test score once repaired."""
    torch.set_num_threads(1)
    data, budget = zoo.data(net, "calibration"), allot.Budget(sparsity=sparsity)

    def pruned(**chain: Any) -> allot.Result:
        return allot.prune(zoo.model(net), data, budget, **chain)

    allocations: dict[str, dict[str, float]] = {}
    for name in RANKED:
        if name.startswith("erk x"):
            draw = torch.Generator().manual_seed(int(name[-1]))
            factors = torch.exp(0.5 * torch.randn(len(allocations["erk"]), generator=draw)).tolist()
            scaled = dict(zip(allocations["erk"], factors, strict=True))
            given = {layer: min(1.0, d * scaled[layer]) for layer, d in allocations["erk"].items()}
            allocations[name] = dict(pruned(allocate=given, repair="none").allocation)
        else:
            allocations[name] = dict(pruned(allocate=name, repair="none").allocation)
    found: dict[str, Any] = {name: {} for name in allocations}
    for fitness, method in (("one-shot", "unipts-paper"), ("short repair", "unipts-search")):
        starts = tuple((name, Rule(Given(d))) for name, d in allocations.items())
        search = replace(allot.METHODS[method], starts=starts, generations=0, population=1, excess=1.0, relative=True)
        tried = pruned(allocate=search, repair="none").report()["diagnostics"]["search"]["tried"]
        for row in tried:
            found[row["name"]][fitness] = row["losses"][-1]
    for name, allocation in allocations.items():
        result = pruned(allocate=allocation, repair="unipts,bn")
        found[name]["score"] = allot.evaluate(result.model(), zoo.data(net, "test")).score
    return found


def page(found: Found) -> str:
    """docs/unipts-results.md."""
    lines = [
        "# Results: UniPTS and POT",
        "",
        f"Made by `python -m benchmarks.unipts` (torch {torch.__version__.split('+')[0]}, CPU, one thread a run).",
        "",
        "Top-1 on the held-out test split after the last step, in percent, and negative log-likelihood (nll) in nats:",
        "mean ± standard deviation over three seeds (draw and order of 512 unlabelled calibration images). A row says",
        "*allocation + repair*; rows of one repair stand together, uniform densities first as their control.",
        "*unipts* trains 250 steps, the budget coming down from eight times as much (`--repair unipts,bn`); *fcpts* is",
        "the same training with densities learned in it; *fcpts + unipts* trains twice as long. Images are samples",
        "pushed forward / backward through a whole net, in thousands, those of the search included; *layerwise* sends",
        "nothing backward through a whole net.",
        "",
        f"Dense: {', '.join(f'{net} {dense(net)}' for net in NETS)}.",
        "",
    ]
    for sparsity in (0.8, 0.9, 0.95, 0.98):
        rows = {name: f"{sparsity} {name}" for name in CHAINS}
        if scores := table(found, rows, NETS):
            lines += [f"## {100 * sparsity:.0f} % of the weights gone", "", *scores, "", *_costs(found, rows), ""]
            lines += [*_gains(found, sparsity), ""]
    rows = {f"{s} {name}": f"{s} {name}" for s in (0.95, 0.98) for name in ("erk + unipts", "unipts", *SEARCHES)}
    if any(f"{net} {s} {name} 0" in found for net in NETS for s in (0.95, 0.98) for name in SEARCHES):
        lines += [
            "## Does a search pay?",
            "",
            "The same repair after each. *Allocating*: images that the search costs.",
            "",
        ]
        lines += [*table(found, rows, NETS), "", *_costs(found, rows, allocating=True), ""]
    lines += _ranking(found)
    names = {n: f"0.95 ablation {n}" if changed else "0.95 unipts" for n, changed in ABLATION.items()}
    names |= {"search off (erk)": "0.95 erk + unipts"}
    if scores := table(found, names, ABLATED):
        lines += [
            "## Ablation",
            "",
            "95 %, one thing changed at a time; options as in `benchmarks/unipts.py`.",
            "",
            *scores,
            "",
        ]
    return "\n".join(lines)


def _costs(found: Found, rows: Mapping[str, str], *, allocating: bool = False) -> list[str]:
    """Params and MACs kept, images and seconds: per net of the first seed, images and seconds as means over nets."""
    more = " allocating, thousands |" if allocating else ""
    lines = [f"| | params kept | MACs kept ({' / '.join(NETS)}) | images, thousands | seconds |{more}"]
    lines.append("|---|--:|--:|--:|--:|" + ("--:|" if allocating else ""))
    for shown, name in rows.items():
        runs = [found[key] for net in NETS if (key := f"{net} {name} {SEEDS[0]}") in found]
        if len(runs) == len(NETS):
            kept = 100 * statistics.mean(run["kept"] for run in runs)
            macs = " / ".join(f"{100 * run['macs']:.1f}" for run in runs)
            words = [_thousands(runs, "images"), *([_thousands(runs, "allocating")] if allocating else [])]
            seconds = statistics.mean(run["seconds"] for run in runs)
            cost = " | ".join([words[0], f"{seconds:.0f}", *words[1:]])
            lines.append(f"| {shown} | {kept:.1f} % | {macs} % | {cost} |")
    return lines


def _thousands(runs: list[dict[str, Any]], what: str) -> str:
    return " / ".join(f"{statistics.mean(run[what][i] for run in runs) / 1000:.1f}" for i in (0, 1))


def _gains(found: Found, sparsity: float) -> list[str]:
    """Paired differences, seed by seed."""
    lines = []
    pairs = [("unipts", other) for other in ("uniform + unipts", "erk + unipts", "pot", "fcpts")]
    for name, control in (*pairs, ("pot", "uniform + pot")):
        parts = []
        for net in NETS:
            ours, theirs = (values(found, net, f"{sparsity} {n}") for n in (name, control))
            parts.append([a - b for a, b in zip(ours, theirs, strict=False)])
        if all(parts):
            mean = statistics.mean(statistics.mean(part) for part in parts)
            shown = ", ".join(f"{net} {cell(part, signed=True)}" for net, part in zip(NETS, parts, strict=True))
            lines.append(f"- {name} minus {control}, paired by seed: {shown}; mean {mean:+.1f}.")
    return lines


def _ranking(found: Found) -> list[str]:
    rows = []
    for net in ABLATED:
        if told := found.get(f"{net} 0.98 rank"):
            score = [row["score"] for row in told.values()]
            cells = []
            for fitness in ("one-shot", "short repair"):
                loss = [-row[fitness] for row in told.values()]
                best = max(told, key=lambda name, fitness=fitness: -told[name][fitness])
                cells.append(f"{spearman(loss, score):+.2f} | {best}, {100 * told[best]['score']:.1f}")
            best = max(told, key=lambda name: told[name]["score"])
            rows.append(f"| {net} | {len(told)} | {' | '.join(cells)} | {best}, {100 * told[best]['score']:.1f} |")
    if not rows:
        return []
    return [
        "## What a fitness knows",
        "",
        "98 %: Spearman's rank correlation of a fitness with test top-1 after the full repair, over the allocations",
        f"{', '.join(RANKED)} (seed 0); what it would choose, and the best there is.",
        "",
        "| | allocations | one-shot | it chooses | short repair | it chooses | best |",
        "|---|--:|--:|---|--:|---|---|",
        *rows,
        "",
    ]


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation of two lists without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (one, other)]
    return statistics.correlation(*ranks)


def main() -> None:
    """Measure what is missing, write the page and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unipts", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("all", "main", "ablation", "rank", "search", "none"), default="all")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("docs/unipts-results.md"))
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/measured/unipts.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    found = measured(((key, rest) for key, *rest in cells(options.only)), measure, options.cache, options.workers)
    if options.only in ("all", "rank"):
        jobs = [(f"{net} 0.98 rank", (net, 0.98)) for net in ABLATED]
        found = measured(jobs, rank, options.cache, options.workers)
    options.out.write_text(page(found))
    for about in (Path("docs/methods/unipts.md"), Path("docs/methods/pot.md")):
        for sparsity in (0.95, 0.98):
            rows = {name: f"{sparsity} {name}" for name in CHAINS}
            fill(about, f"{100 * sparsity:.0f} %", table(found, rows, NETS))
    unipts_pictures.draw(found, Path("docs/pictures"))


if __name__ == "__main__":
    main()
