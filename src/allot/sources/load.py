"""MODEL and DATA of the command line: where a model and its data come from, by a prefix.

MODEL: `zoo:NAME`, `torchvision:NAME`, `timm:NAME`, `hf:NAME_OR_DIR`, `hf:DIR/FILE.gguf`, `package.module:factory`,
       `file.py:factory`.
DATA:  `zoo:NAME`, `folder:DIR` (one sub-folder a class), `npz:FILE`, `text:FILE`, `synthetic`, `synthetic:C,H,W`,
       `package.module:factory`, `file.py:factory`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from allot.errors import UsageError
from allot.network.arguments import typed
from allot.network.draws import seeded
from allot.processes import launched
from allot.run.calibration import Calibration, moved
from allot.run.named import called, import_from
from allot.run.reading import Readable
from allot.sources import zoo
from allot.sources.files import Arrays, Texts
from allot.sources.hugging_face import hf_model, of_tokens
from allot.sources.names import NO_FILE, REMOTE, check_data, check_model
from allot.sources.origins import ModelSource, timm_model, torchvision_model
from allot.sources.pictures import folder
from allot.sources.synthetic import Fractals
from allot.sources.weights import fill


@typed
def load_model(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    shape: tuple[int, ...] | None = None,
    device: str | torch.device | None = None,
) -> ModelSource:
    """The model that `spec` names.

    Args:
        weights: a safetensors file or a .pt that holds tensors only; "default" for the origin's trained weights (what
            torchvision, timm and hf do without this), "random" for none.
        shape: of one input, without the batch dimension.
        device: device of the model, as `device_of` reads it.
    Raises:
        UsageError: unknown name, missing package, weights that do not fit, or no such device.
    """
    place = device_of(None if device is None else str(device))
    origin, _, name = spec.partition(":")
    weights = None if weights is None else os.fspath(weights)
    check_model(spec, weights)
    path = weights if weights not in (None, *NO_FILE) else None
    trained = weights in (None, "default")
    loader = {"zoo": _zoo_model, "torchvision": torchvision_model, "timm": timm_model, "hf": hf_model}.get(origin)
    # standard output is for results; random weights are the same in every run and every process
    with redirect_stdout(sys.stderr), seeded(0):
        source = loader(name, trained=trained) if loader else ModelSource(called(spec, nn.Module, "an nn.Module"))
    if path:
        fill(source.model, Path(path))
    source.model.eval()
    import_from(Path.cwd())  # functions that options name are imported from where factories are
    source = replace(source, example=_example_of_shape(source, shape)) if shape else source
    if place.type == "cpu":
        return source
    return replace(source, model=source.model.to(place), example=moved(source.example, place))


def load_shapes(spec: str, *, shape: tuple[int, ...] | None = None) -> ModelSource | None:
    """The model that `spec` names without its weights, and its example, on the meta device.

    None where its origin makes the weights itself (zoo, factories), or cannot build a model without them.
    """
    if spec.partition(":")[0] not in REMOTE:
        return None
    try:
        with torch.device("meta"):
            source = load_model(spec, weights="random", shape=shape)
            return replace(source, example=moved(source.example, torch.device("meta")))
    except Exception:  # noqa: BLE001 - code of models that reads numbers while it builds; errors come with the weights
        return None


def device_of(name: str | None) -> torch.device:
    """The device with a name: cpu (None as well), cuda, cuda:1, mps.

    Where torchrun started several processes, "cuda" is another CUDA device in each.

    Raises:
        UsageError: this machine has no such device.
    """
    if name == "cuda" and launched():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise UsageError(f"--device {name}: cpu, cuda, cuda:1 or mps is accepted.") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        others = [f"cuda:{i}" for i in range(count["cuda"])] + ["mps"] * count["mps"]
        raise UsageError(f"--device {name}: there is no such device here; {', '.join(['cpu', *others])} can be had.")
    return device


def example_of(source: ModelSource, data: str | None, *, skip_corrupt: bool = False) -> Any:
    """A batch of one input: from the origin or a shape, else the first of the data; None without either."""
    if source.example is None and data:
        samples = load_data(data, source, skip_corrupt=skip_corrupt)
        return Calibration.of(samples, samples=1, dtype=source.dtype).example()
    return source.example


@typed
def load_data(
    spec: str, source: ModelSource | None = None, *, split: str = "calibration", skip_corrupt: bool = False
) -> Any:
    """The data that `spec` names: a Dataset or iterable of inputs or (input, label).

    Args:
        source: the model's origin: size and preprocessing of pictures for `folder:`, the tokenizer for `text:`.
        split: which part of zoo data: "calibration", "validation" or "test".
        skip_corrupt: whether samples that cannot be read are skipped and reported, see `Readable`.
    Raises:
        UsageError: unknown name, missing package, unreadable or empty data.
    """
    data = _open_data(spec, source, split)
    has_places = hasattr(data, "__getitem__") and hasattr(data, "__len__")  # an iterator may raise any error
    return Readable(data) if skip_corrupt and has_places else data


def _open_data(spec: str, source: ModelSource | None, split: str) -> Any:
    origin, _, name = spec.partition(":")
    check_data(spec)
    if origin == "synthetic":
        return Fractals(_image_shape(spec, name, source))
    if origin == "zoo":
        return zoo.data(name, split)
    if origin == "npz":
        return Arrays.load(Path(name))
    if origin == "folder":
        return _open_folder(Path(name), source)
    if origin == "text":
        return _open_text(Path(name), source)
    with redirect_stdout(sys.stderr):
        data = called(spec, (Dataset, Iterable), "a Dataset or an iterable")
    return _yield_samples(spec, data) if isinstance(data, Iterator) else data


def _zoo_model(name: str, *, trained: bool) -> ModelSource:
    return ModelSource(zoo.model(name), torch.zeros(1, 1, 16, 16))


def _yield_samples(spec: str, samples: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from samples
    except Exception as error:
        raise UsageError(f"{spec} failed: {type(error).__name__}: {error}") from error


def _image_shape(spec: str, text: str, source: ModelSource | None) -> tuple[int, ...]:
    """C,H,W from the text, or from the example of the model."""
    if not text:
        if source is None or source.shape is None:
            raise UsageError(
                "synthetic: needs the size of an image: give --input CHANNELS,HEIGHT,WIDTH, or synthetic:C,H,W."
            )
        return source.shape
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"DATA {spec!r}: synthetic:CHANNELS,HEIGHT,WIDTH, like synthetic:3,224,224.") from None


def _open_folder(path: Path, source: ModelSource | None) -> Any:
    if source is None or source.shape is None or len(source.shape) != 3:
        raise UsageError("folder: needs the size of an image: give --input CHANNELS,HEIGHT,WIDTH.")
    preprocess = source.preprocess(source.shape) if source.preprocess else None
    return folder(path, source.shape, preprocess, source.normalise)


def _open_text(path: Path, source: ModelSource | None) -> Texts:
    if source is None or source.tokenizer is None:
        raise UsageError(
            "text: is for hf: models of text, which have a tokenizer of their own: for others, npz:FILE with an array "
            "input_ids or a factory is accepted."
        )
    model: Any = source.model
    length = source.example["input_ids"].shape[1]
    return Texts.load(path, source.tokenizer(), length, model.get_input_embeddings().num_embeddings)


def _example_of_shape(source: ModelSource, shape: tuple[int, ...]) -> Any:
    """A batch of one input of this shape: a number of tokens where the model takes tokens."""
    if not isinstance(source.example, Mapping):
        return torch.zeros(1, *shape, dtype=source.dtype)
    if len(shape) != 1:
        raise UsageError(f"--input {','.join(map(str, shape))}: this model takes tokens: --input LENGTH is accepted.")
    return of_tokens(source.example, shape[0])
