"""Weights of checkpoints as the world writes them, loaded into the model that they belong to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import allot
from allot.sources.weights import fill


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


torch.manual_seed(0)
STATE = net().state_dict()


def named(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


INSIDE = {name.replace("0.", "0._orig_mod.", 1) if name.startswith("0.") else name: v for name, v in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        named("_orig_mod."),
        named("module."),
        named("module._orig_mod."),
        named("_orig_mod.module."),
        named("model."),
        named("net.backbone."),
        INSIDE,
        {**named("module."), "n_averaged": torch.tensor(3)},
        {**STATE, "0._extra_state": {"amax": 1.0}},
        {"state_dict_ema": STATE, "state_dict": named("x."), "epoch": 3},
        {"state_dict": named("model."), "pytorch-lightning_version": "2.4"},
        {"model": {"state_dict": named("module._orig_mod.")}},
    ],
)
def test_wrapped_and_enclosed_weights_are_taken(content: dict[str, Any], tmp_path: Path):
    torch.save(content, tmp_path / "w.pt")
    fill(model := net(), tmp_path / "w.pt")
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


def test_prefixes_go_from_safetensors_too(tmp_path: Path):
    safetensors.torch.save_file(named("module._orig_mod."), tmp_path / "w.safetensors")
    fill(model := net(), tmp_path / "w.safetensors")
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


def test_a_model_that_has_the_prefix_itself_keeps_it(tmp_path: Path):
    torch.save({f"model.{name}": value for name, value in STATE.items()}, tmp_path / "w.pt")
    fill(model := nn.ModuleDict({"model": net()}), tmp_path / "w.pt")
    assert all(torch.equal(value, STATE[name]) for name, value in model["model"].state_dict().items())


def test_averaged_weights_are_taken_before_others_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    torch.save({"state_dict": {n: v + 1 for n, v in STATE.items()}, "state_dict_ema": STATE}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING, "allot"):
        fill(model := net(), tmp_path / "w.pt")
    assert "state_dict_ema is taken" in caplog.text and torch.equal(model.state_dict()["0.bias"], STATE["0.bias"])


def test_other_names_are_listed_as_the_file_has_them(tmp_path: Path):
    torch.save({"model.other.weight": torch.zeros(2), "model.0.weights": torch.zeros(4, 4)}, tmp_path / "w.pt")
    with pytest.raises(allot.UsageError, match=r"not in the model: model\.other\.weight, model\.0\.weights"):
        fill(net(), tmp_path / "w.pt")


class Scaled(nn.Linear):
    def get_extra_state(self) -> dict[str, float]:
        return {"amax": 1.0}

    def set_extra_state(self, state: dict[str, float]) -> None:
        pass


def test_the_absence_of_extra_state_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "allot"):
        result = allot.prune(nn.Sequential(Scaled(4, 4)), None, 0.5, repair="none", save_to=tmp_path / "x")
    assert "not saved, because no tensor: 0._extra_state" in caplog.text
    assert "0._extra_state" in result.state_dict() and "0._extra_state" not in allot.load(tmp_path / "x")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_tied_model_loads_strictly_with_and_without_allot(tmp_path: Path):
    result = allot.prune(Tied(), None, 0.5, repair="none", save_to=tmp_path / "x")
    (first, second), wanted = (Tied(), Tied()), result.model().head.weight
    first.load_state_dict(allot.load(tmp_path / "x"), strict=True)
    safetensors.torch.load_model(second, tmp_path / "x" / "model.safetensors", strict=True)
    assert torch.equal(first.head.weight, wanted) and torch.equal(second.embed.weight, wanted)
