"""What a `Result` shows in Python: headline, layers, a picture, exports; and that a user's script type-checks."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError
from allot.report.card import card
from allot.report.exports import Exported
from allot.report.headline import headline

matplotlib.use("Agg")


def inputs(n: int = 48) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(0))


class Backwards(nn.Module):
    """Runs its layers in another order than it holds them; names are not sorted either."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.wide, self.inner, self.a = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.inner(self.wide(x).relu()).relu())


@pytest.fixture(scope="module")
def result() -> allot.Result:
    test = [(x, int(x.argmax()) % 4) for x in inputs(40)]
    return allot.prune(Backwards(), inputs(), "sparsity=0.75", method="erk", test=test, label="a <b> net")


def test_the_version_is_that_of_the_distribution():
    assert allot.__version__ == metadata.version("allot")


def test_a_result_is_printed_as_its_headline(result: allot.Result):
    assert repr(result) == f"Result(a <b> net, erk: {headline(result.report())})"
    assert result.headline.startswith("the model looks untrained; 75 % of weights removed; top-1 ")


def test_printing_counts_no_histograms(result: allot.Result, monkeypatch: pytest.MonkeyPatch):
    again = allot.prune(Backwards(), None, "sparsity=0.75", repair="none")
    monkeypatch.setattr("allot.pruning.result.histograms", lambda *_: pytest.fail("slow"))
    assert repr(again) and again._repr_html_()


class _Tags(HTMLParser):
    VOID = ("br", "hr", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def text_of(html: str) -> str:
    parser = _Tags()
    parser.feed(html)
    assert parser.open == []
    return parser.text


def test_the_card_says_the_headline_the_budget_and_warnings_and_escapes_names(result: allot.Result):
    html = result._repr_html_()
    text = text_of(html)
    assert result.headline in text and "a <b> net, pruned by erk" in text and "<b>" not in html
    assert "budget sparsity=0.75: met" in text and "not saved: result.save(directory)" in text
    assert "http" not in html and "<script" not in html
    report = {**result.report(), "untrained": ["its weights are random"]}
    row = {"kind": "max-drop", "asked": "1pt", "met": False, "text": "top1 fell by 3.00 points"}
    text = text_of(card({**report, "guarantees": [row]}, "runs/x"))
    assert "the model looks untrained" in text and "top1 fell by 3.00 points" in text and "saved in runs/x" in text


def test_layers_are_rows_in_the_order_of_the_model(result: allot.Result):
    names = [name for name, parameter in Backwards().named_parameters() if parameter.dim() > 1]
    assert [row.name for row in result.layers] == names == ["wide.weight", "inner.weight", "a.weight"]
    for row, reported in zip(result.layers, result.report()["layers"], strict=True):
        assert (row.kept, row.total, row.density) == tuple(reported[key] for key in ("kept", "total", "density"))
        assert row.kept == int(result.masks[row.name].sum()) and row.total == row.shape[0] * row.shape[1] == row.macs
        assert row.macs_kept == row.kept
    assert "16 × 8" in result.layers._repr_html_()


def test_layers_become_a_frame_where_pandas_is_there(result: allot.Result, monkeypatch: pytest.MonkeyPatch):
    class Frame:
        def __init__(self, rows: list[dict[str, object]]) -> None:
            self.rows, self.index = rows, ""

        def set_index(self, name: str) -> Frame:
            self.index = name
            return self

    stand_in = type(sys)("pandas")
    stand_in.DataFrame = Frame  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    frame = result.layers.to_pandas()
    assert frame.index == "name" and [row["kept"] for row in frame.rows] == [row.kept for row in result.layers]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pandas is not installed"):
        result.layers.to_pandas()


def test_a_frame_of_pandas_itself_holds_the_layers(result: allot.Result):
    pytest.importorskip("pandas")
    frame = result.layers.to_pandas()
    assert list(frame.index) == [row.name for row in result.layers] and frame["total"].sum() == 448


def test_a_plot_has_a_bar_for_every_layer_the_first_at_the_top(result: allot.Result, monkeypatch: pytest.MonkeyPatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    axes = result.plot()
    assert [bar.get_width() for bar in axes.patches] == [row.density for row in result.layers]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in result.layers]
    bottom, top = axes.get_ylim()
    assert bottom > top and axes.get_xlim() == (0, 1)
    assert result.plot(axes) is axes
    pyplot.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(UsageError, match="matplotlib"):
        result.plot()


def test_fidelity_is_the_last_measurement(result: allot.Result):
    last = result.report()["fidelity"][-1]
    assert result.fidelity == {"kl": last["kl"], "agreement": last["agreement"]}
    assert allot.prune(Backwards(), None, "sparsity=0.5", repair="none").fidelity is None


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt2"])
def test_an_export_is_a_path_with_its_size_its_macs_and_its_check(result: allot.Result, name: str, tmp_path: Path):
    made = result.export(tmp_path / name)
    assert os.fspath(made) == str(made.path) == str(tmp_path / name) and Path(made).is_file()
    assert made.bytes == os.path.getsize(made) == made["bytes"] and made.macs == made["macs"] and made.verified
    assert name in repr(made) and "opened again and compared" in repr(made) and isinstance(made, dict)
    assert allot.verify(made.path)["passed"]
    assert not Exported(made | {"error": None}).verified


SCRIPT = """
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import allot


def score(layer: allot.Layer, weight: Tensor, evidence: object) -> Tensor:
    return weight.abs()


model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
loader = DataLoader(TensorDataset(torch.randn(64, 16), torch.zeros(64, dtype=torch.long)), batch_size=8)
result = allot.prune(model, loader, "sparsity=0.9", test=loader, save_to=Path("runs/x"), batch_norm="frozen")
allot.prune(model, torch.randn(8, 16), allot.Budget(sparsity=0.5), allocate="erk", score=score, repair=["bias"])
allot.prune(model, None, {"sparsity": 0.5})
allot.prune(model, [torch.randn(16)], macs="50%", loss="mse", on_step=lambda step: print(step.stage, step.metrics))
sparse: nn.Module = result.model()
report: dict[str, object] = result.report()
names: list[str] = [row.name for row in result.layers if row.density < 0.1]
agreement: float | None = (result.fidelity or {}).get("agreement")
made = result.export("x.onnx")
size: int = os.stat(made).st_size + made.bytes + made.macs
ok: bool = made.verified and bool(result.verify()["passed"])
dense: float = allot.evaluate(model, loader).score
masks = dict(result.masks)
tuned: nn.Module = allot.fold(allot.attach(sparse, masks))
version: str = allot.__version__
print(result, result.headline, result.plot(), names, agreement, size, ok, dense, version, tuned)
"""
WRONG = {
    'allot.prune(model, loader, "sparsity=0.9", batch_norm="frosen")': "batch_norm",
    'allot.prune(model, 3, "sparsity=0.9")': "prune",
    "result.layers[0].densities": "densities",
}


@pytest.mark.slow
def test_a_users_script_passes_mypy_strict_and_mistakes_do_not(tmp_path: Path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(SCRIPT + "\n".join(WRONG))
    source = str(Path(allot.__file__).parent.parent)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        str(tmp_path / "cache"),
        "script.py",
        "wrong.py",
    ]
    environment = os.environ | {"MYPYPATH": source}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    lines = ran.stdout.splitlines()
    assert [line for line in lines if line.startswith("script.py")] == []
    first = len(SCRIPT.splitlines()) + 1
    for number, about in enumerate(WRONG.values(), first):
        assert any(line.startswith(f"wrong.py:{number}: error") and about in line for line in lines), (about, lines)
