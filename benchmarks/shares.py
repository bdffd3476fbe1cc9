"""Which sparsity per layer goes with the repair admm: `python -m benchmarks.shares`.

Rows are allocations, each followed by admm alone, which starts from the dense weights; uniform and erk are controls.
`fcpts` learns its densities in 40 steps of training. `layer-errors` comes with each of its weightings. Nets of the zoo
are measured as by `benchmarks.layerwise`, others (`--nets crepe lite0 face`) as by `benchmarks.field`; both keep
their cells, so that a stopped command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allot.methods.layer_errors import WEIGHTINGS
from benchmarks import field, layerwise
from benchmarks.runs import SEEDS

REAL = (*field.LOADERS, "face")
ALLOCATIONS: dict[str, dict[str, Any]] = {  # row -> arguments of `allot.prune`
    **{name: {"allocate": name, "repair": "admm"} for name in ("uniform", "erk", "depth", "owl")},
    **{
        f"layer-errors, {weighting}": {
            "allocate": "layer-errors",
            "repair": "admm",
            "options": {"layer-errors": {"weighting": weighting}},
        }
        for weighting in WEIGHTINGS
    },
    "fcpts, 40 steps": {"allocate": "fcpts", "repair": "admm", "options": {"fcpts": {"steps": 40}}},
}


def commands(options: argparse.Namespace) -> list[tuple[Any, list[str]]]:
    """(the benchmark that measures them, its arguments), for nets of the zoo and for others."""
    rows = ["--methods"]  # none of the usual ones
    for name in options.allocations:
        rows += ["--chain", f"{name} + admm={json.dumps(ALLOCATIONS[name])}"]
    rows += ["--seeds", *map(str, options.seeds)]
    budgets = [str(sparsity) for sparsity in options.sparsity or ()]
    zoo, real = ([net for net in options.nets if (net in REAL) is is_real] for is_real in (False, True))
    found: list[tuple[Any, list[str]]] = []
    if zoo:
        more = ["--workers", str(options.workers), "--cache", str(options.cache)]
        more += ["--sparsity", *budgets] if budgets else []
        found.append((layerwise, ["--nets", *zoo, *rows, *more]))
    if real:
        more = ["--side", str(options.side), "--out", str(options.out)]
        more += ["--photos", str(options.photos)] if options.photos else []
        more += ["--budget", *budgets] if budgets else []
        found.append((field, ["--nets", *real, *rows, *more]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shares",
        description=__doc__,
        epilog=field.PACKAGES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nets", nargs="+", choices=[*layerwise.NETS, *REAL], default=layerwise.NETS)
    parser.add_argument("--sparsity", nargs="+", type=float, help="like 0.9; each kind of net has its own by default")
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time of the zoo's nets, one thread each")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/measured/shares.json"))
    parser.add_argument("--photos", type=Path, help="folder of photographs, for lite0")
    parser.add_argument("--side", type=int, default=128, help="pixels of a crop, for lite0")
    parser.add_argument("--out", type=Path, default=Path("runs/shares"), help="cells of the other nets")
    options = parser.parse_args(arguments)
    return max((benchmark.main(given) or 0 for benchmark, given in commands(options)), default=0)


if __name__ == "__main__":
    sys.exit(main())
