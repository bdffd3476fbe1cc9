"""Models of torchvision, timm and transformers, with the shape and preprocessing of their inputs."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError, first_line
from allot.run.named import optional
from allot.sources.pictures import IMAGENET, Normalise, Preprocess

TOKENS = 512  # in a block of text, where no length is given and the model takes as many
log = logging.getLogger("allot")


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
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

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
    model = _build(f"torchvision:{name}", lambda: models.get_model(name, **options))
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
    model = _build(f"timm:{name}", lambda: timm.create_model(name, pretrained=trained))
    config = timm.data.resolve_model_data_config(model)

    def preprocess(shape: tuple[int, ...]) -> Preprocess | None:
        if shape[0] != config["input_size"][0]:
            return None
        return timm.data.create_transform(**{**config, "input_size": shape}, is_training=False)

    normalise = tuple(config["mean"]), tuple(config["std"])
    return ModelSource(model, torch.zeros(1, *config["input_size"]), normalise, preprocess)


def hf_model(name: str, *, trained: bool) -> ModelSource:
    """A model of transformers in the class that its configuration names, a causal language model among them.

    Raises:
        UsageError: missing package, no such directory or name, or no download.
    """
    transformers = optional("transformers", "transformers", "hf")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UsageError(f"hf:{name}: no such directory.")  # no name of a hub looks like that: nothing is asked for it

    def build() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(name)
        listed = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, listed, transformers.AutoModel)
        return kind.from_pretrained(name) if trained else kind._from_config(config)

    transformers.utils.logging.disable_progress_bar()
    model: Any = _build(f"hf:{name}", build)
    model.config.use_cache = False  # the keys and values of earlier tokens are not outputs to compare
    if model.main_input_name == "input_ids":
        return ModelSource(model, _example_of_tokens(model), tokenizer=lambda: _tokenizer(transformers, name))
    if model.main_input_name != "pixel_values":
        return ModelSource(model)
    size = getattr(model.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    example = torch.zeros(1, getattr(model.config, "num_channels", 3), height, width, dtype=model.dtype)
    try:
        config, _ = transformers.BaseImageProcessor.get_image_processor_dict(name)
    except OSError:  # no preprocessor beside the model
        return ModelSource(model, example)
    mean, std = config.get("image_mean"), config.get("image_std")
    return ModelSource(
        model,
        example,
        (tuple(mean), tuple(std)) if mean and std else None,
        lambda shape: _image_processor(transformers, name, shape),
    )


def of_tokens(example: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """The example with each row of tokens repeated, or cut, to this length."""
    return {key: value.repeat(1, -(-length // value.shape[1]))[:, :length] for key, value in example.items()}


def _example_of_tokens(model: Any) -> dict[str, Tensor] | None:
    """The inputs with which the library tests its models; where those are tokens alone, a block of text."""
    dummy = getattr(model, "dummy_inputs", None)
    if not dummy:
        return None
    example = {key: value[:1] for key, value in dummy.items()}
    longest = getattr(model.config, "max_position_embeddings", None) or TOKENS
    return of_tokens(example, min(TOKENS, longest)) if example.keys() == {"input_ids"} else example


def _tokenizer(transformers: Any, name: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"no tokenizer for hf:{name}: {message[:200]} (npz:FILE with an array input_ids needs none)"
        ) from error


def _image_processor(transformers: Any, name: str, shape: tuple[int, ...]) -> Preprocess | None:
    """The preprocessor beside the model, set to this size."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # noqa: BLE001 - the mean and standard deviation in its file can be used all the same
        log.warning("the preprocessor of hf:%s cannot be used here: %s", name, first_line(error))
        return None
    sizes = _processor_sizes(processor, *shape[1:])
    return lambda image: processor(images=image, return_tensors="pt", **sizes)["pixel_values"][0]


def _processor_sizes(processor: Any, height: int, width: int) -> dict[str, dict[str, int]]:
    """Arguments with which a preprocessor makes pictures of this size; empty where it does so without."""
    size = dict(getattr(processor, "size", None) or {})
    cropped = dict(getattr(processor, "crop_size", None) or {}) if getattr(processor, "do_center_crop", None) else {}
    wanted = {"height": height, "width": width}
    if (cropped or size) == wanted:
        return {}
    if not cropped:
        return {"size": {"shortest_edge": height} if "shortest_edge" in size and height == width else wanted}
    by = height / cropped["height"], width / cropped["width"]
    if "shortest_edge" in size:
        return {"size": {"shortest_edge": round(size["shortest_edge"] * max(by))}, "crop_size": wanted}
    scaled = {"height": round(size["height"] * by[0]), "width": round(size["width"] * by[1])}
    return {"size": scaled, "crop_size": wanted}


def _no_such_model(origin: str, name: str, names: list[str]) -> UsageError:
    """The error for a name out of a list too long to print."""
    near = ", ".join(repr(other) for other in difflib.get_close_matches(name, names, n=5, cutoff=0.5))
    hint = f"did you mean {near}? " if near else ""
    listing = "torchvision.models.list_models()" if origin == "torchvision" else "timm.list_models()"
    return UsageError(f"unknown {origin} model {name!r}: {hint}{listing} lists all {len(names)}.")


def _build(spec: str, build: Any) -> nn.Module:
    try:
        return build()
    except Exception as error:
        message = first_line(error)
        raise UsageError(
            f"cannot load {spec}: {message} (--weights FILE or --weights random need no download)"
        ) from error
