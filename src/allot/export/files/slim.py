"""A slim file opened again: a model of the user's own making, cut to the shapes that the file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from allot.errors import UsageError
from allot.export.files.formats import SLIM, read
from allot.network.call import write_into
from allot.network.channels import ChannelPlan, slimmed
from allot.network.layers import plain_state


def load_slim(model: nn.Module | Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """`model` cut to what a slim file holds, with its weights; in eval mode, plain classes, plain keys.

    Args:
        model: the dense model, or what makes it; its weights do not matter, and it is left as it was.
        path: a run directory, or a slim file.
    Raises:
        UsageError: no such file, or one of another model.
    """
    path = Path(path)
    path = path / SLIM if path.is_dir() else path
    state, about = read(path)
    if about.get("format") != "slim":
        raise UsageError(f"{path} is no slim file: prune with pattern='channels' or method='dsa'.")
    dense = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(dense, nn.Module):
        raise UsageError(f"{model!r} is no module and makes none: the dense model, or what makes it, is accepted.")
    if any(tensor.is_meta for tensor in (*dense.parameters(), *dense.buffers())):
        raise UsageError(f"{type(dense).__name__} is on the meta device and can hold no weights: make it on another.")
    own = plain_state(dense)[0]
    stored = {name: value for name, value in state.items() if name not in about.get("aliases", {})}
    if own.keys() != stored.keys():
        raise UsageError(
            f"{path} belongs to another model: {', '.join(sorted(own.keys() ^ stored.keys())[:5])} differ."
        )
    if not isinstance(about.get("layers"), dict) or not isinstance(about.get("attributes"), dict):
        raise UsageError(f"{path} is damaged: its metadata says neither layers nor attributes.")
    for name, held in about["layers"].items():
        shape = held[0] if isinstance(held, list) and held else None
        if name not in own or list(own[name].shape) != shape:
            raise UsageError(f"{path} belongs to another model: {name} was {shape} before it was cut.")
    tensors: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, value in stored.items():
        before = own[name].shape
        if len(before) != value.dim() or any(b < s or (b and not s) for b, s in zip(before, value.shape, strict=True)):
            raise UsageError(f"{path} belongs to another model: {name} is {list(value.shape)} of {list(before)}.")
        cut = {d: tuple(range(s)) for d, (b, s) in enumerate(zip(before, value.shape, strict=True)) if s < b}
        if cut:
            tensors[name] = cut
    try:
        slim = slimmed(dense, ChannelPlan({}, {}, tensors, about["attributes"]))
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} belongs to another model, or is damaged: {error}.") from error
    write_into(slim, stored)
    return slim.eval()
