"""The largest sparsity that keeps a score: bisection over runs that resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allot
from allot import Stopped, UsageError, search
from contract.cases import CASES

CASE = CASES["with batch norm"]
MODEL = CASE.make().eval()
X = CASE.inputs(24)
TEST = list(zip(X, MODEL(X).argmax(1), strict=True))
SHORT = {"method": "fcpts", "options": {"fcpts": {"steps": 4}}, "batch_size": 8}


def removed(model: nn.Module, data: Any) -> dict[str, float]:
    """A score that says how much of the model is left: an oracle for the search."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return {"left": sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)}


def searched(out: Path, **settings: Any) -> dict[str, Any]:
    return search(MODEL, X, out, **{"test": TEST, "max_drop": "30pt", "repair": "none", **settings})


def test_the_search_closes_in_on_the_largest_share_that_keeps_the_score(tmp_path: Path):
    table = searched(tmp_path, metric=removed, runs=5)
    tried = [row["removed"] for row in table["cells"]]
    assert tried == [0.5, 0.25, 0.375, 0.3125, 0.28125]
    assert [row["met"] for row in table["cells"]] == [share <= 0.3 for share in tried]
    assert table["best"] == "sparsity-0.28125" and table["max_drop"] == "30pt"
    assert json.loads((tmp_path / "results.json").read_text()) == table
    assert (tmp_path / "report.html").exists()
    for row in table["cells"]:  # every run is an ordinary one, with its verdict
        report = json.loads((tmp_path / row["run"] / "report.json").read_text())
        assert report["guarantees"][0]["met"] == row["met"] and report["scores"]["sparse"] == row["sparse"]
    assert allot.verify(tmp_path / table["best"])["passed"]


def test_macs_are_searched_as_what_is_left(tmp_path: Path):
    table = searched(tmp_path, metric=removed, kind="macs", runs=3, max_drop="99%")
    assert [row["budget"] for row in table["cells"]] == ["macs=50%", "macs=25%", "macs=12.5%"]
    assert table["best"] == "macs-12.5%" and table["cells"][-1]["met"]


def test_a_search_stopped_anywhere_and_started_again_equals_one_that_was_not(tmp_path: Path):
    whole = searched(tmp_path / "whole", runs=3, max_drop="20pt", **SHORT)
    for stop in (3, 9):
        calls = iter(range(10**6))
        with pytest.raises(Stopped):
            searched(
                tmp_path / "part", runs=3, max_drop="20pt", **SHORT,
                should_stop=lambda calls=calls, stop=stop: next(calls) >= stop,
            )  # fmt: skip
        assert not (tmp_path / "part/results.json").exists()
    assert searched(tmp_path / "part", runs=3, max_drop="20pt", **SHORT) == whole
    for row in whole["cells"]:
        left, right = (tmp_path / which / row["run"] / "model.safetensors" for which in ("whole", "part"))
        assert left.read_bytes() == right.read_bytes()


def test_more_runs_and_another_floor_use_the_runs_that_are_there(tmp_path: Path):
    searched(tmp_path, metric=removed, runs=2)
    begun = {path: (path / "model.safetensors").stat().st_mtime_ns for path in tmp_path.glob("sparsity-*")}
    table = searched(tmp_path, metric=removed, runs=3, max_drop="60pt")
    assert [row["met"] for row in table["cells"]] == [True, False, False] and table["best"] == "sparsity-0.5"
    half = tmp_path / "sparsity-0.5"
    assert (half / "model.safetensors").stat().st_mtime_ns == begun[half]


def test_a_budget_that_cannot_be_met_counts_as_not_kept(tmp_path: Path):
    table = searched(tmp_path, metric=removed, runs=3, max_drop="99%", rules=allot.Rules(min_density={"*": 0.4}))
    assert [(row["removed"], row["met"]) for row in table["cells"]] == [(0.5, True), (0.75, False), (0.625, False)]
    assert "error" in table["cells"][1] and table["best"] == "sparsity-0.5"


def test_no_share_that_keeps_the_score_is_no_best(tmp_path: Path):
    assert searched(tmp_path, metric=removed, runs=2, max_drop="1pt")["best"] is None


def test_what_cannot_be_searched_is_refused(tmp_path: Path):
    for settings, told in (
        ({"kind": "bytes"}, "kind='bytes': sparsity or macs"),
        ({"runs": 0}, "runs=0"),
        ({"max_drop": "much"}, "max-drop=much"),
        ({"max_drop": 0.5}, "may mean points or shares"),
    ):
        with pytest.raises(UsageError, match=told):
            searched(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert torch.equal(X, CASE.inputs(24))
