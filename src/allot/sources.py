"""MODEL and DATA of the command line: where a model and its data come from, by a prefix.

MODEL: `zoo:NAME`, `torchvision:NAME`, `timm:NAME`, `hf:NAME_OR_DIR`, `package.module:factory`, `file.py:factory`.
DATA:  `zoo:NAME`, `folder:DIR` (one sub-folder a class), `npz:FILE`, `package.module:factory`, `file.py:factory`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from allot.errors import UsageError, unknown
from allot.realise.files import load

MODEL_FORMS = "zoo:NAME, torchvision:NAME, timm:NAME, hf:NAME_OR_DIR, package.module:factory or file.py:factory"
DATA_FORMS = "zoo:NAME, folder:DIR, npz:FILE, package.module:factory or file.py:factory"
_LABELS = ("y", "label", "labels", "target", "targets")


@dataclass(frozen=True)
class ModelSource:
    """A model, and what its origin says about inputs.

    Attributes:
        model: eval mode, CPU.
        example: a batch of one input, to count MACs with; None where only the user knows.
        normalise: per-channel (mean, std) that images are brought to; None where only the user knows.
    """

    model: nn.Module
    example: Any = None
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def load_model(spec: str, *, weights: str | None = None, shape: tuple[int, ...] | None = None) -> ModelSource:
    """The model that `spec` names.

    Args:
        weights: a safetensors file or a .pt that holds tensors only; "default" for the origin's trained weights (what
            torchvision, timm and hf do without this), "random" for none.
        shape: of one input, without the batch dimension.
    Raises:
        UsageError: unknown name, missing package, or weights that do not fit.
    """
    origin, _, name = spec.partition(":")
    if not name:
        raise UsageError(f"MODEL {spec!r}: {MODEL_FORMS} is accepted.")
    path = weights if weights not in (None, "default", "random") else None
    trained = weights in (None, "default")
    loader = {"zoo": _zoo_model, "torchvision": _torchvision_model, "timm": _timm_model, "hf": _hf_model}.get(origin)
    source = loader(name, trained) if loader else ModelSource(_called(spec, nn.Module, "an nn.Module"))
    if path:
        _fill(source.model, Path(path))
    source.model.eval()
    example = torch.zeros(1, *shape) if shape else source.example
    return ModelSource(source.model, example, source.normalise)


def load_data(spec: str, source: ModelSource | None = None, *, split: str = "calibration") -> Any:
    """The data that `spec` names: a Dataset or iterable of inputs or (input, label).

    Args:
        source: the model's origin: image size and normalisation for `folder:`.
        split: which part of zoo data: "calibration", "validation" or "test".
    Raises:
        UsageError: unknown name, missing package, unreadable or empty data.
    """
    origin, _, name = spec.partition(":")
    if not name:
        raise UsageError(f"DATA {spec!r}: {DATA_FORMS} is accepted.")
    if origin == "zoo":
        from allot import zoo

        return zoo.data(name, split)
    if origin == "npz":
        return _Arrays.load(Path(name))
    if origin == "folder":
        return _folder(Path(name), source)
    return _called(spec, (Dataset, Iterable), "a Dataset or an iterable")


def _zoo_model(name: str, trained: bool) -> ModelSource:  # noqa: FBT001 - one of four loaders of one shape
    from allot import zoo

    return ModelSource(zoo.model(name), torch.zeros(1, 1, 16, 16))


def _torchvision_model(name: str, trained: bool) -> ModelSource:  # noqa: FBT001
    models = _optional("torchvision.models", "torchvision", "vision")
    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    model = _fetched(f"torchvision:{name}", lambda: models.get_model(name, weights="DEFAULT" if trained else None))
    return ModelSource(model, torch.zeros(1, 3, 224, 224), _IMAGENET)


def _timm_model(name: str, trained: bool) -> ModelSource:  # noqa: FBT001
    timm = _optional("timm", "timm", "vision")
    if not timm.is_model(name.split(".")[0]):
        raise unknown("timm model", name, timm.list_models())
    model = _fetched(f"timm:{name}", lambda: timm.create_model(name, pretrained=trained))
    config = timm.data.resolve_model_data_config(model)
    return ModelSource(model, torch.zeros(1, *config["input_size"]), (tuple(config["mean"]), tuple(config["std"])))


def _hf_model(name: str, trained: bool) -> ModelSource:  # noqa: FBT001
    transformers = _optional("transformers", "transformers", "hf")

    def build() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(name)
        listed = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, listed, transformers.AutoModel)
        return kind.from_pretrained(name) if trained else kind._from_config(config)

    model = _fetched(f"hf:{name}", build)
    vars(model)["config"].use_cache = False
    dummy = getattr(model, "dummy_inputs", None)
    return ModelSource(model, {key: value[:1] for key, value in dummy.items()} if dummy else None)


def _fetched(spec: str, build: Any) -> nn.Module:
    try:
        return build()
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"cannot load {spec}: {message} (--weights FILE or --weights random need no download)"
        ) from error


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _optional(module: str, package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise UsageError(f"{package} is not installed: pip install 'allot[{extra}]'.") from error
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{package} is installed but cannot be imported here: {message}") from error


def _called(spec: str, kind: Any, wanted: str) -> Any:
    """What `package.module:factory` or `file.py:factory` returns."""
    where, _, factory = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            located = importlib.util.spec_from_file_location(Path(where).stem, where)
            if located is None or located.loader is None:
                raise UsageError(f"{where} is no Python file.")
            module = importlib.util.module_from_spec(located)
            sys.modules.setdefault(located.name, module)
            located.loader.exec_module(module)
        else:
            if str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(where)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot import {where!r} of {spec!r}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, factory, None)):
        callables = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown(f"factory in {where}", factory, callables)
    try:
        made = getattr(module, factory)()
    except Exception as error:
        raise UsageError(f"{spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise UsageError(f"{spec} returned {type(made).__name__}: {wanted} is accepted.")
    return made


def _fill(model: nn.Module, path: Path) -> None:
    """Load weights that fit exactly.

    Raises:
        UsageError: unreadable, pickled objects, or keys and shapes that differ (listed).
    """
    state = load(path) if path.suffix == ".safetensors" else _tensors_of(path)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    aliased = {name for name in own if name not in state and _shared(own, name, state)}
    missing = [name for name in own if name not in state and name not in aliased]
    surplus = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [("missing", missing), ("not in the model", surplus), ("other shape", shapes)]
    if any(keys for _, keys in problems):
        told = "; ".join(f"{what}: {', '.join(keys[:8])}{_more(keys, 8)}" for what, keys in problems if keys)
        raise UsageError(f"{path} does not fit {type(model).__name__}: {told}.")
    model.load_state_dict(state, strict=False)


def _tensors_of(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file.") from error
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds pickled objects beside tensors; it was not opened, since unpickling can run code. "
            "Save model.state_dict() or a safetensors file."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is not a whole .pt file: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(f"{path} holds no state dict: a mapping from names to tensors is accepted.")
    if content and all(str(name).startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _shared(own: Mapping[str, Tensor], name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether another name that the file has is the same tensor of the model."""
    pointer = own[name].data_ptr()
    return any(other in state and value.data_ptr() == pointer for other, value in own.items() if other != name)


def _more(keys: list[str], shown: int) -> str:
    return f" and {len(keys) - shown} more" if len(keys) > shown else ""


class _Arrays(Dataset[Any]):
    """Samples of an .npz file: (inputs, label), inputs a tensor or, of several arrays, a dict."""

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor | None) -> None:
        self.inputs, self.labels = inputs, labels

    @classmethod
    def load(cls, path: Path) -> _Arrays:
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such file.") from error
        except Exception as error:  # numpy raises whatever the zip holds
            raise UsageError(f"{path} is not an .npz file of plain arrays: {error}") from error
        labels = next((arrays.pop(name) for name in _LABELS if name in arrays), None)
        if (
            not arrays
            or len({len(value) for value in arrays.values()} | ({len(labels)} if labels is not None else set())) != 1
        ):
            shapes = {name: list(value.shape) for name, value in arrays.items()}
            raise UsageError(f"{path}: arrays x (and y for labels) of one length are accepted, not {shapes}.")
        return cls(arrays, None if labels is None else labels.long().flatten())

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: int) -> Any:
        inputs: Any = {name: value[index] for name, value in self.inputs.items()}
        if len(inputs) == 1:
            inputs = next(iter(inputs.values()))
        return (inputs,) if self.labels is None else (inputs, self.labels[index])


def _folder(path: Path, source: ModelSource | None) -> Any:
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder.")
    shape = getattr(source.example if source else None, "shape", None)
    if shape is None or len(shape) != 4:
        raise UsageError("folder: needs the size of an image: give --input CHANNELS,HEIGHT,WIDTH.")
    datasets = _optional("torchvision.datasets", "torchvision", "vision")
    transforms = _optional("torchvision.transforms", "torchvision", "vision")
    _, channels, height, width = shape
    mean, std = (source.normalise if source else None) or _IMAGENET
    steps = [transforms.Resize(round(min(height, width) / 0.875)), transforms.CenterCrop((height, width))]
    if channels == 1:
        steps.append(transforms.Grayscale())
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    try:
        return datasets.ImageFolder(str(path), transforms.Compose(steps))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}") from error
