"""A guarantee on the score: a run that misses it is finished, saved, and says by how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allot
from allot import GuaranteeMissed, UsageError, VerificationError
from contract.cases import CASES

CASE = CASES["with batch norm"]
MODEL = CASE.make().eval()
X = CASE.inputs(24)
TEST = list(zip(X, MODEL(X).argmax(1), strict=True))  # dense: all of them right


def run(out: Path | None, budget: str = "sparsity=0.9", **settings: Any) -> allot.Result:
    return allot.prune(MODEL, X, budget, method="uniform", repair="none", test=TEST, save_to=out, **settings)


def left(model: nn.Module, data: Any) -> float:
    """The share of the weights that are left: 0.1 at sparsity=0.9."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)


def drop() -> float:
    scores = run(None).report()["scores"]
    return scores["dense"] - scores["sparse"]


def test_a_missed_floor_is_an_error_after_the_run_was_saved(tmp_path: Path):
    lost = 100 * drop()
    assert lost > 10
    with pytest.raises(GuaranteeMissed, match=f"top1 fell by {lost:.2f} points.*5pt is allowed: missed by") as raised:
        run(tmp_path / "run", max_drop="5pt")
    error = raised.value
    assert isinstance(error, VerificationError) and error.exit_code == 4
    assert error.result.directory == tmp_path / "run" and error.result.verify()["passed"]
    report = json.loads((tmp_path / "run/report.json").read_text())
    (row,) = report["guarantees"]
    assert row["met"] is False and row["limit"] == pytest.approx(0.95) and row["found"] == report["scores"]["sparse"]
    page = (tmp_path / "run/report.html").read_text()
    assert "guaranteed: max-drop 5pt" in page and "missed" in page and row["text"] in page
    with pytest.raises(GuaranteeMissed, match="missed by"):  # the finished run, opened again
        run(tmp_path / "run", max_drop="5pt")


def test_a_floor_that_is_kept_is_on_record(tmp_path: Path):
    (row,) = run(tmp_path / "run", metric=left, max_drop="95pt").guarantees
    assert row["met"] and row["asked"] == "95pt" and row["limit"] == pytest.approx(0.05)
    assert json.loads((tmp_path / "run/report.json").read_text())["guarantees"] == [row]


def test_a_finished_run_gets_the_verdict_on_another_floor(tmp_path: Path):
    assert run(tmp_path / "run").guarantees == ()
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    with pytest.raises(GuaranteeMissed):
        run(tmp_path / "run", metric=left, max_drop="5pt")
    assert [row["met"] for row in json.loads((tmp_path / "run/report.json").read_text())["guarantees"]] == [False]
    result = run(tmp_path / "run", metric=left, max_drop="95pt")
    assert [row["met"] for row in json.loads((tmp_path / "run/report.json").read_text())["guarantees"]] == [True]
    assert "guaranteed: max-drop 95pt" in (tmp_path / "run/report.html").read_text()
    assert result.verify()["passed"] and (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_a_floor_holds_for_a_metric_where_lower_is_better(tmp_path: Path):
    with torch.no_grad():
        outputs = MODEL(X)

    def mse(model, data):
        with torch.no_grad():
            return 10 + float((model(X) - outputs).pow(2).mean())

    off = run(None, metric=mse).scores["sparse"] - 10
    assert off > 1e-3
    assert run(None, metric=mse, max_drop=2 * off).guarantees[0]["met"]
    with pytest.raises(GuaranteeMissed, match=r"mse rose by .* from 10 to"):
        run(None, metric=mse, max_drop=off / 2)


def test_a_floor_that_cannot_be_judged_is_refused_before_the_run(tmp_path: Path):
    with pytest.raises(UsageError, match="max-drop: there is nothing to score: give --test"):
        allot.prune(MODEL, X, "sparsity=0.5", max_drop="1pt")
    with pytest.raises(UsageError, match="may mean points or shares"):
        run(tmp_path / "run", max_drop=0.5)
    assert not (tmp_path / "run").exists()


# fidelity


def test_a_fidelity_that_is_too_low_is_an_error_after_the_run_was_saved(tmp_path: Path):
    with pytest.raises(GuaranteeMissed, match=r"the top class is that .*; 99% is asked: missed by"):
        allot.prune(MODEL, X, "sparsity=0.95", repair="none", min_fidelity="99%", save_to=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (verdict,) = report["guarantees"]
    assert verdict["kind"] == "min-fidelity" and not verdict["met"]
    assert verdict["found"] == report["fidelity"][-1]["agreement"]


def test_of_values_the_share_of_the_variance_counts():
    torch.manual_seed(0)
    net, inputs = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 6)
    made = allot.prune(net, inputs, "sparsity=0.1", repair="none", min_fidelity=0.2)
    (verdict,) = made.report()["guarantees"]
    assert verdict["met"] and verdict["found"] == pytest.approx(1 - made.report()["fidelity"][-1]["error"])
    with pytest.raises(GuaranteeMissed, match=r"outputs keep .* % of the variance on 16 inputs"):
        allot.prune(net, inputs, "sparsity=0.9", allocate="uniform", repair="none", min_fidelity=1)


@pytest.mark.parametrize("asked", ["95", "1.5", "-1", "1pt", "high", True])
def test_a_fidelity_is_a_share(asked: Any):
    with pytest.raises(UsageError, match="a share from 0 to 1, or like 95%"):
        allot.prune(MODEL, X, "sparsity=0.5", repair="none", min_fidelity=asked)


def test_fidelity_needs_inputs():
    with pytest.raises(UsageError, match="min-fidelity: there is nothing to compare on"):
        allot.prune(MODEL, None, "sparsity=0.5", repair="none", min_fidelity=0.5)
