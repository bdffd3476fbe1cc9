"""What was exported is counted alike in every form, verified without the run, and opened only where nothing differs."""

from __future__ import annotations

import copy
import gc
import json
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError
from allot.export.certificate.certificate import verify
from allot.export.certificate.probe import _files, counts_of, probe_of, replace_constants
from allot.export.certificate.rows import digest
from allot.export.export import export, export_run
from allot.export.files.formats import save_tensors, stored
from allot.export.runtimes import sparse
from allot.export.runtimes.forms import FORMS
from allot.export.runtimes.opened import Opened
from allot.export.timing import sparse_layers
from allot.export.timing.clock import Speedup
from allot.pruning.prune import prune
from contract.cases import CASES
from export.damage import DAMAGES, damage

exporting = sys.modules["allot.export.export"]  # a function hides the module


class Mixed(nn.Module):
    """Grouped, strided and transposed convolutions, attention with a product of activations, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.query, self.out = nn.Linear(6, 12, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.up(self.deep(self.stem(x)).relu()).flatten(2).transpose(1, 2)[:, None]  # [B, 1, 64, 6]
        q, k = self.query(tokens).chunk(2, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, tokens).mean((1, 2)))


def by_hand(batch: int) -> int:
    """Multiply-accumulates of `Mixed`: each output element takes as many as its kernel has weights."""
    kernels = 4 * 4 * 8 * 27 + 4 * 4 * 8 * 2 * 9 + 4 * 4 * 8 * 6 * 4
    return batch * (kernels + 64 * 6 * 12 + 2 * 64 * 64 * 6 + 6 * 5)


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed().eval()
    with torch.no_grad():
        model.stem.weight[:, 0] = 0
    return model


@pytest.fixture(scope="module")
def files(mixed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`mixed` in every form but that of transformers."""
    folder = tmp_path_factory.mktemp("forms")
    places = {name: folder / f"{name}{form.ending}" for name, form in FORMS.items() if name != "hf"}
    for name, path in places.items():
        export(mixed, torch.randn(2, 3, 8, 8), path, to=name)
    return places


@pytest.mark.parametrize("form", ["program", "onnx", "openvino"])
def test_every_form_is_counted_alike(mixed: nn.Module, files: dict[str, Path], form: str):
    opened, x = FORMS[form].open(files[form]), torch.randn(3, 3, 8, 8)
    found, wanted = counts_of(opened, x), counts_of(Opened.module(mixed), x)
    assert found["macs"] == wanted["macs"] == by_hand(3)
    assert found["zeros"] == wanted["zeros"] == 8 * 9
    biases = 0 if form != "openvino" else 8 + 8 + 6 + 5  # it keeps them as [1, C, 1, 1]
    assert found["weights"] == wanted["weights"] + biases
    with torch.no_grad():
        assert torch.allclose(opened.run(x)[0], mixed(x), atol=1e-5)


@pytest.mark.parametrize("form", ["program", "onnx", "openvino"])
def test_an_exported_file_is_verified_anywhere(files: dict[str, Path], form: str, tmp_path: Path):
    place = tmp_path / files[form].name
    if files[form].is_dir():
        shutil.copytree(files[form], place)
    else:
        shutil.copy(files[form], place)
        shutil.copy(probe_of(files[form]), tmp_path)
    found = verify(place, trust=True)
    assert found["passed"]
    assert {"weights", "zeros", "macs", "outputs on the probe", "sha256"} <= {row["check"] for row in found["rows"]}
    targets = [path for path in (place.rglob("*") if place.is_dir() else tmp_path.iterdir()) if path.is_file()]
    draw = random.Random(0)
    for target in targets:
        whole = target.read_bytes()
        for _ in range(50 // len(targets)):
            content = bytearray(whole)
            content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            target.write_bytes(content)
            assert not verify(place, trust=True)["passed"]
        for how in DAMAGES:
            damage(target, how)
            if how == "removed" and (target == place or target == probe_of(place)):
                with pytest.raises(UsageError, match=r"probe\.safetensors|no run directory|no such file"):
                    verify(place, trust=True)
            else:
                assert not verify(place, trust=True)["passed"]
            target.write_bytes(whole)
    assert verify(place, trust=True)["passed"]


def test_a_file_that_answers_otherwise_fails_even_with_a_forged_probe(mixed: nn.Module, tmp_path: Path):
    path = tmp_path / "model.pt2"
    export(mixed, torch.randn(2, 3, 8, 8), path)
    honest = probe_of(path).read_bytes()
    other = Mixed()
    other.load_state_dict({name: 1.01 * value for name, value in mixed.state_dict().items()})
    export(other, torch.randn(2, 3, 8, 8), path)
    promise = stored(probe_of(path))[1]
    probe_of(path).write_bytes(honest)
    promise = {key: promise[key] for key in ("form", "files", "counts", "inputs")}
    save_tensors(probe_of(path), stored(probe_of(path))[0], "probe", promise)
    assert [row["check"] for row in verify(path, trust=True)["rows"] if not row["passed"]] == ["outputs on the probe"]


def forge(path: Path, form: str, **changed: Any) -> None:
    """Give a file the probe of one that is as it should be."""
    tensors, promise = stored(probe_of(path))
    promise = {key: promise[key] for key in ("form", "files", "counts", "inputs")} | {"form": form}
    promise["files"] = {name: digest(file) for name, file in _files(path).items()}
    save_tensors(probe_of(path), tensors, "probe", promise | changed)


@pytest.mark.parametrize("form", ["program", "onnx", "openvino"])
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_no_runtime_opens_is_a_row_and_no_traceback(
    files: dict[str, Path], form: str, content: bytes, tmp_path: Path
):
    place = tmp_path / files[form].name
    if files[form].is_dir():
        shutil.copytree(files[form], place)
        (place / "model.xml").write_bytes(content)
    else:
        place.write_bytes(content)
        probe_of(place).write_bytes(probe_of(files[form]).read_bytes())
    forge(place, form)
    assert [row["check"] for row in verify(place, trust=True)["rows"] if not row["passed"]] == ["opens and answers"]


def test_a_probe_that_promises_nothing_fails(files: dict[str, Path], tmp_path: Path):
    place = tmp_path / "model.onnx"
    for source in (files["onnx"], probe_of(files["onnx"])):
        shutil.copy(source, tmp_path / source.name.replace("onnx.onnx", "model.onnx"))
    assert verify(place)["passed"]  # under another name as well
    for changed in ({"files": {}}, {"counts": {}}, {"files": {"/etc/hostname": digest(Path("/etc/hostname"))}}):
        forge(place, "onnx", **changed)
        assert not verify(place)["passed"]
    shutil.copytree(files["openvino"], tmp_path / "openvino")
    (tmp_path / "openvino" / "more.py").write_text("")
    assert not verify(tmp_path / "openvino")["passed"]
    with pytest.raises(UsageError, match="is part of an export"):
        verify(tmp_path / "openvino" / "model.xml")
    with pytest.raises(UsageError, match="is the probe of an export"):
        verify(probe_of(place))
    probe_of(place).unlink()
    with pytest.raises(UsageError, match="copy it there, or export again"):
        verify(place)


class Two(nn.Module):
    """Two inputs that are not the same; counts its calls; answers with whole numbers too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        found = self.a(x) - 2 * self.b(y) + self.calls
        return found, found.argmax(1)


@pytest.mark.parametrize("form", ["program", "onnx", "openvino"])
def test_inputs_go_by_their_names_and_every_output_is_compared(form: str, tmp_path: Path):
    model, path = Two().eval(), tmp_path / "two"
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    opened = export(model, {"y": y, "x": x}, path, to=form)
    wanted = copy.deepcopy(model)(x, y)
    for named in ({"x": x, "y": y}, {"y": y, "x": x}):
        found = FORMS[form].open(path).run(named)
        assert torch.allclose(found[0], wanted[0], atol=1e-5) and torch.equal(found[1].long(), wanted[1])
    assert verify(path, trust=True)["passed"] and model.calls == 0
    if form != "program":
        with pytest.raises(UsageError, match="the file takes"):
            opened.run({"x": x})


class Products(nn.Module):
    """An einsum of two activations, and a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)  # [B, 6, 10]
        return torch.einsum("bct,bdt->bcd", y, y[:, :2])


@pytest.mark.parametrize("form", ["program", "onnx", "openvino"])
def test_products_of_every_kind_are_counted(form: str, tmp_path: Path):
    x = torch.randn(2, 4, 8)
    opened = export(Products(), x, tmp_path / "model", to=form)
    assert opened.macs(x) == 2 * (4 * 8 * 3 * 3 + 6 * 2 * 10)


def test_an_export_made_again_weighs_the_same(tmp_path: Path):
    x = torch.randn(2, 4)
    sizes = [export(nn.Linear(4, 3).eval(), x, tmp_path / "model", to="openvino").bytes for _ in range(2)]
    assert sizes[0] == sizes[1] and verify(tmp_path / "model")["passed"]


def test_what_cannot_be_probed_leaves_nothing_behind(tmp_path: Path):
    for example in ((torch.ones(2, 4), None), {"x": torch.ones(2, 4), "flag": True}):
        with pytest.raises(UsageError, match="probed with tensors"):
            export(nn.Linear(4, 3), example, tmp_path / "model.pt2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").write_text("")
    with pytest.raises(UsageError, match="holds other files"):
        export(nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "mine", to="openvino")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_model_of_one_sample_is_exported_for_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 4) + 1

    opened = export(One(), torch.ones(1, 4), tmp_path / "one.pt2")
    assert torch.equal(opened.run(torch.zeros(1, 4))[0], torch.ones(1, 4))
    assert [record.message for record in caplog.records if record.name == "allot"] == [
        "One is exported for inputs of these very shapes: it takes no open batch."
    ]


def test_half_precision_is_held_to_what_it_can(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).half()
    export(model, torch.randn(2, 64).half(), tmp_path / "half.onnx")
    assert verify(tmp_path / "half.onnx")["passed"]


def test_inputs_that_say_nothing_are_drawn_and_others_stay():
    assert torch.equal(replace_constants(torch.arange(4.0)), torch.arange(4.0))
    assert replace_constants(torch.zeros(1, 3, 8, 8)).std() > 0.5 and torch.equal(
        replace_constants(torch.zeros(9)), replace_constants(torch.zeros(9))
    )
    both = replace_constants({"ids": torch.ones(2, 3, dtype=torch.long), "x": torch.ones(5)})
    assert torch.equal(both["ids"], torch.ones(2, 3, dtype=torch.long)) and both["x"].std() > 0
    assert isinstance(replace_constants((torch.zeros(4), None)), tuple)


def test_a_model_of_transformers_is_opened_by_from_pretrained(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **shape)).eval()
    x = torch.randn(2, 3, 8, 8)
    result = prune(model, x, "sparsity=0.8", repair="none", save_to=tmp_path / "run")
    row = export_run(model, tmp_path / "run", result.report(), x[:1], "hf")
    assert row["error"] == 0 and verify(tmp_path / "run" / "hf")["passed"]
    again = type(model).from_pretrained(tmp_path / "run" / "hf")
    assert all(torch.equal(value, result.state_dict()[name]) for name, value in again.state_dict().items())
    config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    (tmp_path / "run" / "hf" / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(UsageError, match="names no model of transformers"):
        FORMS["hf"].open(tmp_path / "run" / "hf")


# sparse matrices


def wide(tmp_path: Path) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3))
    result = prune(model, None, "sparsity=0.98", method="erk", repair="none", save_to=tmp_path / "run")
    return model, result.report()


def by_count(dense: Any, sparse: Any, **settings: Any) -> Speedup:
    """A clock that counts: an entry of a dense matrix takes 1, one of a sparse matrix 4, and a call of that 3,000."""
    weights = [
        dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))["weight"].cell_contents
        for run in (dense, sparse)
    ]
    ones = float(weights[0].numel()), float(3000 + 4 * weights[1]._nnz())
    return Speedup(*ones, (ones[0] / ones[1],) * 2)


def test_linear_layers_that_are_faster_as_sparse_rows_become_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, report = wide(tmp_path)
    monkeypatch.setattr(sparse_layers, "side_by_side", by_count)
    x = torch.randn(1, 16)
    row = export_run(model, tmp_path / "run", report, x, "csr")
    assert row["note"].startswith("1 of 3 linear layers are faster as sparse rows here; at best")
    file = tmp_path / "run" / "model.csr.safetensors"
    loaded = sparse.load_csr(model, file)
    assert loaded[2].weight.layout == torch.sparse_csr and type(loaded[2]) is nn.Linear
    assert torch.equal(loaded[2].weight.to_dense(), allot.load(tmp_path / "run")["2.weight"])
    assert all(torch.equal(value, allot.load(tmp_path / "run")[name]) for name, value in allot.load(file).items())
    assert row["bytes"] == file.stat().st_size < row["dense_bytes"] and row["macs"] < 0.1 * row["dense_macs"]
    assert row["milliseconds"]["dense"] > 0
    assert row["error"] < 1e-5 and verify(file)["passed"] and model[2].weight.layout == torch.strided
    with pytest.raises(UsageError, match="is no csr file"):
        sparse.load_csr(model, tmp_path / "run" / "model.safetensors")
    with pytest.raises(UsageError, match="belongs to another model"):
        sparse.load_csr(nn.Linear(2, 2), file)


class Seldom(nn.Module):
    """One layer called by keyword, one never, one by its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.named, self.never, self.bare = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.named(input=x), self.bare.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_layers_that_are_called_in_odd_ways_or_have_odd_numbers_are_no_error(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporting, "side_by_side", lambda *runs, **rest: Speedup(1.0, 1.0, (1.0, 1.0)))
    for name, layers in (("named", 1), ("never", 0), ("bare", 0)):
        model = Seldom().to(dtype).eval()
        rules = allot.Rules(include=(f"{name}.weight",))
        result = prune(model, None, "sparsity=0.5", repair="none", rules=rules, save_to=tmp_path / name)
        row = export_run(model, tmp_path / name, result.report(), torch.randn(1, 16, dtype=dtype), "csr")
        none = layers == 0 or dtype == torch.float16  # the CPU multiplies no sparse matrices in half precision
        assert ("no linear layer was called by itself" in row["note"]) == none
        assert row["error"] <= 1e-2 and row["bytes"] == Path(row["file"]).stat().st_size


def test_where_no_layer_is_faster_all_stay_dense_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, report = wide(tmp_path)
    monkeypatch.setattr(sparse_layers, "side_by_side", lambda *runs, **rest: Speedup(1.0, 2.0, (0.5, 0.5)))
    row = export_run(model, tmp_path / "run", report, torch.randn(1, 16), "csr")
    assert row["note"].startswith("0 of 3 linear layers are faster as sparse rows here; at best 0.50x")
    assert row["macs"] == row["dense_macs"]
    assert row["verdict"] == "computes as dense" and row["milliseconds"] is None  # nothing is left to be timed


def test_sparse_matrices_are_refused_where_they_cannot_be(tmp_path: Path):
    case = CASES["with batch norm"]
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    result = prune(convolutions, None, "sparsity=0.5", repair="none", save_to=tmp_path / "conv")
    with pytest.raises(UsageError, match="no linear layer was pruned"):
        export_run(convolutions, tmp_path / "conv", result.report(), torch.randn(1, 1, 8, 8), "csr")
    model = case.make()
    report = prune(model, None, "sparsity=0.5", repair="none", save_to=tmp_path / "plain").report()
    with pytest.raises(UsageError, match=r"pattern is unstructured: 2:4 takes runs of --pattern 2:4"):
        export_run(model, tmp_path / "plain", report, case.inputs(1), "2:4")
    if not torch.cuda.is_available():
        two_of_four = nn.Linear(8, 8)
        chain: dict[str, Any] = {"pattern": "2:4", "repair": "none"}
        report = prune(two_of_four, None, "sparsity=0.5", save_to=tmp_path / "two", **chain).report()
        with pytest.raises(UsageError, match="GPU with sparse tensor cores"):
            export_run(two_of_four, tmp_path / "two", report, torch.randn(1, 8), "2:4")


@pytest.mark.gpu
def test_two_of_four_runs_on_a_gpu(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))
    chain: dict[str, Any] = {"pattern": "2:4", "repair": "none"}
    report = prune(model, None, "sparsity=0.5", save_to=tmp_path / "run", **chain).report()
    row = export_run(model, tmp_path / "run", report, torch.randn(512, 4096), "2:4")
    assert "linear layers are faster as 2:4 on the GPU" in row["note"]


def test_a_signal_after_an_export_was_opened_reaches_its_handler(files: dict[str, Path]):
    FORMS["openvino"].open(files["openvino"])
    gc.collect()
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
