"""Loads weights from a file into a model that they fit exactly; code in a file is never run."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.export.files.formats import load
from allot.sources.files import cannot_open


def fill(model: nn.Module, path: Path) -> None:
    """Load weights that fit exactly: a safetensors file, or a .pt that holds a state dict.

    Raises:
        UsageError: unreadable, pickled objects, or keys, shapes and types that differ (listed).
    """
    state = load(path) if path.suffix == ".safetensors" else _tensors_of(path)
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    both = [(name, state[name], value) for name, value in expected.items() if name in state]
    filled = {value.data_ptr() for _, _, value in both}  # a tensor with several names needs one of them
    problems = {
        "missing": [name for name, value in expected.items() if name not in state and value.data_ptr() not in filled],
        "not in the model": [name for name in state if name not in expected],
        "other shape": [
            f"{name} {list(saved.shape)} for {list(value.shape)}"
            for name, saved, value in both
            if saved.shape != value.shape
        ],
        "other type": [
            f"{name} " + f"{saved.dtype} for {value.dtype}".replace("torch.", "")
            for name, saved, value in both
            if saved.is_floating_point() != value.is_floating_point()
        ],
    }
    listed = "; ".join(
        f"{problem}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for problem, names in problems.items()
        if names
    )
    if listed:
        raise UsageError(f"{path} does not fit {type(model).__name__}: {listed}.")
    model.load_state_dict(state, strict=False)


def _tensors_of(path: Path) -> Mapping[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise cannot_open(path, error) from error
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds pickled objects beside tensors; it was not opened, since unpickling can run code. "
            "Save model.state_dict() or a safetensors file."
        ) from error
    except Exception as error:  # a damaged file makes torch and pickle raise almost anything
        raise UsageError(f"{path} is not a whole .pt file ({type(error).__name__}).") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(f"{path} holds no state dict: a mapping from names to tensors is accepted.")
    if content and all(str(name).startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return content
