"""What was exported into a run is verified with it: there, probed, whole, and of this run; what the run is stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allot
from allot.errors import UsageError
from allot.export.certificate.certificate import place_of, verify
from allot.export.certificate.probe import probe_of
from allot.export.export import export, export_run
from allot.export.files.formats import OWN, save_tensors, stored
from allot.report.exports import add_export
from export.damage import any_flipped_bit_fails

X = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
FORMS = {"program": "model.pt2", "bitmask": "model.bitmask.safetensors", "csr": "model.csr.safetensors",
         "openvino": "openvino"}  # fmt: skip


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def into(run: Path, seed: int = 0, forms: Any = FORMS) -> Path:
    """A run with exports in it, as the command line leaves it."""
    model = net(seed)
    allot.prune(model, X, "sparsity=0.8", repair="none", save_to=run)
    report = json.loads((run / "report.json").read_text())
    for form in forms:
        add_export(run, export_run(model, run, report, X[:1], form))
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return into(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "moved"))  # where a run lies does not matter


def failed(path: Path) -> list[tuple[str, str]]:
    return [(row["file"], row["check"]) for row in verify(path)["rows"] if not row["passed"]]


def test_rows_say_where_an_export_lies_and_whether_it_is_probed(run: Path):
    exports = json.loads((run / "report.json").read_text())["exports"]
    assert {row["form"]: row["inside"] for row in exports} == FORMS and all(row["probe"] for row in exports)
    assert verify(run)["passed"]


@pytest.mark.parametrize("form", ["program", "csr", "openvino"])
def test_an_export_that_went_is_missed(form: str, run: Path):
    path = run / FORMS[form]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (FORMS[form], "exists") in failed(run)


@pytest.mark.parametrize("form", FORMS)
def test_a_probe_that_went_is_missed(form: str, run: Path):
    probe = probe_of(run / FORMS[form])
    probe.unlink()
    assert failed(run) == [(str(probe.relative_to(run)), "exists")]


def test_a_flipped_bit_in_any_export_is_found(run: Path):
    for name in ("model.csr.safetensors", "model.pt2", "openvino/model.bin", "openvino/allot.probe.safetensors"):
        any_flipped_bit_fails(run, name, 5)


@pytest.mark.parametrize("form", ["program", "csr"])
def test_a_probe_that_promises_fewer_counts_fails(form: str, run: Path):
    probe = probe_of(run / FORMS[form])
    tensors, promise = stored(probe)
    promise = {key: promise[key] for key in ("form", "files", "counts", "inputs", "run")}
    del promise["counts"]["zeros"]
    save_tensors(probe, tensors, "probe", promise)
    assert failed(run) == [(probe.name, "counts")]


def test_an_export_of_another_run_is_noticed(run: Path, tmp_path: Path):
    other = into(tmp_path / "other", seed=1, forms=["program"])
    assert verify(other / "model.pt2", trust=True)["passed"]
    for name in ("model.pt2", "model.pt2.probe.safetensors"):
        shutil.copy(other / name, run / name)
    assert failed(run) == [("model.pt2.probe.safetensors", "of this run")]


def test_what_was_exported_from_a_model_by_itself_is_of_no_run(run: Path):
    export(net(), X, run / "mine.pt2")
    assert verify(run)["passed"]
    export(net(), X, run / "model.pt2")  # which the report calls an export of the run
    assert failed(run) == [("model.pt2.probe.safetensors", "of this run")]


@pytest.mark.parametrize("name", ["openvino/model.bin", "openvino/allot.probe.safetensors", "model.csr.safetensors",
                                  "model.pt2.probe.safetensors"])  # fmt: skip
def test_the_place_that_is_wrong_is_named(name: str, run: Path):
    for whole, path in ((run, run / name), (run / name.removesuffix(".probe.safetensors"), run / name)):
        whole = run / "openvino" if whole != run and "openvino" in name else whole
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        row = next(row for row in verify(whole)["rows"] if not row["passed"])
        assert place_of(whole, row) == path and place_of(whole, row).exists()
        content[-1] ^= 1
        path.write_bytes(content)


def test_a_directory_without_its_probe_is_told_apart_from_a_run(run: Path):
    (run / "openvino" / "allot.probe.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no allot\.probe\.safetensors in .*openvino: copy it there"):
        verify(run / "openvino")


# what a run is made of is never written over


@pytest.mark.parametrize("name", OWN)
def test_no_export_takes_the_place_of_what_a_run_is_made_of(name: str, made: Path):
    report = json.loads((made / "report.json").read_text())
    for form in ("program", "csr", "safetensors"):
        if (form, name) != ("safetensors", "model.safetensors"):
            with pytest.raises(UsageError, match="is a file that the run itself is made of"):
                export_run(net(), made, report, X[:1], form, made / name)
    with pytest.raises(UsageError, match="is a file that the run itself is made of"):
        export(net(), X, made / name, to="program")
    for form in ("openvino", "hf"):
        with pytest.raises(UsageError, match="is a run directory"):
            export_run(net(), made, report, X[:1], form, made)
    assert verify(made)["passed"]


def test_a_run_s_own_file_named_by_its_own_name_is_no_copy(made: Path):
    report = json.loads((made / "report.json").read_text())
    row = export_run(net(), made, report, X[:1], "safetensors", made / "model.safetensors")
    assert row["inside"] == "model.safetensors" and verify(made)["passed"]
    probe_of(made / "model.safetensors").unlink()


def test_no_channels_are_written_as_a_directory_of_transformers(tmp_path: Path):
    model = net()
    result = allot.prune(
        model, X, "macs=50%", allocate="uniform", pattern="channels", repair="none", save_to=tmp_path / "run"
    )
    for out in (None, tmp_path / "out"):
        with pytest.raises(UsageError, match="slim and onnx hold the smaller model"):
            export_run(model, tmp_path / "run", result.report(), X[:1], "hf", out)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run" / "hf").exists()


# counted without the model


@pytest.mark.parametrize("form", ["safetensors", "bitmask", "csr"])
def test_a_file_of_tensors_is_counted_without_its_model(form: str, made: Path, tmp_path: Path):
    report = json.loads((made / "report.json").read_text())
    file = Path(export_run(net(), made, report, X[:1], form, tmp_path / "away.safetensors")["file"])
    rows = {row["check"]: row for row in verify(file)["rows"]}
    assert rows["weights"]["found"] == 16 * 20 + 5 * 16 and rows["zeros"]["found"] == 320
    assert "macs" not in rows and "macs" in {row["check"] for row in verify(file, net(2))["rows"]}
    tensors, promise = stored(probe_of(file))
    promise = {key: promise[key] for key in ("form", "files", "counts", "inputs", "run")}
    promise["counts"] |= {"zeros": 319}
    save_tensors(probe_of(file), tensors, "probe", promise)
    assert failed(file) == [("away.safetensors", "zeros")]


def test_what_is_kept_apart_from_the_weights_counts_alike_with_and_without_the_model(tmp_path: Path):
    class Tables(nn.Module):
        """A table that no file holds, and a weight with two names."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(20, 20), nn.Linear(20, 20)
            self.two.weight = self.one.weight
            self.register_buffer("table", torch.ones(20, 20), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x) @ self.table)

    torch.manual_seed(0)
    model = Tables().eval()
    report = allot.prune(model, X, "sparsity=0.5", repair="none", save_to=tmp_path).report()
    file = Path(export_run(model, tmp_path, report, X[:1], "bitmask")["file"])
    for given in (None, Tables()):
        rows = {row["check"]: row["found"] for row in verify(file, given)["rows"]}
        assert (rows["weights"], rows["zeros"]) == (400, 200) and verify(file, given)["passed"]
