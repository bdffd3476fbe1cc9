"""A run directory: whole files only, one owner, one configuration, and a way on from wherever a run stopped."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import allot.run.store
from allot.errors import Stopped, UsageError, VerificationError
from allot.methods import METHODS
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.run.store import Store, read_run, write
from contract.cases import CASES, bits
from export.damage import timeless

FILES = ("model.safetensors", "model.bitmask.safetensors", "allocation.json", "certificate.json", "steps.jsonl")
CASE = CASES["with batch norm"]


def chain(run: Path, **other: Any) -> Result:
    arguments = {"repair": "bn,variance", "batch_size": 8, "save_to": run} | other
    return prune(CASE.make(), CASE.inputs(), arguments.pop("budget", "sparsity=0.7"), **arguments)


def contents(run: Path) -> dict[str, bytes]:
    """Everything that does not depend on time: of the certificate, all but the digests of run.json and of the page."""
    return {name: (run / name).read_bytes() for name in FILES} | {"certificate.json": timeless(run)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("whole")
    chain(run)
    return contents(run)


def stopped(run: Path, steps: int) -> None:
    asked = iter([False] * steps)
    with pytest.raises(Stopped):
        chain(run, should_stop=lambda: next(asked, True))


# kill


class Killed(BaseException):
    """As good as a kill: nothing catches it."""


def test_a_run_killed_at_any_moment_that_writes_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
):
    """Dies before and after every rename, removal and line of steps.jsonl, one after the other."""
    steps = 0

    def fatal(function: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == deadly and not after:
                raise Killed
            result = function(*args, **kwargs)
            if steps == deadly:
                raise Killed
            return result

        return called

    deadly, deaths = 0, 0
    for after in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", fatal(Path.replace, after=after))
            patch.setattr(Store, "write_step", fatal(Store.write_step, after=after))
            patch.setattr(os, "truncate", fatal(os.truncate, after=after))
            for deadly in range(1, 60, 3):
                steps = 0
                run = tmp_path / f"{after}-{deadly}"
                try:
                    chain(run)
                    break
                except Killed:
                    deaths += 1
                deadly = -1
                chain(run)
                assert contents(run) == whole
                assert not [entry.name for entry in run.iterdir() if "state" in entry.name or "tmp" in entry.name]
    assert deaths > 15


def test_a_run_killed_half_way_through_a_file_keeps_the_file_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
):
    def half(content: Any, file: Any) -> None:
        file.write(b"half of a state")
        raise Killed

    stopped(tmp_path / "run", 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            chain(tmp_path / "run")
    chain(tmp_path / "run")
    assert contents(tmp_path / "run") == whole


def test_a_stopped_run_tells_so_and_goes_on(tmp_path: Path, whole: dict[str, bytes]):
    for steps in (0, 3, 1, 2):
        stopped(tmp_path / "run", steps)
        found = read_run(tmp_path / "run")
        assert found["state"] == "stopped" and set(found["seconds"]) <= {
            "allocate", "select", "repair-1-bn", "repair-2-variance",
        }  # fmt: skip
    chain(tmp_path / "run")
    assert contents(tmp_path / "run") == whole
    assert read_run(tmp_path / "run")["state"] == "done"


def test_a_failing_observer_leaves_a_run_that_goes_on(tmp_path: Path, whole: dict[str, bytes]):
    def fail(progress: Any) -> None:
        if progress.stage == "repair-1-bn":
            raise RuntimeError("the observer is broken")

    with pytest.raises(RuntimeError, match="observer") as caught:
        chain(tmp_path / "run", on_step=fail)
    assert caught.value.__notes__ == ["in stage 'repair-1-bn' of allot.prune"]
    chain(tmp_path / "run")
    assert contents(tmp_path / "run") == whole


def test_method_objects_resume_like_their_names(tmp_path: Path, whole: dict[str, bytes]):
    parts = {"allocate": METHODS["erk"], "repair": [METHODS["bn"], METHODS["variance"]]}
    asked = iter([False] * 12)
    with pytest.raises(Stopped):
        chain(tmp_path / "run", should_stop=lambda: next(asked, True), **parts)
    assert [path.name for path in (tmp_path / "run").glob("state-*")] == ["state-repair-2-variance.pt"]
    result = chain(tmp_path / "run")
    assert contents(tmp_path / "run") == whole
    assert (result.names.allocate, result.names.repair) == ("erk", ("bn", "variance"))


# once more


def test_a_finished_run_is_opened_and_returned(tmp_path: Path, whole: dict[str, bytes]):
    first = chain(tmp_path / "run", test=_labelled())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}

    def never(_: Any) -> None:
        raise AssertionError("a finished run made a step")

    again = chain(tmp_path / "run", test=_labelled(), on_step=never)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    assert again.report() == first.report()
    assert again.verify()["passed"] and contents(tmp_path / "run") == whole
    for name, value in first.state_dict().items():
        assert bits(again.state_dict()[name]) == bits(value), name
    x = CASE.inputs()
    assert torch.equal(first.model()(x), again.model()(x))


def _labelled() -> list[tuple[torch.Tensor, int]]:
    return [(x, i % 5) for i, x in enumerate(CASE.inputs())]


def test_kept_weights_that_are_zero_are_counted_when_a_run_is_opened_again(tmp_path: Path):
    case = CASES["zero weights"]
    first = prune(case.make(), case.inputs(), "sparsity=0.5", save_to=tmp_path / "run")
    again = prune(case.make(), case.inputs(), "sparsity=0.5", save_to=tmp_path / "run")
    assert again.allocation.kept == first.allocation.kept
    assert {name: int(mask.sum()) for name, mask in again.masks.items()} == first.allocation.kept


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.bitmask.safetensors", "certificate.json", "allocation.json"]
)
def test_a_finished_run_that_was_damaged_is_not_returned(tmp_path: Path, name: str):
    chain(tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(VerificationError, match="delete it and run again"):
        chain(tmp_path / "run")


def test_a_finished_run_without_its_report_says_so(tmp_path: Path):
    chain(tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(UsageError, match=r"report\.json cannot be read"):
        chain(tmp_path / "run")


def test_what_a_kill_left_behind_after_the_end_is_removed(tmp_path: Path):
    chain(tmp_path / "run")
    (tmp_path / "run" / "state-repair-2-variance.pt").write_bytes(b"late")
    chain(tmp_path / "run")
    assert not list((tmp_path / "run").glob("state-*"))


def test_what_a_kill_left_behind_while_it_wrote_is_removed(tmp_path: Path, whole: dict[str, bytes]):
    stopped(tmp_path / "run", 3)
    (tmp_path / "run" / ".run.json.123.tmp").write_bytes(b"half")
    chain(tmp_path / "run")
    assert contents(tmp_path / "run") == whole and not list((tmp_path / "run").glob(".*"))


# refused


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"budget": "sparsity=0.8"}, r"configuration\.budget\.sparsity was 0.7, is 0.8"),
        ({"budget": "macs=50%"}, r"configuration\.budget\.macs was None, is 50%"),
        ({"allocate": "uniform"}, r"configuration\.allocate was erk, is uniform"),
        ({"repair": "bn"}, r"configuration\.repair was"),
        ({"options": {"variance": {"limit": 3.0}}}, r"configuration\.hyperparameters\.repair\.1\.limit was"),
        ({"seed": 1}, r"configuration\.seed was 0, is 1"),
        ({"batch_size": 5}, r"configuration\.batch_size was 8, is 5"),
        ({"samples": 12}, r"configuration\.samples was 20, is 12.*fingerprint\.calibration was"),
        ({"score": "random"}, r"configuration\.score was magnitude, is random"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused_with_the_keys_that_differ(
    tmp_path: Path, change: dict[str, Any], key: str, finished: bool
):
    run = tmp_path / "run"
    if finished:
        chain(run)
    else:
        stopped(run, 3)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UsageError, match=key):
        chain(run, **change)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_another_model_or_other_data_are_refused(tmp_path: Path):
    stopped(tmp_path / "run", 3)
    model = CASE.make()
    arguments = {"repair": "bn,variance", "batch_size": 8, "save_to": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"fingerprint\.calibration was \w+, is \w+"):
        prune(model, CASE.inputs() + 1, "sparsity=0.7", **arguments)
    with torch.no_grad():
        model.out.bias[0] += 1
    with pytest.raises(UsageError, match=r"fingerprint\.model was \w+, is \w+"):
        prune(model, CASE.inputs(), "sparsity=0.7", **arguments)


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds other files and no run\.json"):
        chain(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_files_that_a_user_adds_to_a_run_are_left_alone(tmp_path: Path, whole: dict[str, bytes]):
    stopped(tmp_path / "run", 4)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    chain(tmp_path / "run")
    assert contents(tmp_path / "run") == whole and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UsageError, match="is a file, not a run directory"):
        chain(tmp_path / "run")
    with pytest.raises(UsageError, match="cannot make"):
        chain(tmp_path / "run" / "below")


def test_a_directory_in_use_is_refused_and_free_again_afterwards(tmp_path: Path):
    def intrude(progress: Any) -> None:
        with pytest.raises(UsageError, match="in use by another running allot"):
            chain(tmp_path / "run")

    chain(tmp_path / "run", on_step=intrude, budget="sparsity=0.7")
    chain(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no": "state"}'])
def test_a_run_json_that_is_none_is_refused(tmp_path: Path, text: str):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match="is no run directory"):
        chain(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a state" * 9])
def test_a_damaged_state_is_an_error_that_frees_the_directory(tmp_path: Path, damage: Callable[[bytes], bytes]):
    stopped(tmp_path / "run", 4)
    state = next((tmp_path / "run").glob("state-*.pt"))
    whole_state = state.read_bytes()
    state.write_bytes(damage(whole_state))
    for _ in range(2):  # the second time: the first left no lock
        with pytest.raises(UsageError, match=r"cannot be read: delete .* and start again"):
            chain(tmp_path / "run")
    state.write_bytes(whole_state)
    chain(tmp_path / "run")


def test_a_state_that_would_run_code_is_refused(tmp_path: Path):
    stopped(tmp_path / "run", 4)
    state = next((tmp_path / "run").glob("state-*.pt"))
    content = torch.load(state, weights_only=True)
    torch.save(content | {"more": Path("x")}, state)  # all that is read is there
    with pytest.raises(UsageError, match="cannot be read"):
        chain(tmp_path / "run")


def test_a_state_of_another_format_is_refused_with_both_formats(tmp_path: Path):
    stopped(tmp_path / "run", 4)
    state = next((tmp_path / "run").glob("state-*.pt"))
    content = torch.load(state, weights_only=True)
    del content["format"]  # as versions before 2 wrote it
    torch.save(content, state)
    with pytest.raises(UsageError, match=r"states of format 1, this one reads 4.*delete"):
        chain(tmp_path / "run")


# a full disk


def test_a_disk_that_is_full_at_any_file_is_one_line_and_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
):
    sync = os.fsync
    for full_at in (1, 2, 5, 6, 7, 8, 9, 10, 11, 12):
        run, syncs = tmp_path / str(full_at), 0

        def fill(descriptor: int, full_at: int = full_at) -> None:
            nonlocal syncs
            syncs += 1
            if syncs >= full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fill)
        with pytest.raises(UsageError, match=r"cannot write .*: No space left on device") as caught:
            chain(run)
        assert "\n" not in str(caught.value)
        assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
        for path in run.glob("*.json"):
            json.loads(path.read_text())
        monkeypatch.setattr(os, "fsync", sync)
        chain(run)
        assert contents(run) == whole


def test_a_disk_that_is_full_while_tensors_are_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Path.open

    class Full:
        """A file with room for the header."""

        def __init__(self, file: Any) -> None:
            self.file, self.written = file, 0

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            self.written += 1
            if self.written > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(content))

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        return Full(file) if mode == "wb" and "model.safetensors" in self.name else file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UsageError, match=r"cannot write .*model\.safetensors: .*No space left on device"):
        chain(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*model*"))


def test_a_full_disk_while_a_step_is_noted_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "steps.jsonl" and "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UsageError, match=r"cannot write .*steps\.jsonl: No space left"):
        chain(tmp_path / "run")


def test_the_first_file_of_a_run_that_cannot_be_written_frees_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(allot.run.store.os, "truncate", full)
        with pytest.raises(UsageError, match=r"cannot write .*: No space left on device"):
            chain(tmp_path / "run")
    chain(tmp_path / "run")


def test_written_files_have_the_rights_that_the_user_gives_new_files(tmp_path: Path):
    before = os.umask(0o027)
    try:
        chain(tmp_path / "run")
        write(tmp_path / "plain", "x")
    finally:
        os.umask(before)
    for path in [*(tmp_path / "run").iterdir(), tmp_path / "plain"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path.name


# figures


def test_scoring_is_no_part_of_the_samples_that_a_run_cost(tmp_path: Path):
    plain = chain(tmp_path / "plain").report()["images"]
    scored = chain(tmp_path / "scored", test=_labelled()).report()
    assert scored["images"] == plain == {"forward": 18 + 2 * 18, "backward": 0}
    assert scored["scores"]["samples"] == 20


def test_test_data_that_cannot_be_scored_is_refused_before_the_run(tmp_path: Path):
    seen: list[Any] = []
    with pytest.raises(UsageError, match=r"the labels are floating-point numbers \[20\]: top-1 needs whole numbers"):
        chain(tmp_path / "run", test=[(x, 0.5) for x in CASE.inputs()], on_step=seen.append)
    assert not seen and not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"does not run on inputs of shape \[20, 5\]"):
        chain(tmp_path / "run", test=[(torch.zeros(5), 0)] * 20)
    assert not (tmp_path / "run").exists()


def test_test_data_may_be_a_generator(tmp_path: Path):
    listed = chain(tmp_path / "a", test=_labelled()).report()["scores"]
    assert chain(tmp_path / "b", test=iter(_labelled())).report()["scores"] == listed


def test_steps_are_one_line_each_and_add_up(tmp_path: Path):
    result = chain(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines]
    assert sorted(set(stages), key=stages.index) == ["allocate", "select", "repair-1-bn", "repair-2-variance"]
    for stage in set(stages):
        numbers = [line["step"] for line in lines if line["stage"] == stage]
        assert numbers == list(range(1, len(numbers) + 1))
    assert sum(line["forward"] for line in lines) == result.log.forward
