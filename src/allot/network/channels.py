"""Coupled channels: which slices of which tensors go together, and a model with some of them gone.

A `Group` is a set of channels that can be removed one by one, each from every tensor that holds it: the rows
that write it, the norms that scale it, the columns that read it. The size of a cut tensor along one dimension is then

    size_d(n) = fixed_d + sum_g r_gd n_g            n_g channels kept of group g, r_gd places each in dimension d

so that weights and MACs of a layer, products of its sizes, are multilinear in n and exact on whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.copies import deep_copy
from allot.network.layers import Group


@dataclass(frozen=True)
class ChannelPlan:
    """Which channels stay, with all that is needed to cut a fresh model without tracing it; JSON both ways.

    Attributes:
        kept: group -> channels kept, ascending.
        total: group -> number of channels in the dense model.
        tensors: tensor -> {dimension: positions kept, ascending}; other tensors stay whole.
        attributes: module -> {attribute: its new value}.
    """

    kept: Mapping[str, tuple[int, ...]]
    total: Mapping[str, int]
    tensors: Mapping[str, Mapping[int, tuple[int, ...]]]
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Iterable[int]]) -> ChannelPlan:
        """The plan that keeps these channels of each group and everything else.

        Raises:
            UsageError: a group that is missing or unknown, or a channel that it does not have.
        """
        groups = list(groups)
        if kept.keys() != {group.name for group in groups}:
            raise UsageError(f"a plan for other groups: {sorted(kept.keys() ^ {group.name for group in groups})[:5]}.")
        modules, shapes = dict(model.named_modules()), shapes_of(model)
        kept_by_group = {group.name: tuple(sorted(set(kept[group.name]))) for group in groups}
        removed: dict[tuple[str, int], set[int]] = {}
        attributes: dict[str, dict[str, int]] = {}
        for group in groups:
            kept_channels = set(kept_by_group[group.name])
            if not kept_channels or not kept_channels <= set(range(group.total)):
                raise UsageError(f"{group.name}: channels {sorted(kept_channels)[:5]} of {group.total} cannot be kept.")
            for member in group.members:
                places_removed = [at for channel, at in enumerate(member.places) if channel not in kept_channels]
                removed.setdefault((member.tensor, member.dim), set()).update(*places_removed)
            for name, parts in group.attributes.items():
                new_values = attributes.setdefault(name, {})
                for attribute, per_channel in parts.items():
                    before = new_values.get(attribute, getattr(modules[name], attribute))
                    new_values[attribute] = before - per_channel * (group.total - len(kept_channels))
        tensors: dict[str, dict[int, tuple[int, ...]]] = {}
        for (name, dim), positions_removed in removed.items():
            if positions_removed:
                remaining = tuple(i for i in range(shapes[name][dim]) if i not in positions_removed)
                tensors.setdefault(name, {})[dim] = remaining
        return cls(kept_by_group, {group.name: group.total for group in groups}, tensors, attributes)

    def mask(self, name: str, shape: torch.Size) -> Tensor:
        """Bool mask of a tensor: False wherever it belongs to a removed channel."""
        mask = torch.ones(shape, dtype=torch.bool)
        for dim, places in self.tensors.get(name, {}).items():
            line = torch.zeros(shape[dim], dtype=torch.bool)
            line[list(places)] = True
            mask &= line.view([-1 if d == dim else 1 for d in range(len(shape))])
        return mask

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The remaining part of a tensor of the model."""
        for dim, places in self.tensors.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.tensor(places, device=tensor.device))
        return tensor

    def to_json(self) -> dict[str, Any]:
        """`{"groups": {name: {total, kept}}, "tensors": {name: {dim: kept}}, "attributes": {module: {...}}}`."""
        return {
            "groups": {name: {"total": self.total[name], "kept": list(kept)} for name, kept in self.kept.items()},
            "tensors": {name: {str(d): list(at) for d, at in dims.items()} for name, dims in self.tensors.items()},
            "attributes": {name: dict(own) for name, own in self.attributes.items()},
        }

    @classmethod
    def from_json(cls, content: Any) -> ChannelPlan:
        """The inverse of `to_json`.

        Raises:
            UsageError: `content` is no such plan.
        """
        try:
            groups = content["groups"]
            return cls(
                {name: tuple(map(int, group["kept"])) for name, group in groups.items()},
                {name: int(group["total"]) for name, group in groups.items()},
                {n: {int(d): tuple(map(int, at)) for d, at in dims.items()} for n, dims in content["tensors"].items()},
                {name: {key: int(v) for key, v in own.items()} for name, own in content["attributes"].items()},
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"no plan of channels: {type(error).__name__} {error}.") from error


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Shape of every parameter and buffer, by each of its names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.shape for name, tensor in named}


def copied(model: nn.Module, *, sharing_parameters: bool = False) -> nn.Module:
    """A copy of a model that shares no memory with it, or its parameters alone: a forward pass writes to buffers only.

    Raises:
        UsageError: the model holds an object that Python cannot copy.
    """
    try:
        return deep_copy(model, {id(p): p for p in model.parameters()} if sharing_parameters else {})
    except Exception as error:
        raise UsageError(f"{type(model).__name__} cannot be copied: {error}") from error


def slimmed(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """A copy of `model` that physically holds only the channels that the plan keeps.

    Parameters are new objects: optimisers are made after this. Names, `requires_grad` and modes stay.

    Raises:
        UsageError: the model cannot be copied, or has other tensors than the plan.
    """
    slim = copied(model)
    shapes = shapes_of(slim)
    for name, dims in plan.tensors.items():
        if name not in shapes:
            raise UsageError(f"the plan cuts {name}, which the model does not have.")
        for dim, places in dims.items():
            if dim >= len(shapes[name]) or places[-1] >= shapes[name][dim]:
                raise UsageError(f"the plan keeps {places[-1] + 1} of {name}, which has shape {list(shapes[name])}.")
    replaced: dict[int, nn.Parameter | Tensor] = {}
    for prefix, module in slim.named_modules():
        for registry in (module._parameters, module._buffers):
            for attribute, tensor in list(registry.items()):
                name = f"{prefix}.{attribute}" if prefix else attribute
                if tensor is None or not (name in plan.tensors or id(tensor) in replaced):
                    continue
                if id(tensor) not in replaced:
                    cut = plan.cut(name, tensor.detach()).clone()
                    parameter = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = nn.Parameter(cut, tensor.requires_grad) if parameter else cut
                registry[attribute] = replaced[id(tensor)]
        _set_sizes(module)
    for name, values in plan.attributes.items():
        for attribute, value in values.items():
            module = slim.get_submodule(name)
            if not isinstance(getattr(module, attribute), int) or not isinstance(value, int) or value < 1:
                raise UsageError(f"the plan sets {name}.{attribute} to {value!r}, which is no size of the model.")
            setattr(module, attribute, value)
    for module in slim.modules():
        if isinstance(module, nn.TransformerEncoder) and plan.attributes:
            module.enable_nested_tensor = module.use_nested_tensor = False  # tensors that only the fused path takes
    for name, module in list(slim.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and name in plan.attributes:
            parent, _, attribute = name.rpartition(".")
            slim.get_submodule(parent).register_module(attribute, FewerHeads(module))
    return slim


def _set_sizes(module: Any) -> None:
    """Set the attributes that hold a module's sizes, after its tensors changed."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        sides = weight.shape[0], weight.shape[1] * module.groups
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            module.groups = module.in_channels = module.out_channels = weight.shape[0]
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            module.in_channels, module.out_channels = sides
        else:
            module.out_channels, module.in_channels = sides
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        per_channel = next((t for t in (weight, module._buffers.get("running_mean")) if t is not None), None)
        module.num_features = module.num_features if per_channel is None else len(per_channel)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        if module.num_groups == module.num_channels:  # any other keeps its channels
            module.num_groups = module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU) and weight is not None:
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding) and weight is not None:
        module.embedding_dim = weight.shape[1]


class FewerHeads(nn.Module):
    """`nn.MultiheadAttention` with fewer heads than its width would hold; the same keys."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.embed_dim, self.dropout, self.batch_first = attention.embed_dim, attention.dropout, attention.batch_first
        self._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fused path
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        # not nn.Linear(1, 1): its initial values would come from the caller's random stream
        self.out_proj = torch.nn.utils.skip_init(nn.Linear, 1, 1, bias=attention.out_proj.bias is not None)
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
        _set_sizes(self.out_proj)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002 - the order of nn.MultiheadAttention
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(t, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for t, w, b in zip((query, key, value), weights, biases, strict=True)
        )  # [B, heads, T, head_dim]
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                if len(attn_mask) != len(query) * self.num_heads:
                    raise ValueError(f"attn_mask {list(attn_mask.shape)}: {self.num_heads} heads are left to mask.")
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            scores = scores + _additive(attn_mask, scores)
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask[:, None, None], scores)
        attention = scores.softmax(-1)
        attention = nn.functional.dropout(attention, self.dropout, self.training)
        out = self.out_proj((attention @ v).transpose(1, 2).flatten(2))
        if not batched:
            out, attention = out.squeeze(0), attention.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, attention.mean(-3) if average_attn_weights else attention


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as a term to add to scores: True becomes minus infinity."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
