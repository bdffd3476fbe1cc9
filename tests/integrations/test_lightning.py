"""The callback for Lightning, with its Trainer where it is installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import allot
from allot.errors import UsageError


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def batches() -> DataLoader[Any]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)


@pytest.mark.filterwarnings("ignore")  # of Lightning, about this machine
def test_zeros_stay_in_the_model_and_in_the_checkpoint_and_are_logged(tmp_path: Path):
    lightning: Any = pytest.importorskip("lightning.pytorch")
    from allot.integrations.lightning import KeepZeros

    result = allot.prune(net(), None, "sparsity=0.5", method="erk", repair="none")

    class Tuned(lightning.LightningModule):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.net = inner

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    module = Tuned(result.model())
    keys = list(module.state_dict())
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[KeepZeros(module.net, result.masks)], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, batches())
    assert trainer.callback_metrics["sparsity"].item() == pytest.approx(0.5)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"]
    assert list(saved) == list(module.state_dict()) == keys
    for name, mask in result.masks.items():
        assert not saved[f"net.{name}"][~mask].any()
        assert not torch.equal(saved[f"net.{name}"], result.state_dict()[name])


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "allot.integrations.lightning", raising=False)
    with pytest.raises(UsageError, match="pip install lightning"):
        importlib.import_module("allot.integrations.lightning")
