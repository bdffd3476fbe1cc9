"""Answers are compared as they are given: of any type, drawn alike, with nan where there was nan, inputs untouched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError, VerificationError
from allot.export.certificate.certificate import verify
from allot.export.export import export, export_run
from allot.export.runtimes import answers
from allot.export.runtimes.answers import off
from allot.network.trees import cloned, floats_in, tensors_in

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[1.0, 3.0]], [[1.0, 2.0]], 0.5),
        ([[NAN, 2.0]], [[NAN, 2.0]], 0.0),
        ([[1.0, NAN]], [[NAN, 1.0]], NAN),
        ([[1.0, NAN]], [[1.0, 2.0]], NAN),
        ([[INF, -INF]], [[INF, -INF]], 0.0),
        ([[INF, -INF]], [[INF, INF]], INF),
        ([[]], [[]], INF),
        ([], [], INF),
        ([[], [1.0]], [[], [1.0]], 0.0),
        ([[1.0]], [[1.0], [2.0]], INF),
        ([[1.0, 1.0]], [[1.0]], INF),
        ([[[1.0]]], [[1.0]], INF),
        ([[0.0]], [[0.0]], 0.0),
    ],
)
@pytest.mark.parametrize("piece", [1, 2**22])
def test_how_far_off_answers_are(found: Any, wanted: Any, error: float, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "PIECE", piece)
    assert off([torch.tensor(a) for a in found], [torch.tensor(b) for b in wanted]) == pytest.approx(error, nan_ok=True)


def test_answers_compared_in_pieces_are_as_far_off_as_whole(monkeypatch: pytest.MonkeyPatch):
    draw = torch.Generator().manual_seed(0)
    wanted = [torch.randn(3, 5, 7, generator=draw), torch.randn(4, dtype=torch.complex64, generator=draw)]
    found = [tensor + 0.01 * torch.randn(tensor.shape, generator=draw) for tensor in wanted]
    whole = off(found, wanted)
    monkeypatch.setattr(answers, "PIECE", 4)
    assert off(found, wanted) == whole > 0


@dataclass
class Answer:
    """What some models return."""

    logits: Tensor
    more: Any = None


torch.export.register_dataclass(Answer, serialized_type_name="test_answers.Answer")


def test_tensors_are_found_wherever_they_are():
    a, b, c = torch.ones(1), torch.ones(2).int(), torch.ones(3)
    tree = [Answer(a, {"x": (b, None, "text")}), 3, [Answer(c), Answer]]
    assert [each.numel() for each in tensors_in(tree)] == [1, 2, 3] and floats_in(tree) == [a, c]
    copy = cloned({"x": (a, [b], 3)})
    copy["x"][0].zero_()
    assert a == 1 and torch.equal(copy["x"][1][0], b) and copy["x"][2] == 3


class Plain(nn.Module):
    """A linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Told(Plain):
    """Answers with a dataclass."""

    def forward(self, x: Tensor) -> Any:
        return Answer(self.inner(x), {"most": self.inner(x).argmax(1)})


class Noisy(Plain):
    """Draws in eval mode too."""

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + 0.1 * torch.randn_like(x[:, :1])


class Undefined(Plain):
    """Answers with nan in places."""

    def forward(self, x: Tensor) -> Any:
        return torch.where(x[:, :1] > 0, self.inner(x), torch.full((), NAN))


class Inplace(Plain):
    """Writes into what it is given."""

    def forward(self, x: Tensor) -> Any:
        return self.inner(x.mul_(2).add_(1))


def pruned(kind: type[Plain], run: Path) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(5, 8)
    return model, x, allot.prune(model, cloned(x), "sparsity=0.5", repair="none", save_to=run).report()


@pytest.mark.parametrize("kind", [Told, Noisy, Undefined, Inplace])
@pytest.mark.parametrize("form", ["safetensors", "bitmask", "csr", "program"])
def test_a_model_of_any_manners_is_exported_and_verified(kind: type[Plain], form: str, tmp_path: Path):
    model, x, report = pruned(kind, tmp_path / "run")
    before = x.clone()
    row = export_run(model, tmp_path / "run", report, x, form, tmp_path / f"away.{form}")
    assert row["error"] < 1e-5 and torch.equal(x, before)
    other = None if form == "program" else kind()
    assert verify(row["file"], other, trust=True)["passed"] and verify(row["file"])["passed"]


def test_what_draws_at_random_is_said_where_a_runtime_draws_otherwise(tmp_path: Path):
    with pytest.raises(UsageError, match="draws at random in eval mode"):
        export(Noisy(), torch.randn(5, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [Undefined, Inplace])
def test_a_runtime_is_compared_in_the_same_way(kind: type[Plain], tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    before = x.clone()
    export(kind(), x, tmp_path / "model.onnx")
    assert torch.equal(x, before) and verify(tmp_path / "model.onnx")["passed"]


def test_an_example_without_a_sample_and_answers_without_a_number_are_refused(tmp_path: Path):
    class Nothing(Plain):
        def forward(self, x: Tensor) -> Any:
            return self.inner(x)[:0]

    with pytest.raises(UsageError, match=r"shape \[0, 8\] holds no sample"):
        export(nn.Linear(8, 6), torch.randn(0, 8), tmp_path / "model.pt2")
    with pytest.raises(UsageError, match="there is nothing to compare"):
        export(Nothing(), torch.randn(2, 8), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["csr", "bitmask"])
def test_a_file_that_is_refused_leaves_nothing_in_the_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib

    exporting = importlib.import_module("allot.export.export")
    model, x, report = pruned(Plain, tmp_path / "run")
    there = {path.name for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(exporting, "opened_with", lambda model, path: exporting.Opened.module(Plain()))
    with pytest.raises(VerificationError, match="answers otherwise than the run's model"):
        export_run(model, tmp_path / "run", report, x, form, None if form == "csr" else tmp_path / "away.safetensors")
    assert {path.name for path in (tmp_path / "run").iterdir()} == there
    assert not (tmp_path / "away.safetensors").exists()
