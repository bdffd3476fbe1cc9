"""Models of the transformers library, from a hub, a directory or a GGUF file, with their inputs and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError, first_line
from allot.run.named import optional
from allot.sources.origins import ModelSource, build
from allot.sources.pictures import Preprocess

TOKENS = 512  # in a block of text, where no length is given and the model takes as many
log = logging.getLogger("allot")


@dataclass(frozen=True)
class _Files:
    """Where the files of a model are: the arguments of each `from_pretrained`.

    Attributes:
        spec: as the user named it.
        name: of a model on the hub, or a directory.
        options: `gguf_file` of a GGUF file.
        local: whether nothing is fetched.
    """

    spec: str
    name: str
    options: Mapping[str, str]
    local: bool

    @classmethod
    def of(cls, name: str) -> _Files:
        """The files that `hf:name` names.

        Raises:
            UsageError: no such directory or file, or no package that reads GGUF.
        """
        path, spec = Path(name).expanduser(), f"hf:{name}"
        if path.suffix == ".gguf":
            if not path.is_file():
                raise UsageError(f"{spec}: no such file.")
            for package in ("gguf", "accelerate"):
                optional(package, package, "gguf")
            return cls(spec, str(path.parent), {"gguf_file": path.name}, local=True)
        if path.is_dir():
            return cls(spec, str(path), {}, local=True)
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UsageError(f"{spec}: no such directory.")  # no name of a hub looks like that: nothing is asked for it
        return cls(spec, name, {}, local=False)


def hf_model(name: str, *, trained: bool) -> ModelSource:
    """A model of transformers in the class that its configuration names, a causal language model among them.

    Args:
        name: of a model on the hub, a directory, or a GGUF file (its weights are decoded to float32).
    Raises:
        UsageError: missing package, no such directory or name, or no download.
    """
    transformers = optional("transformers", "transformers", "hf")
    files = _Files.of(name)
    transformers.utils.logging.disable_progress_bar()

    def make() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(files.name, **files.options)
        if files.options:
            return _from_gguf(transformers, files, config, trained=trained)
        listed = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, listed, transformers.AutoModel)
        return kind.from_pretrained(files.name) if trained else kind._from_config(config)

    model: Any = build(files.spec, make, hint="") if files.local else build(files.spec, make)
    # the keys and values of earlier tokens are no outputs to compare; without numbers, only with them does a model run
    model.config.use_cache = next(model.parameters()).is_meta
    if model.main_input_name == "input_ids":
        return ModelSource(model, _example_of_tokens(model), tokenizer=lambda: _tokenizer(transformers, files))
    if model.main_input_name != "pixel_values":
        return ModelSource(model)
    size = getattr(model.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    example = torch.zeros(1, getattr(model.config, "num_channels", 3), height, width, dtype=model.dtype)
    try:
        config, _ = transformers.BaseImageProcessor.get_image_processor_dict(files.name)
    except OSError:  # no preprocessor beside the model
        return ModelSource(model, example)
    mean, std = config.get("image_mean"), config.get("image_std")
    return ModelSource(
        model,
        example,
        (tuple(mean), tuple(std)) if mean and std else None,
        lambda shape: _image_processor(transformers, files, shape),
    )


def of_tokens(example: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """The example with each row of tokens repeated, or cut, to this length."""
    return {key: value.repeat(1, -(-length // value.shape[1]))[:, :length] for key, value in example.items()}


def _from_gguf(transformers: Any, files: _Files, config: Any, *, trained: bool) -> nn.Module:
    """The language model of a GGUF file, its weights decoded.

    The library marks a model that it reads from such a file as quantised and does not save it; a fresh model of the
    same configuration with the same weights is an ordinary one.
    """
    fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if trained:
        marked = transformers.AutoModelForCausalLM.from_pretrained(files.name, **files.options, dtype=torch.float32)
        fresh.load_state_dict(marked.state_dict())
    fresh.config.name_or_path = str(Path(files.name, files.options["gguf_file"]))
    return fresh


def _example_of_tokens(model: Any) -> dict[str, Tensor] | None:
    """The inputs with which the library tests its models; where those are tokens alone, a block of text."""
    dummy = getattr(model, "dummy_inputs", None)
    if not dummy:
        return None
    example = {key: value[:1] for key, value in dummy.items()}
    longest = getattr(model.config, "max_position_embeddings", None) or TOKENS
    return of_tokens(example, min(TOKENS, longest)) if example.keys() == {"input_ids"} else example


def _tokenizer(transformers: Any, files: _Files) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(files.name, **files.options)
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"no tokenizer for {files.spec}: {message[:200]} (npz:FILE with an array input_ids needs none)"
        ) from error


def _image_processor(transformers: Any, files: _Files, shape: tuple[int, ...]) -> Preprocess | None:
    """The preprocessor beside the model, set to this size."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(files.name)
    except Exception as error:  # noqa: BLE001 - the mean and standard deviation in its file can be used all the same
        log.warning("the preprocessor of %s cannot be used here: %s", files.spec, first_line(error))
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
