"""A text classifier is pruned whole: embedding, recurrent layer and head; a report says which share is in scope."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import allot
from allot.network.layers import Rules
from allot.report.table import run_table


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12, padding_idx=0)
        self.lstm = nn.LSTM(12, 10, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.embed(tokens))[0].mean(1))
        return out


def tokens(samples: int = 12) -> Tensor:
    return torch.arange(samples * 7).view(samples, 7) * 5 % 50


def weights_of(model: nn.Module) -> list[Tensor]:
    return [value for value in model.parameters() if value.dim() > 1]


def printed(report: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(run_table(report))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


EVERYTHING = Rules(include=("*",))


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_sparsity_is_that_of_all_weights_where_all_are_included(score: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TextClassifier()
    result = allot.prune(
        model, tokens(), "sparsity=0.9", rules=EVERYTHING, allocate="erk", score=score, repair="none",
        save_to=tmp_path / "run",
    )  # fmt: skip
    total = sum(value.numel() for value in weights_of(model))
    pruned = result.model()
    assert sum(int(torch.count_nonzero(value)) for value in weights_of(pruned)) <= round(0.1 * total)
    assert sum(result.allocation.kept.values()) == round(0.1 * total)
    assert result.verify()["passed"]
    assert "weights of the model" not in printed(result.report())
    saved = TextClassifier()
    saved.load_state_dict(allot.load(tmp_path / "run"))
    assert torch.equal(saved(tokens()), pruned(tokens()))
    assert not torch.equal(pruned(tokens()), model(tokens()))


def test_what_is_in_scope_is_said_as_a_share_of_the_model() -> None:
    model = TextClassifier()
    result = allot.prune(model, tokens(), "sparsity=0.5", allocate="uniform", repair="none")
    report = result.report()
    assert report["weights"] == sum(value.numel() for value in weights_of(model)) == 4840
    assert report["total"] == 4840 - 600
    assert "in scope: 87.60 % of the 4,840 weights of the model" in printed(report)
    assert "less than half" not in printed(report)
    few = allot.prune(model, tokens(), "sparsity=0.5", rules=Rules(include=("head",)), repair="none").report()
    assert "in scope: 1.65 % of the 4,840 weights of the model; less than half: the budget" in printed(few)


@pytest.mark.parametrize("pattern", ["2:4", "n:4"])
def test_patterns_lie_along_the_inputs_of_each_gate(pattern: str) -> None:
    model = nn.Sequential(nn.LSTM(8, 4))
    result = allot.prune(model, torch.randn(6, 5, 8), "sparsity=0.5", pattern=pattern, repair="none")
    pruned = result.model()
    for layer in result.problem.scope:
        groups = pruned.get_parameter(layer.name).unflatten(1, (-1, 4))
        kept = int(torch.count_nonzero(groups, -1).max())
        assert kept <= 2 or pattern == "n:4"
    assert sum(int(torch.count_nonzero(value)) for value in weights_of(pruned)) == 96


def test_macs_of_recurrent_layers_count_for_the_budget() -> None:
    model = TextClassifier()
    result = allot.prune(model, tokens(), "macs=30%", repair="none")
    dense = 7 * 2 * (4 * 10 * (12 + 10) + 4 * 10 * (20 + 10)) + 80  # a sample: steps, directions, gates, sides; head
    report = result.report()
    assert report["macs"]["dense"] == dense
    assert report["macs"]["sparse"] <= 0.3 * dense


def test_recurrent_layers_stay_whole_where_channels_are_removed() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.GRU(6, 4))
    result = allot.prune(
        net, torch.randn(9, 3, 6), "sparsity=0.3", pattern="channels", allocate="uniform", repair="none"
    )
    assert {layer.name for layer in result.problem.scope} == {"0.weight", "2.weight"}
    reason = "recurrent weights stay whole where channels are removed"
    assert result.problem.scope.skipped["3.weight_hh_l0"] == reason


def test_trained_repairs_train_recurrent_weights_and_those_of_single_layers_leave_them() -> None:
    torch.manual_seed(0)
    model = TextClassifier()
    trained = allot.prune(
        model, tokens(), "sparsity=0.5", rules=EVERYTHING, repair="distill", options={"distill": {"steps": 3}}
    )
    left = allot.prune(model, tokens(), "sparsity=0.5", rules=EVERYTHING, repair="bias,lstsq,layerwise,variance")
    dense = dict(model.named_parameters())
    for name, value in trained.model().named_parameters():
        if value.dim() > 1:
            kept = value != 0
            assert not torch.equal(value[kept], dense[name][kept])
    for name, value in left.model().named_parameters():
        if "lstm" in name or "embed" in name:
            kept = value != 0
            assert torch.equal(value[kept], dense[name][kept])
