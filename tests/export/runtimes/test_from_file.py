"""Files that hold tensors alone are asked for outputs with the model's code, which whoever verifies hands over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError
from allot.export.certificate.probe import ANSWERS, probe_of
from allot.export.export import export_run


class Net(nn.Module):
    """`slope` is code, not weights: no file tells that it changed."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.slope, self.body, self.head = slope, nn.Linear(20, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.leaky_relu(self.body(x), self.slope))


FORMS = {"safetensors": "unstructured", "bitmask": "unstructured", "csr": "unstructured", "slim": "channels"}


def made(run: Path, form: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(16, 20)
    budget = "sparsity=0.9" if FORMS[form] == "unstructured" else "macs=50%"
    allot.prune(model, x, budget, allocate="uniform", pattern=FORMS[form], repair="none", save_to=run)
    return export_run(model, run, json.loads((run / "report.json").read_text()), x[:1], form)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_tensors_is_asked_with_the_code_of_its_model(form: str, tmp_path: Path):
    file = Path(made(tmp_path / "run", form)["file"])
    away = tmp_path / "away"
    away.mkdir()
    for each in (file, probe_of(file)):
        shutil.copy(each, away / each.name)
    for path in (file, away / file.name, tmp_path / "run"):
        found = allot.verify(path, Net())  # the weights of what is handed over do not matter
        assert found["passed"] and [row["check"] for row in found["rows"]].count(ANSWERS) == 1
        other = allot.verify(path, Net(slope=0.3))
        assert [row["check"] for row in other["rows"] if not row["passed"]] == [ANSWERS]
        assert allot.verify(path)["passed"] and not any(row["check"] == ANSWERS for row in allot.verify(path)["rows"])
        with pytest.raises(UsageError, match="another model"):
            allot.verify(path, nn.Linear(20, 5))


def test_a_changed_probe_is_found(tmp_path: Path):
    file = Path(made(tmp_path, "bitmask")["file"])
    content = bytearray(probe_of(file).read_bytes())
    content[-1] ^= 1
    probe_of(file).write_bytes(content)
    for path in (file, tmp_path):
        failed = [row for row in allot.verify(path, Net())["rows"] if not row["passed"]]
        assert {(row["file"], row["check"]) for row in failed} == {(probe_of(file).name, "untouched")}


def test_a_run_without_exports_has_nothing_to_ask(tmp_path: Path):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 20)
    allot.prune(model, x, "sparsity=0.5", repair="none", save_to=tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run/model.safetensors"):
        with pytest.raises(UsageError, match="no probe to ask a model"):
            allot.verify(path, Net())


def test_inputs_that_cannot_be_stored_make_no_probe_and_the_export_all_the_same(tmp_path: Path):
    class Scaled(Net):
        def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    torch.manual_seed(0)
    model, x = Scaled().eval(), torch.randn(16, 20)
    samples = [((row, 2.0),) for row in x]
    allot.prune(model, samples, "sparsity=0.5", repair="none", save_to=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    row = export_run(model, tmp_path, report, (x[:1], 2.0), "bitmask")
    assert row["error"] == 0 and not probe_of(Path(row["file"])).exists()
