"""Repairs that look at one layer at a time, on the nets of the zoo: `python -m benchmarks.layerwise`.

Every repair follows ERK densities, alone; `admm,distill` trains after admm; `uniform+REPAIR` is the control with
uniform densities. pot and fcpts are whole recipes with densities of their own. Top-1 and negative log-likelihood on
the held-out test split after the last step, nothing chosen by them; mean and spread over three seeds, which decide the
draw of 512 calibration images and their order. CPU-seconds of one core; images are pushed forward / backward through a
whole net, in thousands. Cells are kept in benchmarks/measured/layerwise.json, so that a stopped command resumes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import allot
from allot.sources import zoo
from benchmarks.apart import log_to_stderr, spending
from benchmarks.runs import CHAINS, SEEDS, Found, chains_of, dense, measured, table

NETS = ("digits-resnet20", "glyph-resnet20", "glyph-mobilenetv2", "glyph-vit")
SPARSITIES = (0.8, 0.9, 0.95)
METHODS = ("admm", "uniform+admm", "lstsq", "pot", "uniform+pot", "fcpts", "uniform+fcpts", "admm,distill")

Cell = tuple[str, tuple[str, float, dict[str, Any], int]]  # key, (net, sparsity, arguments of `prune`, seed)


def cells(
    nets: Sequence[str],
    sparsities: Sequence[float],
    chains: Mapping[str, dict[str, Any]],
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Cell]:
    """Every run, seed by seed, so that a stopped command has whole rows of the first seeds."""
    for seed in seeds:
        for sparsity in sparsities:
            for name, chain in chains.items():
                for net in nets:
                    yield f"{net} {sparsity} {name} {seed}", (net, sparsity, chain, seed)


def measure(net: str, sparsity: float, chain: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One run: test score, kept weights and MACs, CPU-seconds, images."""
    torch.set_num_threads(1)
    data, test = zoo.data(net, "calibration"), zoo.data(net, "test")
    with spending() as spent:
        result = allot.prune(zoo.model(net), data, allot.Budget(sparsity=sparsity), seed=seed, **chain)
    report, score = result.report(), allot.evaluate(result.model(), test)
    return {
        "score": score.score,
        "nll": score.nll,
        "kept": report["kept"] / report["total"],
        "macs": report["macs"]["sparse"] / report["macs"]["dense"],
        "images": [report["images"]["forward"], report["images"]["backward"]],
        "cpu": round(spent["cpu"], 2),
    }


def page(found: Found, nets: Sequence[str], sparsities: Sequence[float], methods: Sequence[str]) -> list[str]:
    """A table of scores and one of costs for each sparsity."""
    lines = [f"Dense: {', '.join(f'{net} {dense(net)}' for net in nets)}.", ""]
    for sparsity in sparsities:
        rows = {name: f"{sparsity} {name}" for name in methods}
        lines += [f"### {100 * sparsity:.0f} % of the weights gone", "", *table(found, rows, nets), ""]
        lines += ["| | MACs kept | images, thousands | CPU-s a net |", "|---|--:|--:|--:|"]
        for name, row in rows.items():
            runs = [found[key] for net in nets for seed in SEEDS if (key := f"{net} {row} {seed}") in found]
            if runs:
                macs = 100 * statistics.mean(run["macs"] for run in runs)
                images = " / ".join(f"{statistics.mean(run['images'][i] for run in runs) / 1000:.1f}" for i in (0, 1))
                cpu = statistics.mean(run["cpu"] for run in runs)
                lines.append(f"| {name} | {macs:.1f} % | {images} | {cpu:.0f} |")
        lines.append("")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layerwise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--methods", nargs="*", default=METHODS, help="repairs, ALLOCATOR+REPAIRS or recipes")
    parser.add_argument("--chain", action="append", default=[], metavar="NAME=JSON", help="a further method")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/measured/layerwise.json"))
    options = parser.parse_args(arguments)
    log_to_stderr()
    chains = chains_of(options.methods, CHAINS, {"allocate": "erk"}, options.chain)
    runs = cells(options.nets, options.sparsity, chains, options.seeds)
    found = measured(runs, measure, options.cache, options.workers)
    sys.stdout.write("\n".join(page(found, options.nets, options.sparsity, list(chains))) + "\n")


if __name__ == "__main__":
    main()
