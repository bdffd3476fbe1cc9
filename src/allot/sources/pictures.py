"""A folder of pictures, one sub-folder a class, as samples `(picture [C, H, W], class)`.

A picture is prepared as its model was taught to see: by a function that the model's origin gives, or else by resizing
the shorter side to 8/7 of the height, a crop of the middle, and normalisation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from allot.errors import CorruptSample, UsageError, first_line
from allot.run.named import optional

Preprocess = Callable[[Any], Tensor]  # a PIL image -> [C, H, W]
Normalise = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Normalise = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
log = logging.getLogger("allot")


def folder(
    path: Path, shape: tuple[int, ...], own: Preprocess | None = None, normalise: Normalise | None = None
) -> Any:
    """The pictures in the sub-folders of `path`, a Dataset; classes by the order of the sub-folders' names.

    Args:
        shape: channels (1 or 3), height and width that pictures are brought to.
        own: what prepares a picture for the model; left out, with a warning, where it does not give `shape`.
        normalise: per-channel (mean, std) where there is no `own`; those of ImageNet where None.
    Raises:
        UsageError: no such folder, or a sub-folder without pictures. A picture that cannot be read is a CorruptSample
            that names its file, when it is asked for.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder.")
    datasets = optional("torchvision.datasets", "torchvision", "vision")
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    if own is None or not _gives(own, mode, shape):
        own = _usual(channels, height, width, normalise or IMAGENET)
    try:
        return datasets.ImageFolder(str(path), own, loader=functools.partial(_decoded, mode=mode))
    except FileNotFoundError as error:
        raise UsageError(_without_pictures(path, datasets.folder.IMG_EXTENSIONS)) from error


def _decoded(path: str, mode: str) -> Any:
    """The picture in a file, decoded whole.

    Raises:
        CorruptSample: it cannot be read.
    """
    image = optional("PIL.Image", "PIL", "vision")
    try:
        with image.open(path) as opened:
            return opened.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them
        said = (str(error) or type(error).__name__).rstrip(".")
        said = "it is no picture" if isinstance(error, image.UnidentifiedImageError) else said
        raise CorruptSample.of(f"{path} cannot be read ({said})") from error


def _gives(own: Preprocess, mode: str, shape: tuple[int, ...]) -> bool:
    """Whether `own` makes tensors of this shape."""
    image = optional("PIL.Image", "PIL", "vision")
    try:
        found = tuple(own(image.new(mode, (shape[2] + 9, shape[1] + 5))).shape)
    except Exception as error:  # noqa: BLE001 - another library's function, and there is another way
        said = first_line(error)
    else:
        if found == tuple(shape):
            return True
        said = f"it gives {list(found)}"
    log.warning(
        "the model's own preprocessing makes no pictures of %s (%s): they are resized, cropped and normalised instead",
        list(shape),
        said,
    )
    return False


def _usual(channels: int, height: int, width: int, normalise: Normalise) -> Preprocess:
    transforms = optional("torchvision.transforms", "torchvision", "vision")
    mean, std = normalise
    if channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    size = [round(side / 0.875) for side in (height, width)]
    prepared: Preprocess = transforms.Compose(
        [
            transforms.Resize(size[0] if height == width else size),
            transforms.CenterCrop((height, width)),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return prepared


def _without_pictures(path: Path, endings: tuple[str, ...]) -> str:
    """What is missing in the folder."""
    below = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if not below:
        return f"{path} has no sub-folders: pictures are looked for in one sub-folder a class, be it a single one."
    empty = [entry.name for entry in below if not any(file.suffix.lower() in endings for file in entry.rglob("*"))]
    return f"{path}: no pictures in {', '.join(empty)}: files that end in {', '.join(endings)} are read."
