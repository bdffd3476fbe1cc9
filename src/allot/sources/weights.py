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


def fill(model: nn.Module, path: Path) -> None:
    """Load weights that fit exactly: a safetensors file, or a .pt that holds a state dict.

    Raises:
        UsageError: unreadable, pickled objects, or keys, shapes and types that differ (listed).
    """
    state = load(path) if path.suffix == ".safetensors" else _tensors_of(path)
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    aliased = {name for name in expected if name not in state and _shared(expected, name, state)}
    both = [name for name in expected if name in state]
    problems = {
        "missing": [name for name in expected if name not in state and name not in aliased],
        "not in the model": [name for name in state if name not in expected],
        "other shape": [
            f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
            for name in both
            if state[name].shape != expected[name].shape
        ],
        "other type": [
            f"{name} {_dtype_name(state[name])} for {_dtype_name(expected[name])}"
            for name in both
            if state[name].is_floating_point() != expected[name].is_floating_point()
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{what}: {', '.join(keys[:8])}{_count_of_others(keys, 8)}" for what, keys in problems.items() if keys
        )
        raise UsageError(f"{path} does not fit {type(model).__name__}: {listed}.")
    model.load_state_dict(state, strict=False)


def _tensors_of(path: Path) -> Mapping[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}.") from error
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


def _shared(expected: Mapping[str, Tensor], name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether another name that the file has is the same tensor of the model."""
    pointer = expected[name].data_ptr()
    return any(other in state and value.data_ptr() == pointer for other, value in expected.items() if other != name)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _count_of_others(keys: list[str], shown: int) -> str:
    return f" and {len(keys) - shown} more" if len(keys) > shown else ""
