"""Attention heads as channels: a head's queries, keys, values and its columns of the projection behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from allot.network.layers import Group, Member


def heads_of(model: nn.Module) -> Iterator[Group]:
    """A group of heads for every attention of a known kind; the proof decides whether the group can be cut."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if not isinstance(module, nn.MultiheadAttention):
            yield from _linear_heads(model, name, prefix, module)
        elif module.num_heads > 1 and module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn:
            rows = _rows_by_head(module.num_heads, module.head_dim, parts=3)
            members = [Member(f"{prefix}in_proj_weight", 0, False, rows)]
            if module.in_proj_bias is not None:
                members.append(Member(f"{prefix}in_proj_bias", 0, False, rows))
            columns = _rows_by_head(module.num_heads, module.head_dim)
            members.append(Member(f"{prefix}out_proj.weight", 1, True, columns))
            yield Group(f"{prefix}heads", tuple(members), {name: {"num_heads": 1}}, layers=(name,))


_QKV = (("qkv",), ("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"))
_OUT = ("proj", "out_proj", "o_proj", "dense", "out", "to_out.0", "..output.dense")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")


def _linear_heads(model: nn.Module, name: str, prefix: str, module: nn.Module) -> Iterator[Group]:
    """The heads of an attention made of linear layers: input projections and one output projection."""
    count_name = next((n for n in _HEADS if type(getattr(module, n, None)) is int), None)
    inputs = next(
        (names for names in _QKV if all(isinstance(getattr(module, n, None), nn.Linear) for n in names)), None
    )
    paths = (_relative_path(name, path) for path in _OUT)
    out = next((path for path in paths if isinstance(_submodule_at(model, path), nn.Linear)), None)
    if not (count_name and inputs and out):
        return
    heads, width = getattr(module, count_name), _submodule_at(model, out).in_features
    parts = 3 if len(inputs) == 1 else 1
    rows = [getattr(module, n).out_features for n in inputs]
    if heads < 2 or width % heads or any(size != parts * width for size in rows):
        return
    head_width = width // heads
    members = []
    for part in inputs:
        places = _rows_by_head(heads, head_width, parts=parts)
        members.append(Member(f"{prefix}{part}.weight", 0, False, places))
        if getattr(module, part).bias is not None:
            members.append(Member(f"{prefix}{part}.bias", 0, False, places))
    members.append(Member(f"{out}.weight", 1, True, _rows_by_head(heads, head_width)))
    # an attribute that holds the width shrinks with the number of heads
    widths = {n: head_width for n in _WIDTHS if getattr(module, n, None) == width}
    yield Group(f"{prefix}heads", tuple(members), {name: {count_name: 1, **widths}}, layers=(name,))


def _relative_path(name: str, path: str) -> str:
    if path.startswith(".."):
        parent = name.rpartition(".")[0]
        return f"{parent}.{path[2:]}" if parent else path[2:]
    return f"{name}.{path}" if name else path


def _submodule_at(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _rows_by_head(heads: int, each: int, parts: int = 1) -> tuple[tuple[int, ...], ...]:
    """Rows of each head in `parts` stacked projections, each with its heads one after another."""
    width = heads * each
    return tuple(
        tuple(part * width + head * each + i for part in range(parts) for i in range(each)) for head in range(heads)
    )
