"""Does a run depend on the number of processes? The same commands under torchrun: `python -m benchmarks.processes`.

Each chain is run with 1, 2 and 4 gloo processes, trainings shortened to 20 steps, and fcpts in full length as well. A
row says whether all layers keep the same counts, how far a tensor of weights is from that of one process at most, as a
share of its length, and the score on the test split. Fills docs/processes.md. Seconds are no benchmark: on a machine of
two cores, four processes cost more than they bring.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import allot
from benchmarks.runs import fill

NET = "zoo:digits-resnet20"
PAGE = Path("docs/processes.md")
CHAINS = {
    "erk, bn": "--method erk --repair bn --budget sparsity=0.9",
    "fcpts": "--method fcpts --budget sparsity=0.9 --set options.fcpts.steps=20",
    "unipts": (
        "--method unipts --budget sparsity=0.9 --set options.unipts.steps=20 "
        "--set options.unipts-search.starts=[erk,uniform] --set options.unipts-search.population=4 "
        "--set options.unipts-search.generations=1 --set options.unipts-search.steps=4"
    ),
    "dsa": "--method dsa --budget macs=50% --set options.dsa.steps=20 --set options.distill.steps=20",
    "pot": "--method pot --budget sparsity=0.7 --set options.layerwise.steps=20",
    "fcpts, 250 steps": "--method fcpts --budget sparsity=0.9",
}


def run(chain: str, count: int, out: Path) -> dict[str, Any]:
    """Report and tensors of a run by so many processes."""
    started = time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "allot"]
    asked = f"prune {NET} --data {NET} --samples 128 --batch-size 32 {CHAINS[chain]} --out {out}"
    subprocess.run([*torchrun, *asked.split()], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    report = json.loads((out / "report.json").read_text())
    layers = json.loads((out / "allocation.json").read_text())["layers"]
    return {
        "kept": {name: row["kept"] for name, row in layers.items()},
        "score": 100 * report["scores"]["sparse"],
        "seconds": time.monotonic() - started,
        "state": {name: value.double() for name, value in allot.load(out).items() if value.is_floating_point()},
    }


def compared(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, float]:
    """(layers that keep other counts, largest distance of a tensor as a share of its length)."""
    differing = sum(one["kept"][name] != other["kept"][name] for name in one["kept"])
    apart = [float((other["state"][n] - v).norm() / v.norm().clamp_min(1e-12)) for n, v in one["state"].items()]
    return differing, max(apart)


def main() -> None:
    """Run what is missing, print the table, and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes, the first to compare with")
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    given = parser.parse_args()
    counts = [int(count) for count in given.processes.split(",")]
    lines = [
        "| chain | processes | layers with other counts | farthest tensor | top-1 |",
        "|---|---|---|---|---|",
    ]
    for chain in CHAINS:
        first: dict[str, Any] = {}
        for count in counts:
            found = run(chain, count, given.out / f"{chain.replace(', ', '-').replace(' ', '-')}-{count}")
            first = first or found
            differing, apart = compared(first, found)
            lines.append(
                f"| {chain} | {count} | {differing} of {len(first['kept'])} | {apart:.1e} | {found['score']:.1f} |"
            )
            logging.info("%s %.0f s", lines[-1], found["seconds"])
    fill(PAGE, "processes", lines)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
