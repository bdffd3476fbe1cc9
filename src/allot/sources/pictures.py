"""A folder of pictures, one sub-folder a class, as samples `(picture [C, H, W], class)`.

A picture is prepared as in the training of its model: by a function of the model's origin, or else by resizing the
shorter side to 8/7 of the height, a crop of the middle, and normalisation.
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
    path: Path, shape: tuple[int, ...], preprocess: Preprocess | None = None, normalise: Normalise | None = None
) -> Any:
    """The pictures in the sub-folders of `path`, a Dataset; classes by the order of the sub-folders' names.

    Args:
        shape: channels (1 or 3), height and width that pictures are brought to.
        preprocess: prepares a picture for the model; not used, with a warning, where its result does not have `shape`.
        normalise: per-channel (mean, std) where there is no `preprocess`; those of ImageNet where None.
    Raises:
        UsageError: no such folder, or a sub-folder without pictures. A picture that cannot be read is a CorruptSample
            that names its file, when it is asked for.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder.")
    datasets = optional("torchvision.datasets", "torchvision", "vision")
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    if preprocess is None or not _has_shape(preprocess, mode, shape):
        preprocess = _resize_and_crop(channels, height, width, normalise or IMAGENET)
    try:
        return datasets.ImageFolder(str(path), preprocess, loader=functools.partial(_decode, mode=mode))
    except FileNotFoundError as error:
        raise UsageError(_missing_pictures(path, datasets.folder.IMG_EXTENSIONS)) from error


def _decode(path: str, mode: str) -> Any:
    """The picture in a file, decoded whole.

    Raises:
        CorruptSample: the file cannot be read.
    """
    image = optional("PIL.Image", "PIL", "vision")
    try:
        with image.open(path) as opened:
            return opened.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them
        reason = (str(error) or type(error).__name__).rstrip(".")
        reason = "it is no picture" if isinstance(error, image.UnidentifiedImageError) else reason
        raise CorruptSample.of(f"{path} cannot be read ({reason})") from error


def _has_shape(preprocess: Preprocess, mode: str, shape: tuple[int, ...]) -> bool:
    """Whether `preprocess` makes tensors of this shape."""
    image = optional("PIL.Image", "PIL", "vision")
    try:
        made = tuple(preprocess(image.new(mode, (shape[2] + 9, shape[1] + 5))).shape)
    except Exception as error:  # noqa: BLE001 - another library's function, and there is another way
        reason = first_line(error)
    else:
        if made == tuple(shape):
            return True
        reason = f"it gives {list(made)}"
    log.warning(
        "the model's own preprocessing makes no pictures of %s (%s): they are resized, cropped and normalised instead",
        list(shape),
        reason,
    )
    return False


def _resize_and_crop(channels: int, height: int, width: int, normalise: Normalise) -> Preprocess:
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


def _missing_pictures(path: Path, endings: tuple[str, ...]) -> str:
    """The error text for a folder without pictures: sub-folders or files that are missing."""
    below = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if not below:
        return f"{path} has no sub-folders: pictures are looked for in one sub-folder a class, be it a single one."
    empty = [entry.name for entry in below if not any(file.suffix.lower() in endings for file in entry.rglob("*"))]
    return f"{path}: no pictures in {', '.join(empty)}: files that end in {', '.join(endings)} are read."
