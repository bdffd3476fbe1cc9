"""A program can run any code when it is opened: its digests are checked, and it is opened only where it is trusted."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.export.certificate.certificate import verify
from allot.export.certificate.probe import ANSWERS, probe_of
from allot.export.certificate.rows import digest
from allot.export.export import export, export_run
from allot.export.files.formats import save_tensors, stored
from allot.export.runtimes.forms import FORMS
from cli.command import done, run
from export.damage import DAMAGES, damage

COMPARED = {"weights", "zeros", "macs", ANSWERS}


class Net(nn.Module):
    """Sizes that are computed, a gelu, two outputs in a dict, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = torch.cat([x, 2 * x])[: 2 * x.shape[0] - 1] * self.scale
        return {"a": nn.functional.gelu(self.head(both), approximate="tanh"), "b": both.reshape(-1, 2)}


class Evil:
    """Runs when it is unpickled."""

    ran: ClassVar[list[int]] = []

    def __reduce__(self) -> Any:
        return Evil.ran.append, (1,)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    export(Net().eval(), torch.randn(3, 4), path)
    return path


@pytest.fixture
def program(written: Path, tmp_path: Path) -> Path:
    shutil.copy(probe_of(written), tmp_path)
    return Path(shutil.copy(written, tmp_path))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of `torch.export.load`."""
    calls: list[int] = []
    load = torch.export.load

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch.export, "load", counted)
    return calls


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, change: Callable[[dict[str, bytes]], Any]) -> None:
    """Change entries of a program, and promise just that in its probe."""
    content = entries(path)
    change(content)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    tensors, promise = stored(probe_of(path))
    promise = {key: promise[key] for key in ("form", "counts", "inputs", "run")} | {"files": {"model": digest(path)}}
    save_tensors(probe_of(path), tensors, "probe", promise)


def of_program(rows: list[dict[str, Any]], name: str = "model.pt2") -> dict[str, dict[str, Any]]:
    return {row["check"]: row for row in rows if row["file"] == name}


@pytest.mark.parametrize("trust", [False, True])
def test_a_tampered_program_fails_before_it_is_opened(program: Path, loads: list[int], trust: bool):
    whole = program.read_bytes()
    for how in DAMAGES:
        damage(program, how)
        if how != "removed":
            found = verify(program, trust=trust)
            assert not found["passed"] and of_program(found["rows"])["sha256"]["passed"] is False
        program.write_bytes(whole)
    content = bytearray(whole)
    content[len(whole) // 2] ^= 1
    program.write_bytes(content)
    assert not verify(program, trust=trust)["passed"] and loads == []


def test_a_program_that_is_not_trusted_passes_by_its_digest_and_a_row_says_that_it_was_not_opened(
    program: Path, loads: list[int]
):
    found = verify(program)
    rows = of_program(found["rows"])
    assert found["passed"] and loads == [] and not COMPARED & rows.keys()
    assert rows["opens and answers"]["found"] == "not opened (--trust opens it)"


def test_a_program_that_is_trusted_is_opened_counted_and_asked(program: Path, loads: list[int]):
    found = verify(program, trust=True)
    rows = of_program(found["rows"])
    assert found["passed"] and loads == [1] and rows.keys() >= COMPARED and "opens and answers" not in rows
    tensors, promise = stored(probe_of(program))
    promise = {key: promise[key] for key in ("form", "files", "counts", "inputs", "run")}
    save_tensors(probe_of(program), {**tensors, "output.0": tensors["output.0"] + 1}, "probe", promise)
    assert verify(program)["passed"]
    failed = [row["check"] for row in verify(program, trust=True)["rows"] if not row["passed"]]
    assert failed == [ANSWERS]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickled_objects_in_a_program_that_is_not_trusted_do_not_run(program: Path, loads: list[int], protocol: int):
    def pickled(content: dict[str, bytes]) -> None:
        [name] = [name for name in content if name.endswith("sample_inputs/model.pt")]
        content[name] = pickle.dumps(Evil(), protocol)

    rewrite(program, pickled)
    assert verify(program)["passed"] and loads == [] and Evil.ran == []


def test_the_programs_of_a_run_are_opened_only_where_they_are_trusted(tmp_path: Path, loads: list[int]):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(4, 8)
    result = allot.prune(model, x, "sparsity=0.5", repair="none", save_to=tmp_path / "run")
    export_run(model, tmp_path / "run", result.report(), x[:1], "program")
    assert len(loads) == 2  # the program that was just written, and the dense one beside it
    for found in (verify(tmp_path / "run"), result.verify()):
        rows = of_program(found["rows"])
        assert found["passed"] and rows["opens and answers"]["found"] == "not opened (--trust opens it)"
        assert rows["sha256"]["passed"] and not COMPARED & rows.keys()
    assert len(loads) == 2
    found = verify(tmp_path / "run", trust=True)
    assert found["passed"] and len(loads) == 3 and of_program(found["rows"]).keys() >= COMPARED


def test_the_command_line_opens_a_program_where_it_is_told_to(
    program: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(program.parent)
    assert of_program(done("verify model.pt2 --json").json["rows"])["opens and answers"]["passed"] and loads == []
    assert of_program(done("verify --trust model.pt2 --json").json["rows"]).keys() >= COMPARED and loads == [1]
    program.write_bytes(program.read_bytes() + b"x")
    assert run("verify model.pt2").code == run("verify model.pt2 --trust").code == 4 and loads == [1]


def test_an_export_of_any_output_answers_for_other_batches(program: Path):
    [a, b] = FORMS["program"].open(program).run(torch.ones(5, 4))
    assert a.shape == (9, 2) and b.shape == (18, 2)


def test_a_program_does_not_tell_where_its_code_lies(program: Path):
    assert all(b"test_program.py" not in content and b"/" not in content for content in entries(program).values())
