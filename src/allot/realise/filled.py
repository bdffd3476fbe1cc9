"""A model with the weights of a file that allot wrote, whatever its format."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from allot.realise.files import read
from allot.realise.slim import load_slim
from allot.realise.sparse import into, load_csr


def filled(model: nn.Module, path: Path) -> nn.Module:
    """A copy of the dense model in eval mode with the tensors of a plain, bitmask, slim or csr file.

    Raises:
        UsageError: no such file, or one of another model.
    """
    state, about = read(path)
    if about.get("format") == "slim":
        return load_slim(model, path)
    return load_csr(model, path) if about.get("format") == "csr" else into(model, path, state)
