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

    A cell that fails is kept with the reason, and measured again by the next command.

    Raises:
        UsageError: a file there was measured with other arguments, or a dense net fails.
    """
    found, _ = kept(cells, folder)
    missing = [key for key in cells if key not in found]
    folder.mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(missing, 1):
        log.info("%d of %d: %s", number, len(missing), key)
        scratch = folder / key
        shutil.rmtree(scratch, ignore_errors=True)  # a run that resumes there would cost less than a whole one
        given = json.dumps({**cells[key], "scratch": str(scratch)})
        ran = subprocess.run([sys.executable, "-m", module, "--cell", given], stdout=subprocess.PIPE, text=True)
        if ran.returncode:
            reason = _reason(ran.stdout, ran.returncode)
            write_json(folder / f"{key}.json", {"asked": dict(cells[key]), "failed": reason})
            if cells[key].get("method") == "dense":
                raise UsageError(f"{key} failed, as its other cells would: {reason}")
            log.error("%s failed; the others follow: %s", key, reason)
            continue
        found[key] = json.loads(ran.stdout.splitlines()[-1])
        write_json(folder / f"{key}.json", {"asked": dict(cells[key]), "found": found[key]})
        shutil.rmtree(scratch, ignore_errors=True)
        log.info("%s: %s", key, found[key])
    return found


def kept(cells: Mapping[str, Mapping[str, Any]], folder: Path) -> tuple[Found, dict[str, str]]:
    """(what was measured, why it failed) of the cells that have a file in the folder.

    Raises:
        UsageError: a cell there was measured with other arguments.
    """
    found: Found = {}
    failed: dict[str, str] = {}
    for key, asked in cells.items():
        file = folder / f"{key}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        if "failed" in content:
            failed[key] = content["failed"]
            continue
        if differs := [name for name in asked if content["asked"].get(name) != asked[name]]:
            raise UsageError(f"{file} was measured with another {', '.join(differs)}: use another --out, or delete it.")
        found[key] = content["found"]
    return found, failed


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]], cell: str) -> int:
    """Prints what a cell gives, or why it failed, as the last line; returns 0, 1 where it failed, 130 if stopped."""
    try:
        found = measure(json.loads(cell))
    except KeyboardInterrupt:  # the command that started the cell says so
        return 130
    except AllotError as error:
        log.error("%s", error)
        found = {"failed": str(error)}
    except Exception as error:  # a net of others may raise anything
        log.exception("the cell failed")
        found = {"failed": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found) + "\n")
    return int("failed" in found)


def _reason(printed: str, code: int) -> str:
    """Why a cell failed, in one line: its own words where it came to say them."""
    try:
        return " ".join(json.loads(printed.splitlines()[-1])["failed"].split())
    except (IndexError, TypeError, KeyError, ValueError):
        return f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def pruned(net: Net, budget: str, chain: Mapping[str, Any], scratch: Path, seed: int, **more: Any) -> dict[str, Any]:
    """Scores of the net after `allot.prune(**chain)`, and what this cost until all files of its run were written.

    `fidelity` is that of the run's end on the inputs that it watched, `guard` what the guard did, in sentences.
    """
    given = {"samples": len(net.calibration), "rules": allot.Rules(**net.rules), "save_to": scratch, **more, **chain}
    with spending() as spent:
        result = allot.prune(net.model, net.calibration, budget, seed=seed, label=net.name, **given)
    report = result.report()
    last = (report["fidelity"] or [{}])[-1]
    return {
        **net.measure(result.model()),
        **spent,
        "images": [report["images"]["forward"], report["images"]["backward"]],
        "kept": report["kept"] / report["total"],
        "fidelity": {name: last[name] for name in ("kl", "error", "agreement") if name in last},
        "guard": report["guard"],
    }


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
