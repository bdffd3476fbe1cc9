"""Loads weights from a file into a model that they fit exactly; code in a file is never run."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.export.files.formats import load
from allot.sources.files import cannot_open

STATES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model")
_EXTRA = "_extra_state"  # of modules with `get_extra_state`: no tensor, and no weight
log = logging.getLogger("allot")


def fill(model: nn.Module, path: Path) -> None:
    """Load weights that fit exactly: a safetensors file, or a .pt that holds a state dict.

    Names may be those of a wrapped model, like `module._orig_mod.fc.weight`. A checkpoint may hold the state dict under
    one of `STATES`; of several, the first one in that order is taken, and the log names it.

    Raises:
        UsageError: unreadable, pickled objects, or keys, shapes and types that differ (listed).
    """
    state = load(path) if path.suffix == ".safetensors" else _tensors_of(path)
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    state = without_wrappers(state, expected)
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
    return _state_in(content, path)


def _state_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The state dict in what a .pt file holds.

    Raises:
        UsageError: there is none.
    """
    for _ in range(3):  # Lightning, timm and others put it into a dict, and some into one more
        found = [key for key in STATES if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if not found:
            break
        if len(found) > 1:
            log.warning("%s holds %s: %s is taken", path, " and ".join(found), found[0])
        content = content[found[0]]
    if isinstance(content, Mapping):
        content = {
            name: value
            for name, value in content.items()
            if isinstance(value, Tensor) or str(name).rpartition(".")[2] != _EXTRA
        }
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(f"{path} holds no state dict: a mapping from names to tensors is accepted.")
    return content


def without_wrappers(state: Mapping[str, Tensor], expected: Collection[str]) -> Mapping[str, Tensor]:
    """The state with the names of the model, where it was saved from a compiled, parallel, averaged or enclosing one.

    `_orig_mod` goes wherever it stands. Then the first part of all names goes, until one of them is the model's.

    Args:
        expected: names of the model.

    >>> list(without_wrappers({"module._orig_mod.fc.weight": torch.zeros(1)}, ["fc.weight"]))
    ['fc.weight']
    """
    wanted = set(expected)
    compiled = any("_orig_mod" in name.split(".") for name in wanted)
    parts = {name: [p for p in str(name).split(".") if p != "_orig_mod" or compiled] for name in state}
    if "n_averaged" not in wanted:  # the count of an averaged model
        parts.pop("n_averaged", None)
    while parts:
        names = {name: ".".join(left) for name, left in parts.items()}
        if wanted & set(names.values()) and len(set(names.values())) == len(names):
            return {names[name]: state[name] for name in names}
        if len({left[0] for left in parts.values()}) > 1 or not all(len(left) > 1 for left in parts.values()):
            break
        parts = {name: left[1:] for name, left in parts.items()}
    return state
