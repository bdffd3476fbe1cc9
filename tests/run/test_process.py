"""Real processes: killed, interrupted, out of disk; then the same command again."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cli.command import done
from export.damage import timeless

ROOT = Path(__file__).resolve().parents[2]
FILES = ("model.safetensors", "model.bitmask.safetensors", "allocation.json", "certificate.json", "steps.jsonl")


def line(run: Path, steps: int = 80) -> str:
    return (
        "prune zoo:digits-resnet20 --data zoo:digits-resnet20 --budget sparsity=0.9 --samples 96 --batch-size 4 "
        f"--method fcpts --set options.fcpts.steps={steps} --out {run} --json"
    )


def start(run: Path, prepare: Callable[[], None] | None = None, steps: int = 80) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "allot", *line(run, steps).split()],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def finish(run: Path) -> dict[str, bytes]:
    report = done(line(run)).json  # in this process, which gives the same bits
    assert report["kept"] == round(0.1 * report["total"])
    return {name: (run / name).read_bytes() for name in FILES} | {"certificate.json": timeless(run)}


def wait_for(process: subprocess.Popen[str], run: Path) -> None:
    """Until this process writes steps."""
    started = time.time()
    while process.poll() is None:
        if (run / "steps.jsonl").exists() and (run / "steps.jsonl").stat().st_mtime > started + 0.2:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def killed_and_interrupted(run: Path, seed: int) -> tuple[int, int, str]:
    """(steps written before the signal, exit code, standard error) of a process that is interrupted after a kill."""
    process = start(run)
    wait_for(process, run)
    time.sleep(random.Random(seed).uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start(run)
    wait_for(process, run)
    steps = len((run / "steps.jsonl").read_text().splitlines())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    return steps, process.returncode, err


def test_a_run_that_is_killed_and_then_interrupted_ends_as_an_uninterrupted_one(tmp_path: Path):
    seed = random.randrange(10**6)
    for attempt in range(3):
        run = tmp_path / f"run-{attempt}"
        steps, code, err = killed_and_interrupted(run, seed)
        if code or steps < 70:  # of 80: on a busy machine the last one may be over before the signal comes
            break
    assert code == 130, err
    assert "same command goes on" in err and "Traceback" not in err
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"

    assert finish(run) == finish(tmp_path / "whole"), f"differs when killed by seed {seed}"


def test_a_process_that_may_not_write_large_files_says_so_in_one_line(tmp_path: Path):
    process = start(tmp_path / "run", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)), steps=8)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    *before, error = err.splitlines()  # before it, how far the run was
    assert error.startswith("error: ") and "cannot write" in error and "too large" in error
    assert all("loss" in line for line in before)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "steps.jsonl"} <= left and not [name for name in left if "tmp" in name or "model" in name]
