"""Files of a run that hold no weights: promised to the last byte, also where a command rewrites them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allot
from allot.errors import UsageError, VerificationError
from allot.export.certificate.certificate import verify
from allot.export.certificate.records import RECORDS, rewrite
from allot.export.certificate.rows import sealed
from allot.export.certificate.structure import fits
from allot.export.export import export_run
from allot.export.files.formats import OWN
from allot.network.layers import Layer
from allot.report.exports import add_export
from allot.report.page import write_run
from allot.run.patterns import NM, Rows
from allot.run.store import json_text
from contract.cases import CASES
from export.damage import DAMAGES, any_flipped_bit_fails, damage, passed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, case = tmp_path_factory.mktemp("made") / "run", CASES["with batch norm"]
    allot.prune(case.make(), case.inputs(), "sparsity=0.7", repair="bn", save_to=run)
    return run


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def failed(path: Path) -> set[tuple[str, str]]:
    return {(row["file"], row["check"]) for row in verify(path)["rows"] if not row["passed"]}


def report_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report.json").read_text()))


@pytest.mark.parametrize("name", RECORDS)
def test_any_flipped_bit_of_a_record_fails(run: Path, name: str):
    if name != "run.json":
        return any_flipped_bit_fails(run, name, 20)
    whole = (run / name).read_bytes()
    for place in range(0, len(whole), 101):
        (run / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not passed(run)
    return None


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_record_is_a_row_of_its_own_name(run: Path, name: str, how: str):
    damage(run / name, how)
    assert {file for file, _ in failed(run)} == {name}
    assert (name, "exists") in failed(run) or how != "removed"


@pytest.mark.parametrize("name", [name for name in OWN if name.endswith((".json", ".yaml", ".jsonl", ".html"))])
def test_other_line_ends_are_a_change(run: Path, name: str):
    if not (run / name).exists() or b"\n" not in (run / name).read_bytes():
        return
    (run / name).write_bytes((run / name).read_bytes().replace(b"\n", b"\r\n"))
    assert name in {file for file, _ in failed(run)}


def test_a_record_of_another_run_is_found(run: Path, tmp_path: Path):
    case = CASES["with batch norm"]
    allot.prune(case.make(), case.inputs(), "sparsity=0.6", repair="bn", save_to=tmp_path / "other")
    for name in RECORDS:
        whole = (run / name).read_bytes()
        shutil.copy(tmp_path / "other" / name, run / name)
        assert {file for file, _ in failed(run)} == {name}
        (run / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "report.html", "model.safetensors", "certificate.json"])
def test_what_is_gone_is_a_failure_and_what_allot_never_wrote_is_usage(run: Path, name: str):
    (run / name).unlink()
    assert not passed(run) and not passed(run / name)
    with pytest.raises(UsageError, match="no such file"):
        verify(run / "model.slim.safetensors")  # no run of single weights has one


def test_a_run_without_its_records_is_no_foreign_directory(run: Path, tmp_path: Path):
    for name in ("run.json", "certificate.json"):
        (run / name).unlink()
    assert failed(run) == {("run.json", "exists"), ("certificate.json", "exists")}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="was not written by allot"):
        verify(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "steps.jsonl", "report.html", "allocation.json"])
def test_a_file_of_a_run_is_verified_by_its_name(run: Path, name: str):
    assert passed(run / name) and {row["file"] for row in verify(run / name)["rows"]} == {name, "certificate.json"}
    damage(run / name, "longer")
    assert not passed(run / name)


def test_a_certificate_that_promises_no_records_fails(run: Path):
    whole = json.loads((run / "certificate.json").read_text())
    for name in (*RECORDS, None):
        content = json.loads(json.dumps(whole))
        content["promised"]["records"].pop(name, None) if name else content["promised"].pop("records")
        (run / "certificate.json").write_text(json_text(sealed(content)))
        assert failed(run) == {("certificate.json", "records")}
    content["promised"]["records"] = {**whole["promised"]["records"], "../../etc/passwd": []}
    (run / "certificate.json").write_text(json_text(sealed(content)))
    assert failed(run) == {("certificate.json", "records")}


def test_a_result_that_was_saved_by_hand_has_a_page_and_no_more(tmp_path: Path):
    case = CASES["with batch norm"]
    allot.prune(case.make(), case.inputs(), "sparsity=0.7", repair="none").save(tmp_path / "saved")
    assert passed(tmp_path / "saved")
    damage(tmp_path / "saved" / "report.html", "longer")
    assert failed(tmp_path / "saved") == {("report.html", "bytes on disk"), ("report.html", "sha256")}


# rewritten by a command


def test_what_commands_rewrite_is_promised_again(run: Path):
    case = CASES["with batch norm"]
    before = (run / "certificate.json").read_bytes()
    row = export_run(case.make(), run, report_of(run), case.inputs()[:1], "bitmask")
    add_export(run, row)
    assert passed(run) and (run / "certificate.json").read_bytes() != before
    (run / "report.html").unlink()
    write_run(run, report_of(run))
    assert passed(run)


def test_a_kill_at_any_write_of_a_command_leaves_a_run_that_verifies(run: Path, monkeypatch: pytest.MonkeyPatch):
    class Killed(BaseException):
        pass

    changes = {"report.html": "<p>new</p>", "recipe.yaml": "new: 1\n"}
    for deadly in range(1, 6):
        copy, writes = Path(shutil.copytree(run, run.with_name(f"killed-{deadly}"))), 0
        replace = Path.replace

        def fatal(self: Path, target: Path, deadly: int = deadly) -> Path:
            nonlocal writes
            writes += 1
            if writes == deadly:
                raise Killed
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", fatal)
            try:
                rewrite(copy, changes)
            except Killed:
                assert deadly < 5
        assert passed(copy), deadly
        rewrite(copy, changes)  # and the same command ends as if nothing had been
        promised = json.loads((copy / "certificate.json").read_text())["promised"]["records"]
        assert passed(copy) and {len(digests) for digests in promised.values()} == {1}


def test_a_damaged_file_is_not_made_good_by_a_later_command(run: Path):
    row = {"form": "x", "file": "x", "inside": None, "probe": False}
    damage(run / "steps.jsonl", "longer")
    write_run(run, report_of(run))
    assert {name for name, _ in failed(run)} == {"steps.jsonl"}
    content = (run / "report.json").read_bytes()
    (run / "report.json").write_bytes(content.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(VerificationError, match=r"report\.json is not what was written there"):
        add_export(run, row)
    (run / "report.json").write_bytes(content)
    damaged = (run / "certificate.json").read_bytes().replace(b'"passed": true', b'"passed": True', 1)
    (run / "certificate.json").write_bytes(damaged)
    rewrite(run, {"report.html": "<p>new</p>"})
    assert (run / "certificate.json").read_bytes() == damaged


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd"])
def test_a_report_names_exports_inside_of_the_run(run: Path, place: str):
    report = report_of(run)
    report["exports"] = [{"form": "onnx", "file": place, "inside": place, "probe": True}]
    (run / "report.json").write_text(json_text(sealed(report)))
    assert failed(run) == {("report.json", "exports")}


# pattern


@pytest.mark.parametrize("pattern", ["2:4", "n:4", "rows"])
def test_a_run_keeps_its_pattern(pattern: str, tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    allot.prune(model, None, "sparsity=0.5", pattern=pattern, repair="none", save_to=tmp_path)
    rows = {row["check"]: row for row in verify(tmp_path)["rows"] if row["file"] == "model.safetensors"}
    assert rows["pattern"]["passed"] and rows["pattern"]["promised"] == f"in every layer {pattern}"


def test_a_run_of_single_weights_promises_no_pattern(made: Path):
    assert "pattern" not in {row["check"] for row in verify(made)["rows"]}


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(None, 4), Rows()])
@pytest.mark.parametrize("kind", ["linear", "linear_transposed", "conv"])
def test_nonzeros_fit_a_pattern_as_its_own_masks_do_and_a_moved_weight_does_not(pattern: Any, kind: str):
    shape = {"linear": (6, 8), "linear_transposed": (8, 6), "conv": (6, 8, 3, 3)}[kind]
    layer = Layer("a.weight", shape, kind)
    mask = pattern.mask(layer, torch.rand(shape, generator=torch.Generator().manual_seed(0)), layer.total // 2)
    assert fits(pattern, layer, mask.float(), layer.total // 2)
    moved = layer.matrix(mask).clone()  # [rows, cols]
    row = moved[0]
    row[int(row.nonzero()[0])], moved[1][int((~moved[1]).nonzero()[-1])] = False, True  # to another row and group
    assert not fits(pattern, layer, layer.unmatrix(moved).float(), layer.total // 2)
