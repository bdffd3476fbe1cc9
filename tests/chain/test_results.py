"""What a result gives out: files for runtimes, each opened again, compared and timed beside the dense model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import allot
from allot.errors import UsageError
from contract.cases import CASES

CASE = CASES["with batch norm"]


def result(save_to: Path | None = None, **settings: object) -> allot.Result:
    known = {"batch_size": 8, "repair": "none", "save_to": save_to, **settings}
    return allot.prune(CASE.make(), CASE.inputs(16), "sparsity=0.5", **known)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    ("name", "to", "form"),
    [
        ("x.onnx", None, "onnx"),
        ("x.pt2", None, "program"),
        ("x.safetensors", None, "safetensors"),
        ("x", "bitmask", "bitmask"),
    ],
)
def test_a_result_is_exported_by_the_ending_or_the_name_of_a_form(
    name: str, to: str | None, form: str, saved: bool, tmp_path: Path
):
    made = result(tmp_path / "run" if saved else None)
    row = made.export(tmp_path / name, to=to)
    assert row["form"] == form and row["bytes"] == (tmp_path / name).stat().st_size
    assert row["milliseconds"]["dense"] > 0 and row["spread"][0] <= row["spread"][1]
    assert allot.verify(tmp_path / name)["passed"]
    if saved:
        assert made.report()["exports"] == [row]
        assert json.loads((tmp_path / "run/report.json").read_text())["exports"] == [row]
    else:
        assert made.directory is None and made.report()["exports"] == []


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
    with pytest.raises(UsageError, match="not known by its ending"):
        made.export(tmp_path / "x.bin")
    with pytest.raises(UsageError, match="form of export"):
        made.export(tmp_path / "x.bin", to="tflite")
    blind = allot.prune(CASE.make(), None, "sparsity=0.5", repair="none")
    with pytest.raises(UsageError, match="needs calibration data"):
        blind.export(tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
