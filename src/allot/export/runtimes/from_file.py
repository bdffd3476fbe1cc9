"""A model with the weights of a file that allot wrote, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from allot.export.files.formats import read
from allot.export.files.slim import load_slim
from allot.export.runtimes.opened import Opened
from allot.export.runtimes.sparse import load_csr, with_tensors


def load_into(model: nn.Module, path: Path) -> nn.Module:
    """A copy of the dense model in eval mode with the tensors of a plain, bitmask, slim or csr file.

    Raises:
        UsageError: no such file, or one of another model.
    """
    state, about = read(path)
    if about.get("format") == "slim":
        return load_slim(model, path)
    return load_csr(model, path) if about.get("format") == "csr" else with_tensors(model, path, state)


def opened_with(model: nn.Module, path: Path) -> Opened:
    """The file as a model that was filled from it runs; its weights are what the file holds, with no model at all."""
    return replace(Opened.module(model, path.stat().st_size), weights=lambda: weights_of(path))


def weights_of(path: Path) -> Iterator[Tensor]:
    """Every floating-point tensor of two dimensions or more in a file, tied ones once.

    Raises:
        UsageError: no such file, or a damaged one.
    """
    state, about = read(path)
    once = (tensor for name, tensor in state.items() if name not in about.get("aliases", {}))
    return (tensor for tensor in once if tensor.is_floating_point() and tensor.dim() > 1)
