"""A budget is printed beside what it means for the whole model, and less than half of it in scope is a warning."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import allot
from allot.network.layers import Rules
from allot.report import table
from allot.report.comparison import comparison_page

INPUTS = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def pruned(rules: Rules | None = None, inputs: torch.Tensor | None = INPUTS, **given) -> allot.Result:
    budget = given.pop("budget", "sparsity=0.5")
    return allot.prune(net(), inputs, budget, rules=rules, repair="none", allocate="uniform", **given)


def printed(renderable) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


WEIGHTS = 8 * 32 + 32 * 32 + 32 * 4
FEW = Rules(include=("0", "4"))  # 384 of 1,408


def test_the_report_counts_weights_and_macs_of_the_whole_model(tmp_path: Path):
    report = pruned(FEW, save_to=tmp_path / "run").report()
    assert report["whole"]["weights"] == {"dense": WEIGHTS, "sparse": WEIGHTS - 192}
    assert report["whole"]["macs"] == {"dense": WEIGHTS, "sparse": WEIGHTS - 192}
    sizes = [(tmp_path / "run" / name).stat().st_size for name in ("model.safetensors", "model.bitmask.safetensors")]
    assert list(report["whole"]["bytes"].values()) == sizes


def test_the_size_of_the_file_is_predicted_before_it_is_written(tmp_path: Path):
    predicted = pruned().report()["whole"]["bytes"]["sparse"]
    pruned(save_to=tmp_path / "run")
    assert predicted == pytest.approx((tmp_path / "run" / "model.bitmask.safetensors").stat().st_size, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"budget": "macs=50%", "pattern": "channels"}])
def test_the_dense_file_has_the_size_that_was_predicted(options: dict[str, str], tmp_path: Path):
    predicted = pruned(**options).report()["whole"]["bytes"]["dense"]
    pruned(**options, save_to=tmp_path / "run")
    assert predicted == (tmp_path / "run" / "model.safetensors").stat().st_size


def test_weights_that_go_with_channels_are_counted_wherever_they_are():
    result = pruned(budget="macs=50%", pattern="channels")
    whole = result.report()["whole"]
    assert whole["weights"]["sparse"] == sum(p.numel() for p in result.slim().parameters() if p.dim() > 1)
    assert whole["macs"]["sparse"] == result.report()["macs"]["sparse"]


def test_tables_say_what_is_left_of_the_whole_model(tmp_path: Path):
    text = printed(table.run_table(pruned(FEW, save_to=tmp_path / "run").report()))
    (weights,) = (line for line in text.splitlines() if "weights of the whole model" in line)
    assert "1,408" in weights and "1,216" in weights and "86.36 %" in weights
    assert "MACs of the whole model" in text and "bytes of the whole model" in text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "of the whole model: weights kept" in page and "1,216 of 1,408; MACs 1,216 of 1,408" in page


def test_runs_side_by_side_show_the_share_of_the_whole_model(tmp_path: Path):
    reports = [(name, pruned(rules).report()) for name, rules in (("few", FEW), ("all", None))]
    text = printed(table.comparison_table(reports))
    assert "of model" in text and "0.1364" in text
    assert comparison_page(reports).count("of the whole model") == 1


def test_macs_that_nobody_counted_are_unknown_and_not_left_out():
    report = pruned(inputs=None).report()
    assert report["whole"]["macs"] is None
    (macs,) = (line for line in printed(table.run_table(report)).splitlines() if "MACs of the whole model" in line)
    assert "unknown" in macs and "no input" in macs


def test_less_than_half_in_scope_is_a_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "allot"):
        pruned(FEW)
    assert "in scope: 27.3 % of the model's weights (384 of 1,408)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "allot"):
        pruned(Rules(exclude=("0",)))
    assert "in scope" not in caplog.text
