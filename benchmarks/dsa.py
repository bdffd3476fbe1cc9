"""DSA and its controls, its ablation and real speed: `python -m benchmarks.dsa`.

Writes docs/dsa-results.md and the pictures of docs/methods/dsa.md.

Every run goes through `allot.prune` with names and options that anyone can give. Scores are top-1 and negative
log-likelihood on the held-out test split after the last step; nothing is chosen by them. Mean and spread (standard
deviation) over three seeds, which decide the draw of 512 calibration images and their order. What is measured is kept
in benchmarks/measured/dsa.json: an interrupted command goes on, and only what is missing there is run. About two hours
on two cores from nothing; `--only main` and the like do a part.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.logging import RichHandler

import allot
from allot.export.export import export
from allot.export.timing.clock import timed
from allot.pruning.from_scratch import JointTraining, train
from allot.sources import zoo
from allot.sources.zoo._catalogue import DATASETS, MODELS, normalise
from allot.sources.zoo.nets import resnet20
from benchmarks import dsa_pictures
from benchmarks.runs import SEEDS, Found, cell, counting, dense, fill, measured, table, values
from benchmarks.zoo.drawing import SOURCES, draw

NETS = ("digits-resnet20", "glyph-resnet20", "glyph-mobilenetv2")
SHARES = (70, 50, 30)
REPAIR = "lstsq,distill,bn"
SAME = {"pattern": "channels", "score": "scale"}
# rows of the main table: the same channel score, the same repair
CHAINS: dict[str, dict[str, Any]] = {
    "uniform": {"allocate": "uniform", **SAME},
    "global": {"allocate": "global-channels", **SAME},
    "sensitivity": {"allocate": "sensitivity", **SAME},
    "dsa": {"allocate": "dsa", **SAME},
}
REPAIRS = ("bn", "lstsq", "distill,bn", REPAIR)
ABLATION: dict[str, dict[str, Any]] = {
    "dsa": {},
    "lagrangian": {"hold": "lagrangian"},
    "admm": {"hold": "admm"},
    "sampled masks": {"sampled": True},
    "steepness 16 throughout": {"steepness": [16, 16]},
    "log importance": {"space": "log"},
    "as in the paper": {"hold": "admm", "space": "log", "sampled": True, "steepness": [1, 50], "rate": 0.1},
    "300 steps": {"steps": 300},
}
SCORES = ("scale", "magnitude", "taylor", "random")

Cell = tuple[str, str, int, str, dict[str, Any], int]  # key, net, share of MACs, repair, arguments of `prune`, seed


def cells(only: str) -> Iterator[Cell]:
    """Every run of a part, the hard budgets first."""
    if only in ("all", "main"):
        for share in reversed(SHARES):
            for seed in SEEDS:
                for net in NETS:
                    for name, chain in CHAINS.items():
                        yield f"{net} {share} {name} {seed}", net, share, REPAIR, chain, seed
    if only in ("all", "repair"):
        for net in NETS:
            for repair in REPAIRS[:-1]:
                for name in ("uniform", "dsa"):
                    yield f"{net} 30 {name} by {repair} 0", net, 30, repair, CHAINS[name], 0
    if only in ("all", "ablation"):
        for seed in SEEDS:
            for net in NETS[1:]:
                for name, changed in ABLATION.items():
                    if changed:
                        chain = {**CHAINS["dsa"], "options": {"dsa": changed}}
                        yield f"{net} 30 ablation {name} {seed}", net, 30, REPAIR, chain, seed
                for score in SCORES[1:]:
                    yield f"{net} 30 score {score} {seed}", net, 30, REPAIR, {**CHAINS["dsa"], "score": score}, seed


def measure(net: str, share: int, repair: str, chain: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One run: scores on test, what was kept, what it cost, in all and to allocate."""
    torch.set_num_threads(1)
    pushed, count = counting()
    started = time.monotonic()
    data = zoo.data(net, "calibration")
    budget = allot.Budget(macs=f"{share}%")
    result = allot.prune(zoo.model(net), data, budget, seed=seed, repair=repair, on_step=count, **chain)
    seconds = time.monotonic() - started
    report = result.report()
    score = allot.evaluate(result.slim(), zoo.data(net, "test"))
    return {
        "score": score.score,
        "nll": score.nll,
        "macs": report["macs"]["sparse"] / report["macs"]["dense"],
        "params": report["kept"] / report["total"],
        "images": [report["images"]["forward"], report["images"]["backward"]],
        "allocating": pushed["allocate"],
        "seconds": round(seconds, 1),
        "allocating_seconds": round(report["seconds"]["allocate"], 1),
        "density": dict(result.allocation),
    }


TRAINED = 4000  # steps of 64 pictures with which the zoo's nets were trained


def scratch(net: str, share: int, seed: int) -> dict[str, Any]:
    """Trained and allocated together from fresh weights, on the pictures and in the steps that the zoo's net had."""
    torch.set_num_threads(1)
    entry, source = MODELS[net], SOURCES[MODELS[net].data]
    bases = source.bases()["train"]
    order = torch.randperm(len(bases.labels), generator=torch.Generator().manual_seed(seed))
    cut = len(order) // 10
    parts = {"densities": order[:cut], "weights": order[cut:], "all": order}

    def batches(part: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        number = (seed * 3 + list(parts).index(part)) * 1_000_003 + k
        generator = torch.Generator().manual_seed(number)
        chosen = bases.at(parts[part][torch.randint(len(parts[part]), (64,), generator=generator)])
        return normalise(draw(chosen, source.jitter, generator), DATASETS[entry.data]), chosen.labels

    torch.manual_seed(seed)
    model = entry.net(entry.classes)
    found = train(model, batches, f"macs={share}%", recipe=JointTraining(steps=TRAINED), seed=seed)
    score = allot.evaluate(found.model, zoo.data(net, "test"))
    return {
        "score": score.score,
        "nll": score.nll,
        "macs": found.macs["slim"] / found.macs["dense"],
        "images": [found.images["forward"], found.images["backward"]],
        "seconds": round(found.seconds, 1),
    }


# name -> (what makes the net, shape of one picture, multiples of channels)
SPEED: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "digits-resnet20": (lambda: zoo.model("digits-resnet20"), (1, 16, 16), 1),
    "digits-resnet20, multiples of 4": (lambda: zoo.model("digits-resnet20"), (1, 16, 16), 4),
    "glyph-mobilenetv2, multiples of 8": (lambda: zoo.model("glyph-mobilenetv2"), (1, 16, 16), 8),
    "resnet20, width 64": (lambda: resnet20(10, width=64), (1, 32, 32), 1),
    "resnet20, width 64, multiples of 8": (lambda: resnet20(10, width=64), (1, 32, 32), 8),
    "resnet20, width 64, multiples of 16": (lambda: resnet20(10, width=64), (1, 32, 32), 16),
    "resnet20, width 128, multiples of 16": (lambda: resnet20(10, width=128), (1, 64, 64), 16),
}


def speed(name: str) -> dict[str, Any]:
    """Dense and slim at half of the MACs, in ONNX Runtime and in PyTorch, side by side in this process."""
    make, shape, step = SPEED[name]
    torch.manual_seed(0)
    model = make().eval()
    example = torch.randn(1, *shape)
    pattern = f"channels:{step}"
    result = allot.prune(model, None, "macs=50%", allocate="uniform", pattern=pattern, repair="none", example=example)
    slim = result.slim().eval()
    with tempfile.TemporaryDirectory() as folder:
        nets = {"dense": model, "slim": slim}
        opened = {n: export(net, example, Path(folder) / f"{n}.onnx") for n, net in nets.items()}
    found: dict[str, Any] = {"macs": result.report()["macs"]}
    for batch in (1, 64):
        x = torch.randn(batch, *shape)

        def plain(net: torch.nn.Module, x: torch.Tensor = x) -> Any:
            with torch.no_grad():
                return net(x)

        runs = {
            "onnx dense": lambda x=x: opened["dense"].run(x),
            "onnx slim": lambda x=x: opened["slim"].run(x),
            "torch dense": lambda: plain(model),
            "torch slim": lambda: plain(slim),
        }
        found[str(batch)] = timed(runs, seconds=10, least=7)
    return found


# name of SPEED -> (limit, runtime)
LATENCY: dict[str, tuple[str, str]] = {
    "digits-resnet20, multiples of 4": ("75%", "onnx"),
    "resnet20, width 64, multiples of 8": ("50%", "onnx"),
    "resnet20, width 64, multiples of 16": ("50%", "onnx:64"),
    "resnet20, width 64": ("50%", "torch"),
    "resnet20, width 128, multiples of 16": ("50%", "onnx"),
}


def latency(name: str) -> dict[str, Any]:
    """A budget of time: what the tables predicted, and what was measured end to end."""
    make, shape, step = SPEED[name]
    limit, runtime = LATENCY[name]
    torch.manual_seed(0)
    model = make().eval()
    result = allot.prune(
        model,
        None,
        f"latency={limit}",
        allocate="uniform",
        pattern=f"channels:{step}",
        repair="none",
        example=torch.randn(1, *shape),
        runtime=runtime,
    )
    report = result.report()
    timed_nets = report["diagnostics"]["latency"]["timed"]
    return {**report["latency"], "macs": report["macs"], "nets": timed_nets, "seconds": report["seconds"]}


def page(found: Found) -> str:
    """docs/dsa-results.md."""
    lines = [
        "# Results: DSA",
        "",
        f"Made by `python -m benchmarks.dsa` (torch {torch.__version__.split('+')[0]}, CPU, one thread a run).",
        "",
        "Top-1 on the held-out test split after the last step, in percent, and negative log-likelihood (nll) in nats,",
        "of the slim net: mean ± standard deviation over three seeds (draw and order of 512 unlabelled calibration",
        f"images). Every row is scored by |gamma| (`--score scale`) and repaired alike (`--repair {REPAIR}`):",
        "only the densities of the groups differ. Images are samples pushed forward / backward, in thousands.",
        "",
        f"Dense: {', '.join(f'{net} {dense(net)}' for net in NETS)}.",
        "",
    ]
    for share in SHARES:
        rows = {name: f"{share} {name}" for name in CHAINS}
        if scores := table(found, rows, NETS):
            lines += [f"## {share} % of the MACs", "", *scores, "", *_costs(found, rows), "", *_gains(found, share), ""]
    lines += _repairs(found)
    names = {n: f"30 ablation {n}" if changed else "30 dsa" for n, changed in ABLATION.items()}
    names |= {f"score {s}": f"30 score {s}" for s in SCORES[1:]}
    if len(scores := table(found, names, NETS[1:])) > 3:
        lines += ["## Ablation", "", "30 % of the MACs, one thing changed at a time.", "", *scores, ""]
        lines += [*_costs(found, names, NETS[1:]), ""]
    return "\n".join([*lines, *_scratch(found), *_speeds(found)])


def _costs(found: Found, rows: Mapping[str, str], nets: tuple[str, ...] = NETS) -> list[str]:
    """MACs and params kept per net, and what allocating cost: means over seeds and nets."""
    lines = [f"| | MACs, params kept ({' / '.join(nets)}) | allocating: images, thousands | allocating: seconds |"]
    lines.append("|---|--:|--:|--:|")
    for shown, name in rows.items():
        runs = [found[key] for net in nets if (key := f"{net} {name} {SEEDS[0]}") in found]
        if len(runs) == len(nets):
            kept = " / ".join(f"{100 * run['macs']:.1f}, {100 * run['params']:.1f}" for run in runs)
            images = " / ".join(f"{statistics.mean(run['allocating'][i] for run in runs) / 1000:.1f}" for i in (0, 1))
            seconds = statistics.mean(run["allocating_seconds"] for run in runs)
            lines.append(f"| {shown} | {kept} % | {images} | {seconds:.0f} |")
    return lines


def _gains(found: Found, share: int) -> list[str]:
    """Paired differences, seed by seed, and images against the greedy search's."""
    lines = []
    for other in ("uniform", "global", "sensitivity"):
        parts = []
        for net in NETS:
            ours, theirs = (values(found, net, f"{share} {n}") for n in ("dsa", other))
            parts.append([a - b for a, b in zip(ours, theirs, strict=False)])
        if all(parts):
            shown = ", ".join(f"{net} {cell(part, signed=True)}" for net, part in zip(NETS, parts, strict=True))
            lines.append(f"- dsa minus {other}, paired by seed: {shown}.")
    ratios = []
    for net in NETS:
        keys = [f"{net} {share} {name} {SEEDS[0]}" for name in ("dsa", "sensitivity")]
        if all(key in found for key in keys):
            ours, theirs = (sum(found[key]["allocating"]) for key in keys)
            ratios.append(f"{net} {ours / theirs:.2f}")
    return [*lines, f"- images of dsa over those of sensitivity, forward and backward added: {', '.join(ratios)}."]


def _repairs(found: Found) -> list[str]:
    rows = []
    for repair in REPAIRS:
        for name in ("uniform", "dsa"):
            word = f"30 {name} 0" if repair == REPAIR else f"30 {name} by {repair} 0"
            keys = [f"{net} {word}" for net in NETS]
            if all(key in found for key in keys):
                cells = [f"{100 * found[key]['score']:.1f} · {found[key]['nll']:.2f}" for key in keys]
                rows.append(f"| {name} + {repair} | {' | '.join(cells)} |")
    if not rows:
        return []
    heading = [f"| top-1 · nll | {' | '.join(NETS)} |", "|---|" + "--:|" * len(NETS)]
    return ["## What each repair does", "", "30 % of the MACs, seed 0.", "", *heading, *rows, ""]


def _scratch(found: Found) -> list[str]:
    rows = []
    for share in SHARES:
        for net in NETS:
            ours = values(found, net, f"{share} scratch")
            after = values(found, net, f"{share} dsa")
            if ours and after:
                runs = [found[f"{net} {share} {name} 0"] for name in ("scratch", "dsa")]
                spent = " | ".join(
                    f"{(extra + run['images'][0]) / 1000:.0f} / {(extra + run['images'][1]) / 1000:.0f}"
                    for run, extra in zip(runs, (0, 64 * TRAINED), strict=True)
                )
                rows.append(f"| {net}, {share} % | {cell(ours)} | {cell(after)} | {spent} |")
    if not rows:
        return []
    return [
        "## From scratch",
        "",
        f"`allot.pruning.from_scratch.train`: weights and densities together, {TRAINED:,} steps of 64,",
        "as many as the zoo's dense nets had. *After training*: those nets, then `dsa` as above. Thousands of images",
        "forward / backward, training of the dense net included.",
        "",
        "| MACs | from scratch | after training | images, from scratch | images, after training |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
    ]


def _speeds(found: Found) -> list[str]:
    rows = []
    for name in SPEED:
        if told := found.get(f"speed {name}"):
            cells = []
            for batch in ("1", "64"):
                for runtime in ("onnx", "torch"):
                    dense, slim = (told[batch][f"{runtime} {which}"] for which in ("dense", "slim"))
                    cells.append(f"{1000 * dense:.2f} → {1000 * slim:.2f} ms: {dense / slim:.2f}x")
            share = 100 * told["macs"]["sparse"] / told["macs"]["dense"]
            rows.append(f"| {name} | {share:.1f} % | {' | '.join(cells)} |")
    if not rows:
        return []
    budgets = []
    for name, (limit, runtime) in LATENCY.items():
        if told := found.get(f"latency {name}"):
            share = 100 * told["macs"]["sparse"] / told["macs"]["dense"]
            before, after = (100 * told[key] / told["dense_ms"] for key in ("predicted_ms", "sparse_ms"))
            budgets.append(
                f"| {name} | {runtime} | {limit} | {told['dense_ms']:.2f} | {before:.1f} % | {after:.1f} % "
                f"| {share:.1f} % | {told['nets']} | {sum(told['seconds'].values()):.0f} |"
            )
    if budgets:
        budgets = [
            "## Budgets of time",
            "",
            "`latency=LIMIT`, uniform densities: the prediction of the tables after one net was timed, the time of the",
            "slim net end to end, measured again beside the dense one. *Nets* were timed, at most six, till one used",
            "the limit up; other work ran on the machine meanwhile, which shows where measurement and limit differ.",
            "",
            "| | runtime | limit | dense, ms | predicted | measured | MACs kept | nets | seconds |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|",
            *budgets,
            "",
        ]
    return [
        "## Faster for real?",
        "",
        "Half of the MACs, uniform densities; dense and slim taken in turn in one process: median milliseconds.",
        "ONNX Runtime computes channels in blocks: a count that is no multiple of one can cost more than it saves.",
        "",
        "| | MACs kept | ONNX Runtime, batch 1 | PyTorch, batch 1 | ONNX Runtime, batch 64 | PyTorch, batch 64 |",
        "|---|--:|--:|--:|--:|--:|",
        *rows,
        "",
        *budgets,
    ]


def main() -> None:
    """Measure what is missing, write the page and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dsa", description=__doc__.splitlines()[0])
    parts = ("all", "main", "repair", "ablation", "scratch", "speed", "latency", "none")
    parser.add_argument("--only", choices=parts, default="all")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("docs/dsa-results.md"))
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/measured/dsa.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    found = measured(((key, rest) for key, *rest in cells(options.only)), measure, options.cache, options.workers)
    if options.only in ("all", "scratch"):
        jobs = [(f"{net} {s} scratch {seed}", (net, s, seed)) for seed in SEEDS for s in (50, 30) for net in NETS[:2]]
        found = measured(jobs, scratch, options.cache, options.workers)
    if options.only in ("all", "speed"):
        jobs = [(f"speed {name}", (name,)) for name in SPEED]
        found = measured(jobs, speed, options.cache, 1)  # alone on the machine, as far as that goes
    if options.only in ("all", "latency"):
        jobs = [(f"latency {name}", (name,)) for name in LATENCY]
        found = measured(jobs, latency, options.cache, 1)
    options.out.write_text(page(found))
    fill(Path("docs/methods/dsa.md"), "30 %", table(found, {name: f"30 {name}" for name in CHAINS}, NETS))
    dsa_pictures.draw(found, Path("docs/pictures"))


if __name__ == "__main__":
    main()
