"""What the zoo holds, and how a name becomes a net or a data set."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import resources

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from allot.errors import unknown
from allot.network.arguments import typed
from allot.sources.zoo import nets


@dataclass(frozen=True)
class DataSet:
    """A data set: how many classes, and the mean and standard deviation of its pixels on the scale 0..1."""

    classes: int
    mean: float
    std: float


@dataclass(frozen=True)
class TrainedNet:
    """A trained net: the factory that makes it from a number of classes, the data set, the number of classes."""

    net: Callable[[int], nn.Module]
    data: str
    classes: int


SPLITS = ("calibration", "validation", "test")

DATASETS = {
    "digits": DataSet(classes=10, mean=0.21, std=0.25),
    "glyph": DataSet(classes=62, mean=0.11, std=0.21),
}

MODELS = {
    "digits-resnet20": TrainedNet(nets.resnet20, "digits", 10),
    "glyph-resnet20": TrainedNet(nets.resnet20, "glyph", 62),
    "glyph-mobilenetv2": TrainedNet(nets.mobilenetv2, "glyph", 62),
    "glyph-vit": TrainedNet(nets.vit, "glyph", 62),
}


@typed
def model(name: str) -> nn.Module:
    """The trained net `name`, a new one at every call: eval mode, CPU, float32.

    Args:
        name: a key of `MODELS`. `cards/NAME.md` beside this file says how it was trained and what it scores.
    Returns:
        module that maps normalised pictures `[B, 1, 16, 16]` to logits `[B, classes]`.
    Raises:
        UsageError: no such net.
    """
    _check("model", name, MODELS)
    entry = MODELS[name]
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave the caller's stream alone
        net = entry.net(entry.classes)
    weights = resources.files("allot.sources.zoo").joinpath("weights", f"{name}.safetensors").read_bytes()
    net.load_state_dict(safetensors.torch.load(weights))
    return net.eval()


@typed
def data(name: str, split: str) -> TensorDataset:
    """One split of a data set, as pictures that the nets expect and labels.

    Args:
        name: a key of `DATASETS`, or a key of `MODELS` for the data of that net.
        split: "calibration" (from the training distribution), "validation" or "test". No base picture is in two.
    Returns:
        pairs of picture `[1, 16, 16]` float32, normalised, and label int64 in 0..classes-1.
    Raises:
        UsageError: no such data set, or no such split.
    """
    name = MODELS[name].data if name in MODELS else name
    _check("data set", name, (*DATASETS, *MODELS))
    entry = DATASETS[name]
    images, labels, _ = arrays(name, split)
    return TensorDataset(normalise(torch.from_numpy(images).unsqueeze(1), entry), torch.from_numpy(labels).long())


def arrays(name: str, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One split as it is stored: images `[N, 16, 16]` uint8, labels `[N]` uint8, ids of the base pictures `[N]` uint16.

    Raises:
        UsageError: no such data set, or no such split.
    """
    _check("data set", name, DATASETS)
    _check("split", split, SPLITS)
    with resources.files("allot.sources.zoo").joinpath("data", f"{name}.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        return tuple(stored[f"{split}_{part}"] for part in ("images", "labels", "ids"))


def normalise(images: Tensor, entry: DataSet) -> Tensor:
    """uint8 pixels, any shape, to float32 with mean 0 and standard deviation 1 over the data set."""
    return (images.float() / 255 - entry.mean) / entry.std


def _check(kind: str, name: str, accepted: Collection[str]) -> None:
    """Raise UsageError, with the accepted names, unless `name` is one of them."""
    if name not in accepted:
        raise unknown(f"zoo {kind}", name, accepted)
