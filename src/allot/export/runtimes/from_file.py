"""A model with the weights of a file that allot wrote, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from allot.export.files.formats import PlainState
from allot.export.files.slim import load_slim
from allot.export.runtimes.opened import Opened
from allot.export.runtimes.sparse import load_csr, with_tensors
from allot.network.shared_memory import check_shared_memory


def load_into(model: nn.Module, path: Path) -> nn.Module:
    """A copy of the dense model in eval mode with the tensors of a plain, bitmask, slim or csr file.

    Raises:
        UsageError: no such file, a file of another model, or a model whose parameters share memory.
    """
    check_shared_memory(model)  # a copy would give each parameter memory of its own, and its outputs would be others
    state = PlainState.of(path)
    form = state.metadata.get("format")
    if form == "slim":
        return load_slim(model, path)
    return load_csr(model, path) if form == "csr" else with_tensors(model, path, state)


def opened_with(model: nn.Module, path: Path) -> Opened:
    """The model that was loaded from a file, as opened; its weights are read from the file."""
    return replace(Opened.module(model, path.stat().st_size), weights=lambda: weights_of(path))


def weights_of(path: Path) -> Iterator[Tensor]:
    """Every floating-point tensor of two dimensions or more in a file, tied tensors once, read one at a time.

    Raises:
        UsageError: no such file, or a damaged file.
    """
    state = PlainState.of(path)
    untied = (state[name] for name in state if name not in state.aliases)
    return (tensor for tensor in untied if tensor.is_floating_point() and tensor.dim() > 1)
