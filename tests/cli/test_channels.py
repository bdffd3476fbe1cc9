"""Channels on the command line: pruned, planned, verified, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import allot
from allot.export.timing import latency as timing
from allot.sources import zoo
from cli.command import NET, done, refused
from export.timing.test_latency import work

SHORT = "--method dsa --repair bn --samples 16 --batch-size 16 --set options.dsa.steps=2"


@pytest.fixture
def pruned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of one run; where a run lies does not matter."""
    made = tmp_path_factory.getbasetemp() / "channels" / "RUN"
    if not made.exists():
        done(f"prune {NET} --data {NET} --budget macs=50% {SHORT} --out {made}")
    shutil.copytree(made, "RUN")
    return "RUN"


def test_a_channel_run_says_what_each_group_keeps_and_verifies(pruned: str):
    report = json.loads(Path("RUN/report.json").read_text())
    assert report["pattern"] == "channels" and len(report["groups"]) == 12
    assert report["macs"]["sparse"] <= report["macs"]["dense"] / 2
    assert report["bytes"]["file"] == Path("RUN/model.slim.safetensors").stat().st_size
    assert done("verify RUN --json").json["passed"]
    assert "model.slim.safetensors" in {row["file"] for row in done("verify RUN --json").json["rows"]}
    assert done("evaluate RUN --json").json["samples"] == report["scores"]["samples"]


def test_export_writes_opens_compares_and_times(pruned: str):
    row = done("export RUN --to program --json").json
    assert row["form"] == "program" and Path(row["file"]) == Path("RUN/model.pt2")
    assert row["bytes"] == Path("RUN/model.pt2").stat().st_size < row["dense_bytes"]
    assert row["error"] < 1e-5 and row["params"] < row["dense_params"]
    assert row["faster"] == pytest.approx(row["milliseconds"]["dense"] / row["milliseconds"]["sparse"])
    shown = done("export RUN --to slim --out COPY").err
    assert "COPY/model.slim.safetensors" in shown and "opened again" in shown
    slim = allot.load_slim(lambda: zoo.model("digits-resnet20"), "COPY")
    assert sum(parameter.numel() for parameter in slim.parameters()) == row["params"]


def test_what_cannot_be_exported_is_one_clear_line(pruned: str):
    assert "unknown form of export 'tflite'" in refused("export RUN --to tflite")
    assert "is no run directory" in refused("export NOWHERE --to slim")
    done(f"prune {NET} --data {NET} --budget sparsity=0.5 --method erk --repair none --samples 16 --out ZEROS")
    assert "ZEROS pruned single weights: slim is for runs of channels" in refused("export ZEROS --to slim")


def test_a_plan_of_channels_needs_no_data():
    plan = done(f"plan {NET} --budget macs=30% --allocate uniform --pattern channels:8 --json").json
    assert plan["pattern"] == "channels:8" and plan["budget"][0]["met"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--allocate erk --pattern channels", "erk cannot share out channels"),
        ("--method dsa --pattern 2:4", "dsa cannot share out weights"),
        ("--method dsa --score wanda", "unknown score 'wanda'"),
        ("--method dsa --pattern channels:0", "channels:0"),
        ("--method dsa --floor 2/row", "channels have no rows"),
        ("--method dsa --exclude nothing.*", "matches no group of channels"),
    ],
)
def test_parts_that_do_not_fit_are_one_clear_line(options: str, said: str):
    code = 3 if "/row" in options else 2
    assert said in refused(f"prune {NET} --data {NET} --budget macs=50% {options} --out RUN", code)


def test_a_budget_of_time_is_planned_met_and_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "timed", work)  # a clock that counts multiply-accumulates
    plan = done(f"plan {NET} --budget latency=60% --pattern channels --method uniform --runtime torch --json").json
    row = plan["budget"][0]
    assert row["kind"] == "latency" and row["met"] and row["achieved"] <= row["limit"]
    made = done(f"prune {NET} --data {NET} --budget latency=60% {SHORT} --runtime torch:2 --out RUN")
    assert "ms a batch of 2, torch, measured" in made.err and "foretold" in made.err
    taken = json.loads(Path("RUN/report.json").read_text())["latency"]
    assert taken["sparse_ms"] <= taken["limit_ms"] < taken["dense_ms"]
    assert done("verify RUN --json").json["passed"]
    assert "latency=60%" in done("verify RUN").err
    assert "tensorrt" in refused(
        f"plan {NET} --budget latency=60% --pattern channels --method uniform --runtime tensorrt", 2
    )
