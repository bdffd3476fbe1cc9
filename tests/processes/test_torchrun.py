"""The command under torchrun: a process that dies ends all with one error, and one process alone goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allot.errors import Lost
from allot.run.driver import interruptible
from cli.command import done

ASKED = (
    "prune zoo:digits-resnet20 --data zoo:digits-resnet20 --budget sparsity=0.9 --method fcpts --samples 32 "
    "--batch-size 16 --set options.fcpts.steps=40"
)


def children(parent: int) -> dict[int, int]:
    """Rank -> process id of what torchrun started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            environment = dict(
                line.split("=", 1) for line in (entry / "environ").read_text().split("\0") if "=" in line
            )
        except OSError:
            continue
        if int(stat[1]) == parent and "RANK" in environment:
            found[int(environment["RANK"])] = int(entry.name)
    return found


def test_a_killed_process_ends_all_with_one_error_and_one_process_goes_on(tmp_path: Path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "allot", *ASKED.split()]
    alive = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alive
    ) as torchrun:
        until = time.monotonic() + 120
        while time.monotonic() < until and torchrun.poll() is None:
            if list(out.glob("state-allocate.pt")) and (out / "steps.jsonl").read_text().count("\n") > 2:
                break
            time.sleep(0.02)
        ranks = children(torchrun.pid)
        assert sorted(ranks) == [0, 1], torchrun.communicate()
        os.kill(ranks[1], signal.SIGKILL)
        said, errors = torchrun.communicate(timeout=120)
    assert torchrun.returncode != 0 and not said
    own = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(own) == 1 and "another process of this run ended" in own[0], errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())
    assert done(f"{ASKED} --out {out} --json").json["kept"] > 0
    assert done(f"verify {out} --json").json["passed"]


def test_the_end_that_torchrun_sends_does_not_cut_off_the_error():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Lost), interruptible():
            raise Lost("gone")
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGTERM) == before
