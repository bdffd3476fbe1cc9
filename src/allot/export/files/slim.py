"""A slim file opened again: the user's model, cut to the shapes that the file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from allot.errors import UsageError
from allot.export.files.formats import SLIM, read
from allot.network.arguments import typed
from allot.network.call import write_into
from allot.network.channels import ChannelPlan, slimmed
from allot.network.layers import plain_state


@typed
def load_slim(model: nn.Module | Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """`model` cut to the shapes of a slim file, with the weights of the file; in eval mode, plain classes, plain keys.

    Args:
        model: the dense model, or a function that makes it; its weights do not matter, and it is not changed.
        path: a run directory, or a slim file.
    Raises:
        UsageError: no such file, or a file of another model.

    >>> load_slim(nn.Linear(2, 1), "no/such.safetensors")
    Traceback (most recent call last):
    allot.errors.UsageError: no/such.safetensors: no such file.
    """
    path = Path(path)
    path = path / SLIM if path.is_dir() else path
    state, metadata = read(path)
    if metadata.get("format") != "slim":
        raise UsageError(f"{path} is no slim file: prune with pattern='channels' or method='dsa'.")
    dense = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(dense, nn.Module):
        raise UsageError(f"{model!r} is no module and makes none: the dense model, or what makes it, is accepted.")
    if any(tensor.is_meta for tensor in (*dense.parameters(), *dense.buffers())):
        raise UsageError(f"{type(dense).__name__} is on the meta device and can hold no weights: make it on another.")
    dense_state = plain_state(dense)[0]
    stored = {name: value for name, value in state.items() if name not in metadata.get("aliases", {})}
    if dense_state.keys() != stored.keys():
        raise UsageError(
            f"{path} belongs to another model: {', '.join(sorted(dense_state.keys() ^ stored.keys())[:5])} differ."
        )
    if not isinstance(metadata.get("layers"), dict) or not isinstance(metadata.get("attributes"), dict):
        raise UsageError(f"{path} is damaged: its metadata says neither layers nor attributes.")
    for name, entry in metadata["layers"].items():
        shape = entry[0] if isinstance(entry, list) and entry else None
        if name not in dense_state or list(dense_state[name].shape) != shape:
            raise UsageError(f"{path} belongs to another model: {name} was {shape} before it was cut.")
    tensors: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, value in stored.items():
        before = dense_state[name].shape
        if len(before) != value.dim() or any(b < s or (b and not s) for b, s in zip(before, value.shape, strict=True)):
            raise UsageError(f"{path} belongs to another model: {name} is {list(value.shape)} of {list(before)}.")
        cut = {d: tuple(range(s)) for d, (b, s) in enumerate(zip(before, value.shape, strict=True)) if s < b}
        if cut:
            tensors[name] = cut
    try:
        slim = slimmed(dense, ChannelPlan({}, {}, tensors, metadata["attributes"]))
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} belongs to another model, or is damaged: {error}.") from error
    write_into(slim, stored)
    return slim.eval()
