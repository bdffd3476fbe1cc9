"""Cells of a benchmark that run in a process of their own, one file a cell, so that a stopped command resumes.

Seconds and memory of a cell are then its own. A module that has such cells defines `measure(asked) -> dict` and calls
`measured` with its name; `python -m MODULE --cell JSON` measures one.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

import allot
from allot.errors import AllotError, UsageError
from allot.run.store import write_json
from benchmarks.nets.net import Net
from benchmarks.runs import Found

log = logging.getLogger("allot")


def measured(module: str, cells: Mapping[str, Mapping[str, Any]], folder: Path) -> Found:
    """What `measure` of the module gives for every cell that succeeds; FOLDER/KEY.json holds it, and what was asked.

    Raises:
        UsageError: a file there was measured with other arguments, or a dense net fails.
    """
    found: Found = {}
    missing = []
    for key, asked in cells.items():
        file = folder / f"{key}.json"
        if not file.exists():
            missing.append(key)
            continue
        kept = json.loads(file.read_text())
        if kept["asked"] != dict(asked):
            differs = [name for name in asked if kept["asked"].get(name) != asked[name]]
            raise UsageError(f"{file} was measured with another {', '.join(differs)}: use another --out, or delete it.")
        found[key] = kept["found"]
    folder.mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(missing, 1):
        log.info("%d of %d: %s", number, len(missing), key)
        scratch = folder / key
        shutil.rmtree(scratch, ignore_errors=True)  # a run that resumes there would cost less than a whole one
        given = json.dumps({**cells[key], "scratch": str(scratch)})
        ran = subprocess.run([sys.executable, "-m", module, "--cell", given], stdout=subprocess.PIPE, text=True)
        if ran.returncode and cells[key].get("method") == "dense":
            raise UsageError(f"{key} failed, as its other cells would.")
        if ran.returncode:
            log.error("%s failed; the others follow", key)
            continue
        found[key] = json.loads(ran.stdout.splitlines()[-1])
        write_json(folder / f"{key}.json", {"asked": dict(cells[key]), "found": found[key]})
        shutil.rmtree(scratch, ignore_errors=True)
        log.info("%s: %s", key, found[key])
    return found


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]], cell: str) -> int:
    """Prints what a cell gives, as the last line; 1 with the error in one line where it has none."""
    try:
        sys.stdout.write(json.dumps(measure(json.loads(cell))) + "\n")
    except AllotError as error:
        log.error("%s", error)
        return 1
    return 0


def pruned(net: Net, budget: str, chain: Mapping[str, Any], scratch: Path, seed: int, **more: Any) -> dict[str, Any]:
    """Scores of the net after `allot.prune(**chain)`, and what this cost until all files of its run were written."""
    given = {"samples": len(net.calibration), "rules": allot.Rules(**net.rules), "save_to": scratch, **more, **chain}
    with spending() as spent:
        result = allot.prune(net.model, net.calibration, budget, seed=seed, label=net.name, **given)
    report = result.report()
    images = [report["images"]["forward"], report["images"]["backward"]]
    return {**net.measure(result.model()), **spent, "images": images, "kept": report["kept"] / report["total"]}


def log_to_stderr() -> None:
    """Progress and errors go to standard error; standard output holds the table, or the answer of a cell."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


@contextmanager
def spending() -> Iterator[dict[str, float]]:
    """CPU-seconds of this process and of ended children, seconds, and peak bytes resident; there when the block ends.

    `peak` is that of this process, what it held before included; `children` that of its largest child.
    """
    peak_from_here()
    found: dict[str, float] = {}
    started, spent = time.monotonic(), sum(os.times()[:4])
    yield found
    found["cpu"], found["seconds"] = sum(os.times()[:4]) - spent, time.monotonic() - started
    found["peak"] = resident("VmHWM")
    found["children"] = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def peak_from_here() -> None:
    """The peak that `resident("VmHWM")` gives counts from here (Linux), without memory that is free already."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, or "VmHWM" at the peak (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024
