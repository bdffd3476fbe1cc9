"""MODEL and DATA of the command line: where a model and its data come from, by a prefix.

MODEL: `zoo:NAME`, `torchvision:NAME`, `timm:NAME`, `hf:NAME_OR_DIR`, `package.module:factory`, `file.py:factory`.
DATA:  `zoo:NAME`, `folder:DIR` (one sub-folder a class), `npz:FILE`, `synthetic`, `synthetic:C,H,W`,
       `package.module:factory`, `file.py:factory`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from allot.calibration import Calibration
from allot.errors import UsageError, unknown
from allot.synthetic import Fractals
from allot.weights import fill

MODEL_FORMS = "zoo:NAME, torchvision:NAME, timm:NAME, hf:NAME_OR_DIR, package.module:factory or file.py:factory"
DATA_FORMS = "zoo:NAME, folder:DIR, npz:FILE, synthetic[:C,H,W], package.module:factory or file.py:factory"
REMOTE = ("torchvision", "timm", "hf")  # origins that fetch trained weights
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

    @property
    def dtype(self) -> torch.dtype | None:
        """What floating-point inputs are brought to; None for a model without such parameters."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)


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
    if weights == "random" and origin not in REMOTE:
        raise UsageError(f"--weights random is for {', '.join(f'{o}:' for o in REMOTE)} models; {spec} has its own.")
    loader = {"zoo": _zoo_model, "torchvision": _torchvision_model, "timm": _timm_model, "hf": _hf_model}.get(origin)
    with redirect_stdout(sys.stderr):  # standard output belongs to what allot answers
        source = loader(name, trained) if loader else ModelSource(_called(spec, nn.Module, "an nn.Module"))
    if path:
        fill(source.model, Path(path))
    source.model.eval()
    example = torch.zeros(1, *shape, dtype=source.dtype) if shape else source.example
    return ModelSource(source.model, example, source.normalise)


def example_of(source: ModelSource, data: str | None) -> Any:
    """A batch of one input: what the origin or a given shape says, else the first of the data; None without either."""
    if source.example is None and data:
        return Calibration.of(load_data(data, source), samples=1, dtype=source.dtype).example()
    return source.example


def load_data(spec: str, source: ModelSource | None = None, *, split: str = "calibration") -> Any:
    """The data that `spec` names: a Dataset or iterable of inputs or (input, label).

    Args:
        source: the model's origin: image size and normalisation for `folder:`.
        split: which part of zoo data: "calibration", "validation" or "test".
    Raises:
        UsageError: unknown name, missing package, unreadable or empty data.
    """
    origin, _, name = spec.partition(":")
    if origin == "synthetic":
        return Fractals(_image_shape(spec, name, source))
    if not name:
        raise UsageError(f"DATA {spec!r}: {DATA_FORMS} is accepted.")
    if origin == "zoo":
        from allot import zoo

        return zoo.data(name, split)
    if origin == "npz":
        return _Arrays.load(Path(name))
    if origin == "folder":
        return _folder(Path(name), source)
    with redirect_stdout(sys.stderr):
        data = _called(spec, (Dataset, Iterable), "a Dataset or an iterable")
    return _drawn(spec, data) if isinstance(data, Iterator) else data


def _zoo_model(name: str, trained: bool) -> ModelSource:  # noqa: FBT001 - one of four loaders of one shape
    from allot import zoo

    return ModelSource(zoo.model(name), torch.zeros(1, 1, 16, 16))


def _torchvision_model(name: str, trained: bool) -> ModelSource:  # noqa: FBT001
    models = _optional("torchvision.models", "torchvision", "vision")
    if name not in models.list_models():
        raise _no_such_model("torchvision", name, models.list_models())
    model = _fetched(f"torchvision:{name}", lambda: models.get_model(name, weights="DEFAULT" if trained else None))
    return ModelSource(model, torch.zeros(1, 3, 224, 224), _IMAGENET)


def _timm_model(name: str, trained: bool) -> ModelSource:  # noqa: FBT001
    timm = _optional("timm", "timm", "vision")
    if not timm.is_model(name.split(".")[0]):
        raise _no_such_model("timm", name, timm.list_models())
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

    transformers.utils.logging.disable_progress_bar()
    model = _fetched(f"hf:{name}", build)
    vars(model)["config"].use_cache = False
    return ModelSource(model, _hf_example(model), _hf_normalisation(transformers, name))


def _hf_example(model: Any) -> Any:
    """A batch of one picture for models of pictures, else what the library tries its own models with."""
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(1, getattr(model.config, "num_channels", 3), height, width, dtype=model.dtype)
    dummy = getattr(model, "dummy_inputs", None) if model.main_input_name == "input_ids" else None
    return {key: value[:1] for key, value in dummy.items()} if dummy else None


def _hf_normalisation(transformers: Any, name: str) -> Any:
    """Mean and standard deviation in the preprocessor_config.json beside the model, if there is one."""
    try:
        config, _ = transformers.BaseImageProcessor.get_image_processor_dict(name)
    except OSError:
        return None
    mean, std = config.get("image_mean"), config.get("image_std")
    return (tuple(mean), tuple(std)) if mean and std else None


def _no_such_model(origin: str, name: str, names: list[str]) -> UsageError:
    """The error for a name out of a list too long to print."""
    near = ", ".join(repr(other) for other in difflib.get_close_matches(name, names, n=5, cutoff=0.5))
    hint = f"did you mean {near}? " if near else ""
    listing = "torchvision.models.list_models()" if origin == "torchvision" else "timm.list_models()"
    return UsageError(f"unknown {origin} model {name!r}: {hint}{listing} lists all {len(names)}.")


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
            _import_from(Path(where).parent)
            module = importlib.util.module_from_spec(located)
            sys.modules.setdefault(located.name, module)
            located.loader.exec_module(module)
        else:
            _import_from(Path.cwd())
            module = importlib.import_module(where)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"cannot import {where!r} of {spec!r}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, factory, None)):
        own = [name for name, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
        raise unknown(f"factory in {where}", factory, [name for name in own if callable(getattr(module, name))])
    try:
        made = getattr(module, factory)()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise UsageError(f"{spec} returned {type(made).__name__}: {wanted} is accepted.")
    return made


def _drawn(spec: str, samples: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from samples
    except Exception as error:
        raise UsageError(f"{spec} failed: {type(error).__name__}: {error}") from error


def _import_from(folder: Path) -> None:
    """Let modules in `folder` be imported, as Python does for the script that it runs."""
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


class _Arrays(Dataset[Any]):
    """Samples of an .npz file: (inputs, label), inputs a tensor or, of several arrays, a dict."""

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor | None) -> None:
        self.inputs, self.labels = inputs, labels

    @classmethod
    def load(cls, path: Path) -> _Arrays:
        try:
            with path.open("rb") as file:
                stored = np.load(file, allow_pickle=False)
                if not isinstance(stored, np.lib.npyio.NpzFile):
                    raise UsageError(f"{path} holds one array (.npy): np.savez('x.npz', x=..., y=...) is accepted.")
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        except UsageError:
            raise
        except OSError as error:
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}.") from error
        except Exception as error:  # numpy raises whatever the zip holds
            raise UsageError(f"{path} is not an .npz file of plain arrays: {error}") from error
        labels = next((arrays.pop(name) for name in _LABELS if name in arrays), None)
        every = [*arrays.values(), *(() if labels is None else (labels,))]
        if not arrays or len({tuple(value.shape[:1]) for value in every}) != 1 or any(not v.dim() for v in every):
            shapes = {name: list(value.shape) for name, value in arrays.items()}
            shapes |= {} if labels is None else {"y": list(labels.shape)}
            raise UsageError(f"{path}: arrays x (and y for labels) of one length are accepted, not {shapes}.")
        for name, value in arrays.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UsageError(f"{path}: {name} holds nan or infinite values.")
        if labels is not None and not labels.is_floating_point() and labels.numel() == len(labels):
            labels = labels.long().flatten()
        return cls(arrays, labels)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: int) -> Any:
        inputs: Any = {name: value[index] for name, value in self.inputs.items()}
        if len(inputs) == 1:
            inputs = next(iter(inputs.values()))
        return (inputs,) if self.labels is None else (inputs, self.labels[index])


def _image_shape(spec: str, text: str, source: ModelSource | None) -> tuple[int, ...]:
    """C,H,W as said, or as the model takes them."""
    if not text:
        shape = getattr(source.example if source else None, "shape", None)
        if shape is None:
            raise UsageError("synthetic: needs the size of an image: synthetic:CHANNELS,HEIGHT,WIDTH is accepted.")
        return tuple(shape[1:])
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"DATA {spec!r}: synthetic:CHANNELS,HEIGHT,WIDTH, like synthetic:3,224,224.") from None


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
    size = [round(side / 0.875) for side in (height, width)]
    steps = [transforms.Resize(size[0] if height == width else size), transforms.CenterCrop((height, width))]
    if channels == 1:
        steps.append(transforms.Grayscale())
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    try:
        return datasets.ImageFolder(str(path), transforms.Compose(steps))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}") from error
