"""The callback for the Trainer of Hugging Face, with that Trainer; it needs accelerate."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import allot
from allot.errors import UsageError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def language_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def texts(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Counting up from any number, which is easy to learn."""
    ids = [(torch.arange(8) + start) % 16 for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture(scope="module")
def result() -> allot.Result:
    return allot.prune(language_model(), None, "sparsity=0.5", method="erk", repair="none")


def trained(model: Any, callback: Any, folder: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=4, save_steps=4,
        report_to=[], disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=texts(), callbacks=[callback])
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")  # of the Trainer, about this machine
def test_zeros_stay_in_the_model_and_in_every_checkpoint_and_the_log_shows_them(result: allot.Result, tmp_path: Path):
    from allot.integrations.transformers import KeepZeros

    model = result.model()
    keys = list(model.state_dict())
    trainer = trained(model, KeepZeros(model, result.masks), tmp_path)
    assert list(model.state_dict()) == keys
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any() and not torch.equal(weight, result.state_dict()[name])
    shown = [row["sparsity"] for row in trainer.state.log_history if "loss" in row]
    assert len(shown) == 2 and shown == pytest.approx([0.5, 0.5], abs=1e-6)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(not opened.get_parameter(name)[~mask].any() for name, mask in result.masks.items())
    model(**texts(1)[0] | {"input_ids": texts(1)[0]["input_ids"][None], "labels": None}).logits.sum().backward()
    assert any(bool(model.get_parameter(name).grad[~mask].any()) for name, mask in result.masks.items())  # released


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_opened_from_a_checkpoint_needs_no_masks(result: allot.Result, tmp_path: Path):
    from allot.integrations.transformers import KeepZeros

    result.model().save_pretrained(tmp_path / "sparse")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    trained(model, KeepZeros(model), tmp_path / "runs")
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in result.masks.items())


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "allot.integrations.transformers", raising=False)
    with pytest.raises(UsageError, match="transformers"):
        importlib.import_module("allot.integrations.transformers")
