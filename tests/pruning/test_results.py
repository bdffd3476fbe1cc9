"""What a result gives out: files for runtimes, each opened again, compared and timed beside the dense model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import allot
from allot.errors import UsageError
from allot.export.timing.clock import AS_DENSE, Speedup
from allot.report.table import speed
from contract.cases import CASES

CASE = CASES["with batch norm"]
exporting = sys.modules["allot.export.export"]  # a function hides the module


def result(save_to: Path | None = None, **settings: object) -> allot.Result:
    known = {"batch_size": 8, "repair": "none", "save_to": save_to, **settings}
    return allot.prune(CASE.make(), CASE.inputs(16), "sparsity=0.5", **known)


@pytest.mark.parametrize(
    ("name", "to", "form", "saved"),
    [
        ("x.onnx", None, "onnx", True),
        pytest.param("x.onnx", None, "onnx", False, marks=pytest.mark.slow),  # seconds; by the code of the next ones
        ("x.pt2", None, "program", True),
        ("x.pt2", None, "program", False),
        ("x.safetensors", None, "safetensors", True),
        ("x.safetensors", None, "safetensors", False),
        ("x", "bitmask", "bitmask", True),
        ("x", "bitmask", "bitmask", False),
    ],
)
def test_a_result_is_exported_by_the_ending_or_the_name_of_a_form(
    name: str, to: str | None, form: str, saved: bool, tmp_path: Path
):
    made = result(tmp_path / "run" if saved else None)
    row = made.export(tmp_path / name, to=to)
    assert row["form"] == form and row["bytes"] == (tmp_path / name).stat().st_size
    if form in ("safetensors", "bitmask"):
        assert row["milliseconds"] is row["faster"] is row["spread"] is None and row["verdict"] == "computes as dense"
    else:
        assert row["milliseconds"]["dense"] > 0 and row["spread"][0] <= row["spread"][1]
    assert allot.verify(tmp_path / name)["passed"]
    if saved:
        assert made.report()["exports"] == [row]
        assert json.loads((tmp_path / "run/report.json").read_text())["exports"] == [row]
    else:
        assert made.directory is None and made.report()["exports"] == []


def test_a_form_that_computes_the_dense_products_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, timed = result(tmp_path / "run"), []
    monkeypatch.setattr(
        exporting, "side_by_side", lambda *runs, **rest: timed.append(runs) or Speedup(3.0, 2.0, (1, 2))
    )
    for form in ("safetensors", "bitmask"):
        row = made.export(to=form)
        assert row["macs"] == row["dense_macs"] and row["verdict"] == "computes as dense" and not timed
    assert speed(made.report()) == dict.fromkeys(("speedup", "form", "dense_ms", "sparse_ms")) | {"verdict": AS_DENSE}
    made.export(to="program")
    assert len(timed) == 1 and speed(made.report())["speedup"] == 1.5


def test_without_a_path_the_file_is_in_the_run(tmp_path: Path):
    made = result(tmp_path / "run")
    row = made.export(to="bitmask")
    assert Path(row["file"]) == tmp_path / "run/model.bitmask.safetensors"
    again = result(tmp_path / "run")  # opened
    assert again.report()["exports"] == [row]
    other = made.export(to="onnx")
    assert [each["form"] for each in made.report()["exports"]] == ["bitmask", "onnx"] and other["form"] == "onnx"


def test_a_result_saved_anew_forgets_exports_of_what_was_there(tmp_path: Path):
    made = result(tmp_path / "run")
    made.export(to="bitmask")
    made.save(tmp_path / "run")
    assert made.report()["exports"] == []


def test_channels_are_exported_as_the_smaller_net(tmp_path: Path):
    made = allot.prune(CASE.make(), CASE.inputs(16), "macs=60%", allocate="uniform", pattern="channels", repair="none")
    row = made.export(tmp_path / "x.onnx")
    assert row["macs"] == made.report()["macs"]["sparse"] < row["dense_macs"] and row["params"] < row["dense_params"]


def test_what_cannot_be_exported_is_one_line(tmp_path: Path):
    made = result()
    with pytest.raises(UsageError, match="no place to write to"):
        made.export(to="onnx")
    with pytest.raises(UsageError, match="its ending says no form"):
        made.export(tmp_path / "x.bin")
    with pytest.raises(UsageError, match="form of export"):
        made.export(tmp_path / "x.bin", to="tflite")
    blind = allot.prune(CASE.make(), None, "sparsity=0.5", repair="none")
    with pytest.raises(UsageError, match="needs calibration data"):
        blind.export(tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


class Gradless(nn.Module):
    """Refuses to run with gradients, as a model that leaves PyTorch on its way does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CASE.make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.inner(x).numpy())


def test_a_model_that_runs_without_gradients_only_is_timed(tmp_path: Path):
    made = allot.prune(
        Gradless().eval(), CASE.inputs(16), "sparsity=0.5", batch_size=8, repair="none", save_to=tmp_path / "run"
    )
    assert [row["form"] for row in made.timed()["exports"]] == ["bitmask"] and made.verify()["passed"]


def test_what_cannot_be_timed_is_a_warning_and_a_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fails(*runs: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("no room")

    chain = {"allocate": "uniform", "pattern": "channels", "repair": "none"}
    made = allot.prune(CASE.make(), CASE.inputs(16), "macs=60%", **chain, save_to=tmp_path / "run")
    monkeypatch.setattr(exporting, "side_by_side", fails)
    assert made.timed()["exports"] == [] and "is not timed" in caplog.text and "no room" in caplog.text
    with pytest.raises(UsageError, match="cannot be exported to slim: no room"):
        made.export(to="slim")


def test_an_export_leaves_what_the_report_says_of_scores(tmp_path: Path):
    labels = [(x, i % 3) for i, x in enumerate(CASE.inputs(12))]
    made = result(tmp_path / "run", test=labels)
    scores = json.loads((tmp_path / "run/report.json").read_text())["scores"]
    again = result(tmp_path / "run", test=labels[:5])  # opened, and scored on other data
    assert again.scores != made.scores
    again.export(to="bitmask")
    assert json.loads((tmp_path / "run/report.json").read_text())["scores"] == scores


@pytest.mark.parametrize("place", ["x.pt2", "sub/x.pt2", "sub/deep/x.pt2"])
def test_an_export_anywhere_in_the_run_is_held_to_its_probe(place: str, tmp_path: Path):
    made = result(tmp_path / "run")
    path = tmp_path / "run" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    made.export(path)
    assert made.verify()["passed"]
    path.write_bytes(path.read_bytes()[:-1])
    assert not made.verify()["passed"]


def test_two_files_of_one_form_are_two_rows(tmp_path: Path):
    made = result(tmp_path / "run")
    inside, outside = tmp_path / "run/x.pt2", tmp_path / "y.pt2"
    for path in (inside, outside, inside):
        made.export(path)
    assert [row["file"] for row in made.report()["exports"]] == [str(outside), str(inside)]
    inside.unlink()
    assert not made.verify()["passed"]


def test_nothing_is_exported_into_another_run(tmp_path: Path):
    mine, other = result(tmp_path / "mine"), result(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="is another run"):
        mine.export(tmp_path / "other/x.pt2")
    assert other.verify()["passed"]


@pytest.mark.parametrize("place", ["", "/", "file"])
def test_a_result_is_saved_in_a_directory_of_its_own(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(UsageError):
        result().save(place)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]
