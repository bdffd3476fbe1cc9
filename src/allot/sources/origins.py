"""Models of torchvision and timm, with the shape and preprocessing of their inputs; transformers: `hugging_face`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allot.errors import UsageError, with_cause
from allot.network.kinds import FLOATS
from allot.run.named import optional
from allot.sources.pictures import IMAGENET, Normalise, Preprocess

_NO_DOWNLOAD = "--weights FILE or --weights random need no download"


@dataclass(frozen=True)
class ModelSource:
    """A model, and its inputs as its origin describes them.

    Attributes:
        model: eval mode, CPU.
        example: a batch of one input, to count MACs with; None where only the user knows.
        normalise: per-channel (mean, std) that images are brought to; None where only the user knows.
        preprocess: the function by which the origin prepares a picture of [C, H, W], or None where it has none for
            this size.
        tokenizer: makes the model's tokenizer, for models of text.
    """

    model: nn.Module
    example: Any = None
    normalise: Normalise | None = None
    preprocess: Callable[[tuple[int, ...]], Preprocess | None] | None = None
    tokenizer: Callable[[], Any] | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of floating-point inputs; None for a model without such parameters."""
        return next((p.dtype for p in self.model.parameters() if p.dtype in FLOATS), None)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one input, without the batch dimension; None where no example is known, or not one tensor."""
        shape = getattr(self.example, "shape", None)
        return None if shape is None else tuple(shape[1:])


def torchvision_model(name: str, *, trained: bool) -> ModelSource:
    """A classifier of torchvision; pictures are prepared as its default weights want them, loaded or not.

    Raises:
        UsageError: unknown name, missing package, or no download.
    """
    models = optional("torchvision.models", "torchvision", "vision")
    if name not in models.list_models():
        raise _no_such_model("torchvision", name, models.list_models())
    options: dict[str, Any] = {"weights": "DEFAULT" if trained else None}
    if not trained and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # else that of a segmentation model is fetched all the same
    model = build(f"torchvision:{name}", lambda: models.get_model(name, **options))
    best = getattr(models.get_model_weights(name), "DEFAULT", None)
    if best is None:
        return ModelSource(model, torch.zeros(1, 3, 224, 224), IMAGENET)
    keywords, prepared = getattr(best.transforms, "keywords", {}), best.transforms()  # a preset, or a partial of one
    # detection models normalise by themselves
    normalise = (tuple(prepared.mean), tuple(prepared.std)) if hasattr(prepared, "mean") else ((0.0,) * 3, (1.0,) * 3)
    side = keywords.get("crop_size")
    if not isinstance(side, int):  # pictures of any size, or films
        return ModelSource(model, torch.zeros(1, 3, 224, 224), normalise)

    def preprocess(shape: tuple[int, ...]) -> Preprocess | None:
        channels, height, width = shape
        if channels != 3 or height != width:
            return None
        resized = round(height * keywords.get("resize_size", 256) / side)
        return best.transforms(crop_size=height, resize_size=resized)

    size = getattr(model, "image_size", side)  # a transformer's weights may be for another size than it is built for
    return ModelSource(model, torch.zeros(1, 3, size, size), normalise, preprocess)


def timm_model(name: str, *, trained: bool) -> ModelSource:
    """A model of timm, and pictures as its data configuration says.

    Raises:
        UsageError: unknown name, missing package, or no download.
    """
    timm = optional("timm", "timm", "vision")
    if not timm.is_model(name.split(".")[0]):
        raise _no_such_model("timm", name, timm.list_models())
    model = build(f"timm:{name}", lambda: timm.create_model(name, pretrained=trained))
    config = timm.data.resolve_model_data_config(model)

    def preprocess(shape: tuple[int, ...]) -> Preprocess | None:
        if shape[0] != config["input_size"][0]:
            return None
        return timm.data.create_transform(**{**config, "input_size": shape}, is_training=False)

    normalise = tuple(config["mean"]), tuple(config["std"])
    return ModelSource(model, torch.zeros(1, *config["input_size"]), normalise, preprocess)


def _no_such_model(origin: str, name: str, names: list[str]) -> UsageError:
    """The error for a name out of a list too long to print."""
    near = ", ".join(repr(other) for other in difflib.get_close_matches(name, names, n=5, cutoff=0.5))
    hint = f"did you mean {near}? " if near else ""
    listing = "torchvision.models.list_models()" if origin == "torchvision" else "timm.list_models()"
    return UsageError(f"unknown {origin} model {name!r}: {hint}{listing} lists all {len(names)}.")


def build(spec: str, make: Callable[[], nn.Module], *, hint: str = _NO_DOWNLOAD) -> nn.Module:
    """The model that `make` makes.

    Raises:
        UsageError: it fails; the message has the innermost cause, and `hint`.
    """
    try:
        return make()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot load {spec}: {with_cause(error)}" + (f" ({hint})" if hint else "")) from error
