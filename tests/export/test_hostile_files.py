"""Files that somebody made with care: nothing outside of their directory is read or written, and no code is run."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import allot
from allot.errors import UsageError, VerificationError
from allot.export.certificate.certificate import verify
from allot.export.certificate.probe import probe_of
from allot.export.certificate.rows import digest
from allot.export.export import export, export_run
from allot.export.files.formats import save_tensors, stored
from allot.export.runtimes.forms import FORMS
from allot.report.page import write_run


def forge(path: Path) -> None:
    """Promise the files of an export as they are now."""
    tensors, promise = stored(probe_of(path))
    files = {name: digest(path / name if path.is_dir() else path) for name in promise["files"]}
    promise = {key: promise[key] for key in ("form", "counts", "inputs", "run")} | {"files": files}
    save_tensors(probe_of(path), tensors, "probe", promise)


@pytest.mark.parametrize("place", ["../secret.bin", "secret.bin", "/etc/hostname"])
def test_onnx_weights_in_another_file_are_not_read(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    path = tmp_path / "inner" / "model.onnx"
    export(nn.Linear(4, 2).eval(), torch.randn(2, 4), path)
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 2)
    for secret in (tmp_path / "secret.bin", tmp_path / "inner" / "secret.bin"):
        secret.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    path.write_bytes(proto.SerializeToString())
    forge(path)
    with pytest.raises(VerificationError, match="in another file"):
        FORMS["onnx"].open(path)
    found = verify(path)
    assert not found["passed"] and place in found["rows"][-1]["found"]


def test_a_layer_may_be_called_like_a_path_and_nothing_is_written_there(tmp_path: Path):
    """Names of modules hold no dots, so that ../ is only found in files, below."""
    torch.manual_seed(0)
    outside = tmp_path / "outside"
    model = nn.Sequential()
    model.add_module(str(outside), nn.Linear(16, 16))
    model.add_module("a/b<script>", nn.Linear(16, 4))
    report = allot.prune(model.eval(), torch.randn(8, 16), "sparsity=0.5", save_to=tmp_path / "run").report()
    for form in ("bitmask", "csr", "program"):
        export_run(model, tmp_path / "run", report, torch.randn(1, 16), form)
    assert verify(tmp_path / "run")["passed"] and f"{outside}.weight" in allot.load(tmp_path / "run")
    assert "<script>.weight" not in write_run(tmp_path / "run", report).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_layers_in_a_file_may_be_called_like_a_path_and_nothing_is_read_or_written_there(tmp_path: Path):
    name = "../../outside"
    about = {"layers": {name: [[2, 2], 4]}, "aliases": {}, "asked": {"sparsity": "0.5"}, "limits": {"sparsity": 2}}
    tensors = {name: torch.eye(2)}
    for form in ("plain", "csr", "slim"):
        path = tmp_path / "inner" / f"{form}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_tensors(path, tensors, form, about)
        assert verify(path)["passed"] and torch.equal(allot.load(path)[name], torch.eye(2))
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


CODE = "from pathlib import Path\nPath('ran').touch()\n"


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "evil.Net", "AutoModel": "evil.Net"}, "model_type": "evil"},
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoModel"], "auto_map": {"AutoModel": "evil.Net"}},
        {"architectures": ["utils"]},
        {"architectures": [{}]},
        {"architectures": []},
    ],
)
def test_an_export_to_hf_runs_no_code_that_lies_in_it(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model, ids = transformers.BertModel(config).eval(), torch.arange(8)[None]
    export(model, {"input_ids": ids}, tmp_path / "net", to="hf")
    assert verify(tmp_path / "net")["passed"]
    written = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps(written | change))
    assert not verify(tmp_path / "net")["passed"]  # by its digest
    (tmp_path / "net" / "evil.py").write_text(CODE)
    tensors, promise = stored(probe_of(tmp_path / "net"))
    promise = {key: promise[key] for key in ("form", "counts", "inputs", "run", "files")}
    promise["files"]["evil.py"] = {}
    save_tensors(probe_of(tmp_path / "net"), tensors, "probe", promise)
    forge(tmp_path / "net")
    try:
        verify(tmp_path / "net")
    except UsageError as error:
        assert "names no model of transformers" in str(error)  # noqa: PT017 - either answer will do
    assert not (tmp_path / "ran").exists()
