"""A slim file opened again: a model of the user's own making, cut to the shapes that the file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from allot.channels import ChannelPlan, slimmed
from allot.errors import UsageError
from allot.masks import write_into
from allot.realise.files import SLIM, plain_state, read


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
    dense = model if isinstance(model, nn.Module) else model()
    own = plain_state(dense)[0]
    stored = {name: value for name, value in state.items() if name not in about.get("aliases", {})}
    if own.keys() != stored.keys():
        raise UsageError(
            f"{path} belongs to another model: {', '.join(sorted(own.keys() ^ stored.keys())[:5])} differ."
        )
    for name, (shape, _) in about["layers"].items():
        if list(own[name].shape) != shape:
            raise UsageError(
                f"{path} belongs to another model: {name} was {shape} before it was cut, not {list(own[name].shape)}."
            )
    tensors: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, value in stored.items():
        before = own[name].shape
        if len(before) != value.dim() or any(b < s for b, s in zip(before, value.shape, strict=True)):
            raise UsageError(f"{path} belongs to another model: {name} is {list(value.shape)} of {list(before)}.")
        cut = {d: tuple(range(s)) for d, (b, s) in enumerate(zip(before, value.shape, strict=True)) if s < b}
        if cut:
            tensors[name] = cut
    try:
        slim = slimmed(dense, ChannelPlan({}, {}, tensors, about["attributes"]))
    except (KeyError, AttributeError) as error:
        raise UsageError(f"{path} belongs to another model, or is damaged: {error}.") from error
    write_into(slim, stored)
    return slim.eval()
