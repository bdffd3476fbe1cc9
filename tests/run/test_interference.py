"""What happens to a run directory from outside while a run is stopped or under way: no wrong result, one line."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from allot.errors import Stopped, UsageError
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.run.driver import interruptible
from contract.cases import CASES

CASE = CASES["with batch norm"]


def chain(run: Path, **other: Any) -> Result:
    return prune(CASE.make(), CASE.inputs(), "sparsity=0.7", repair="bn", batch_size=8, save_to=run, **other)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    asked = iter([False] * 3)
    with pytest.raises(Stopped):
        chain(tmp_path / "run", should_stop=lambda: next(asked, True))
    return next((tmp_path / "run").glob("state-*.pt"))


def test_any_flipped_bit_of_a_state_is_refused(stopped: Path):
    """torch loads most of such files and checks no sum: weights would differ, and nothing would say so."""
    whole, draw = stopped.read_bytes(), random.Random(0)
    for _ in range(12):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        stopped.write_bytes(content)
        with pytest.raises(UsageError, match=r"state-.*(cannot be read|another version).*[Dd]elete"):
            chain(stopped.parent)
    stopped.write_bytes(whole)
    assert chain(stopped.parent).verify()["passed"]


def test_the_seal_of_a_state_is_the_comment_of_an_archive_that_torch_reads(stopped: Path):
    assert len(zipfile.ZipFile(stopped).comment) == 64 and torch.load(stopped, weights_only=True)["stage"]


class Evil:
    """Runs when it is unpickled."""

    ran: ClassVar[list[int]] = []

    def __reduce__(self) -> Any:
        return Evil.ran.append, (1,)


@pytest.mark.parametrize("how", ["pickle", "in torch", "beside the tensors"])
def test_a_pickle_in_the_place_of_a_state_is_refused_and_not_run(stopped: Path, how: str):
    content = torch.load(stopped, weights_only=True)
    if how == "pickle":
        stopped.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save(Evil() if how == "in torch" else {**content, "state": {**content["state"], "x": Evil()}}, stopped)
    with pytest.raises(UsageError, match="cannot be read"):
        chain(stopped.parent)
    assert Evil.ran == []


def test_a_state_of_another_run_is_refused(stopped: Path, tmp_path: Path):
    """Of the same model and budget: it would fit, and be the state of other choices."""
    asked = iter([False] * 3)
    with pytest.raises(Stopped):
        chain(tmp_path / "other", seed=1, should_stop=lambda: next(asked, True))
    shutil.copy(stopped, tmp_path / "other" / stopped.name)
    with pytest.raises(UsageError, match="comes from another run"):
        chain(tmp_path / "other", seed=1)


def test_a_clock_that_goes_back_changes_nothing(stopped: Path, tmp_path: Path):
    """A kill left an earlier stage's state behind, which the clock makes look newer; all times are in the future."""
    chain(tmp_path / "whole")
    saved = stopped.read_bytes()
    asked = iter([False] * 5)
    with pytest.raises(Stopped):
        chain(stopped.parent, should_stop=lambda: next(asked, True))
    stopped.write_bytes(saved)
    for path in stopped.parent.iterdir():
        os.utime(path, (4e9, 4e9 + (path == stopped)))
    chain(stopped.parent)
    for name in ("model.safetensors", "allocation.json", "steps.jsonl"):
        assert (stopped.parent / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_directory_that_is_deleted_meanwhile_is_one_line(tmp_path: Path, step: int):
    run, steps = tmp_path / "run", 0

    def delete(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            shutil.rmtree(run)

    with pytest.raises(UsageError, match=r"cannot write .*: (No such file or directory|there is no folder)"):
        chain(run, on_step=delete)
    assert not run.exists()


def test_a_directory_that_is_deleted_before_it_stops_is_one_line(tmp_path: Path):
    def delete() -> bool:
        shutil.rmtree(tmp_path / "run")
        return True

    with pytest.raises(UsageError, match=r"cannot write .*: (No such file or directory|there is no folder)"):
        chain(tmp_path / "run", should_stop=delete)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_stops_a_run_unless_it_is_ignored(number: signal.Signals):
    with interruptible() as should_stop:
        os.kill(os.getpid(), number)
        assert should_stop()
    before = signal.signal(number, signal.SIG_IGN)  # as under nohup
    try:
        with interruptible() as should_stop:
            os.kill(os.getpid(), number)
            assert not should_stop()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
