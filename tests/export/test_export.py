"""Exported models answer as what they were made from, whatever the batch size; timings take turns."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError, VerificationError
from allot.export.certificate.certificate import verify
from allot.export.export import export, export_run
from allot.export.runtimes.forms import FORMS
from allot.export.runtimes.opened import Form, Opened
from allot.export.timing import clock
from allot.export.timing.clock import timed
from allot.pruning.prune import prune
from contract.cases import CASES

BUDGETS = {"with batch norm": "macs=40%", "attention": "params=60%"}


@pytest.fixture(scope="module")
def slim() -> dict[str, nn.Module]:
    found = {}
    for name, budget in BUDGETS.items():
        case = CASES[name]
        result = allot.prune(case.make(), case.inputs(), budget, allocate="uniform", pattern="channels", repair="none")
        found[name] = result.slim()
    return found


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


# one export a case and form: each takes seconds


@pytest.mark.parametrize("case", BUDGETS)
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_slim_model_that_was_exported_answers_as_before_for_any_batch(
    slim: dict[str, nn.Module], case: str, ending: str, tmp_path: Path
):
    model, path = slim[case].train(), tmp_path / f"model{ending}"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opened = export(model, CASES[case].inputs(1), path)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert opened.bytes == path.stat().st_size > sum(4 * value.numel() for value in model.parameters())
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.probe.safetensors"}
    again = FORMS[{".pt2": "program", ".onnx": "onnx"}[ending]].open(path)
    assert again.bytes == opened.bytes and verify(path, trust=True)["passed"]
    for samples in (1, 2, 5, 17):
        x = CASES[case].inputs(samples)
        for run in (opened.run, again.run):
            [found] = run(x)
            assert torch.allclose(found, answers(model, x), atol=1e-5)


class Several(nn.Module):
    """Inputs by keyword, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        both = self.left(a) + self.right(b)
        return {"logits": both, "parts": (both[:, 0], both[:, 1])}


@pytest.mark.parametrize("keywords", [True, False])
def test_several_inputs_and_outputs_go_through(keywords: bool, tmp_path: Path):
    model = Several()
    a, b = torch.randn(4, 3), torch.randn(4, 2)
    example: Any = {"a": a, "b": b} if keywords else (a, b)
    opened = export(model, example, tmp_path / "model", to="program")
    more: Any = {"a": a[:3], "b": b[:3]} if keywords else (a[:3], b[:3])
    logits, first, second = opened.run(more)
    assert torch.allclose(logits, answers(model.left, a[:3]) + answers(model.right, b[:3]), atol=1e-6)
    assert torch.equal(logits[:, 0], first) and torch.equal(logits[:, 1], second)


class FixedBatch(nn.Module):
    """Takes batches of four alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1).sum(1)


def test_a_model_that_takes_one_batch_size_is_exported_for_that(tmp_path: Path):
    x = torch.randn(4, 6)
    opened = export(FixedBatch(), x, tmp_path / "model.pt2")
    assert torch.allclose(opened.run(x)[0], x.sum(1), atol=1e-6)


# refused


class Branching(nn.Module):
    """Looks at values to decide what to do."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


class Shy(nn.Module):
    """Fails without a word when it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise NotImplementedError
        return x


def test_a_model_that_cannot_be_captured_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UsageError, match=r"Branching cannot be captured by torch\.export: .") as refused:
        export(Branching(), torch.ones(2, 3), tmp_path / "model.pt2")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_capture_that_fails_without_a_word_is_refused_all_the_same(tmp_path: Path):
    with pytest.raises(UsageError, match="Shy cannot be captured"):
        export(Shy(), torch.ones(2, 3), tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("name", "to", "about"),
    [
        ("model.bin", None, "unknown form of export '.bin'"),
        ("model", None, "unknown form of export ''"),
        ("model.pt2", "onx", "did you mean 'onnx'"),
        ("model.pt2", "", "Accepted: hf, onnx, openvino, program"),
    ],
)
def test_an_unknown_form_is_refused_before_anything_is_written(name: str, to: str | None, about: str, tmp_path: Path):
    with pytest.raises(UsageError, match=about) as refused:
        export(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / name, to=to)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else real(name, *rest)
    )
    with pytest.raises(UsageError, match=r"onnx, onnxscript is not installed: pip install 'allot\[onnx\]'"):
        export(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot write") as refused:
        export(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "nowhere" / "model.pt2")
    assert "\n" not in str(refused.value)


# held to the model


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], list[Tensor]]], None]:
    """Lets the runtime of "program" answer as it is told."""

    def answer(run: Callable[[Tensor], list[Tensor]]) -> None:
        opened = Opened(run, 5, lambda: iter(()), lambda example: 0)
        form = Form(".pt2", lambda model, example, path: path.write_bytes(b"model"), lambda path: opened)
        monkeypatch.setitem(FORMS, "program", form)

    return answer


@pytest.mark.parametrize("off", [1e-3, -1.0, float("nan"), float("inf")])
def test_a_file_that_answers_otherwise_is_refused(off: float, answering: Any, tmp_path: Path):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    answering(lambda example: [answers(model, example) + torch.tensor([0, 1]) * off])
    with pytest.raises(VerificationError, match="answers otherwise than the model") as refused:
        export(model, x, tmp_path / "model.pt2")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_is_measured_by_the_largest_output(scale: float, answering: Any, tmp_path: Path):
    model, x = nn.Linear(3, 2), scale * torch.randn(4, 3)
    model.bias.data.zero_()
    largest = answers(model, x).abs().max()
    answering(lambda example: [answers(model, example) + 0.5e-4 * largest])
    assert export(model, x, tmp_path / "model.pt2").bytes == 5


# timed


def test_what_is_timed_takes_turns_each_after_a_call_that_does_not_count():
    order: list[str] = []
    found = timed({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0, least=4)
    assert "".join(order) == "aabbcc" * 4
    assert list(found) == ["a", "b", "c"] and all(seconds >= 0 for seconds in found.values())


def test_timing_goes_on_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch):
    now, ends = [0.0], []

    def take() -> None:
        now[0] += 0.25
        ends.append(now[0])

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    timed({"one": take}, seconds=2.0, least=1)
    assert ends[-1] == 2.0


def test_the_median_is_told_and_not_the_calls_that_do_not_count(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    some = {"slow": [3, 9, 2, 4, 50], "fast": [2, 1, 7, 1, 3]}
    durations = {name: iter([second for own in each for second in (100.0, own)]) for name, each in some.items()}

    def take(name: str) -> None:
        now[0] += next(durations[name])

    found = timed({name: lambda name=name: take(name) for name in durations}, seconds=0, least=5)
    assert found == {"slow": 4, "fast": 2}


def test_a_program_holds_nothing_that_was_pickled(tmp_path: Path):
    path = tmp_path / "model.pt2"
    export(nn.Linear(3, 2).eval(), torch.ones(2, 3), path)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()
        assert [name for name in archive.namelist() if archive.read(name)[:2] in (b"PK", b"\x80\x02")] == []


@pytest.mark.parametrize("case", ["with batch norm", "attention"])
def test_the_macs_of_a_slim_file_are_counted_again_and_held_to_the_report(tmp_path: Path, case: str):
    made = CASES[case]
    result = prune(
        made.make(), made.inputs(), "macs=60%", allocate="uniform", pattern="channels", repair="none", save_to=tmp_path
    )
    report = result.report()
    row = export_run(made.make(), tmp_path, report, made.inputs(1), "slim")
    assert (row["macs"], row["dense_macs"]) == (report["macs"]["sparse"], report["macs"]["dense"])
    other = {**report, "macs": {**report["macs"], "sparse": report["macs"]["sparse"] + 1}}
    with pytest.raises(VerificationError, match="MACs; the run promised"):
        export_run(made.make(), tmp_path, other, made.inputs(1), "slim")
