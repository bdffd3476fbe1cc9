"""Never run on ImageNet. Nets with the weights that a paper began with, and pictures as it prepares them."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from allot.errors import UsageError
from allot.sources.load import ModelSource, load_model
from allot.sources.pictures import IMAGENET
from benchmarks.imagenet.recipes import Net

ENDINGS = (".safetensors", ".pt", ".pth")
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the picture, width over height


def load_net(name: str, net: Net, weights: str | None, size: int) -> ModelSource:
    """The net with trained weights.

    Args:
        weights: a folder that holds NAME.safetensors, NAME.pt or NAME.pth; "random"; None: torchvision or timm fetch
            what the recipe names, or have it already.
    Raises:
        UsageError: no such file, or weights that cannot be had.
    """
    origin, _, _ = net.model.partition(":")
    remote = origin in ("torchvision", "timm")
    shape = (3, size, size)
    if weights == "random" or not remote:
        source = load_model(net.model, weights="random" if remote else None, shape=shape)
    elif weights:
        source = load_model(net.model, weights=str(_file(Path(weights), name)), shape=shape)
    elif net.weights:
        source = load_model(net.model, weights="random", shape=shape)
        source.model.load_state_dict(_fetched(net.weights))
    else:
        source = load_model(net.model, shape=shape)
    return replace(source, preprocess=_as_taught(net.weights)) if net.weights else source


class Augmented(Dataset[Any]):
    """A random crop of each picture, brought to `size`, mirrored every other time.

    What is drawn is a function of torch's seed, which `allot.run.driver` sets before every step, of the sample, and of
    how often it was asked for since: draws are the same whatever the number of reading threads, and in a run that goes
    on.
    """

    def __init__(self, pictures: Any, size: int, normalise: Any = None) -> None:
        self.pictures, self.size, self.normalise = pictures, size, normalise or IMAGENET
        self.__name__ = f"random crops of {size} x {size}, mirrored at random"
        self._lock, self._seed, self._asked = threading.Lock(), -1, Counter[int]()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms import functional as F

        path, label = self.pictures.samples[index]
        picture = self.pictures.loader(path)
        draw = torch.Generator().manual_seed(self._number(index))
        picture = F.resized_crop(picture, *crop(picture.height, picture.width, draw), [self.size, self.size])
        if float(torch.rand((), generator=draw)) < 0.5:
            picture = F.hflip(picture)
        return F.normalize(F.to_tensor(picture), *map(list, self.normalise)), label

    def _number(self, index: int) -> int:
        with self._lock:
            seed = torch.initial_seed()
            if seed != self._seed:
                self._seed = seed
                self._asked.clear()
            again = self._asked[index]
            self._asked[index] += 1
        return ((seed * 1_000_003 + index) * 1_000_003 + again) % 2**63


def crop(height: int, width: int, draw: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of random area and aspect; the middle where ten draws do not fit."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    for _ in range(10):
        area = height * width * between(*AREA)
        aspect = math.exp(between(*map(math.log, ASPECT)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = (int(torch.randint(room + 1, (), generator=draw)) for room in (height - h, width - w))
            return top, left, h, w
    h, w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _file(folder: Path, name: str) -> Path:
    for ending in ENDINGS:
        if (path := folder / f"{name}{ending}").is_file():
            return path
    raise UsageError(
        f"no weights for {name} in {folder}: {', '.join(name + ending for ending in ENDINGS)} is accepted."
    )


def _fetched(weights: str) -> Any:
    from torchvision import models

    try:
        return models.get_weight(weights).get_state_dict(progress=False)
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot fetch {weights}: {said} (--weights FOLDER takes them from files)") from error


def _as_taught(weights: str) -> Callable[[tuple[int, ...]], Any]:
    """How these very weights were scored; the default weights of the same net may see otherwise."""
    from torchvision import models

    transforms = models.get_weight(weights).transforms
    said = getattr(transforms, "keywords", {})

    def preprocess(shape: tuple[int, ...]) -> Any:
        resized = round(shape[1] * said.get("resize_size", 256) / said["crop_size"])
        return transforms(crop_size=shape[1], resize_size=resized)

    return preprocess
