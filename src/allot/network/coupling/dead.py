"""Channels that single-weight masks leave without use: a sparse net is made smaller, its outputs unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.call import call
from allot.network.channels import ChannelPlan, slimmed
from allot.network.coupling.find import find_groups
from allot.network.layers import Group
from allot.network.trees import floats_in

TOLERANCE = 1e-5  # of the largest output


def without_dead_channels(model: nn.Module, example: Any) -> tuple[nn.Module, ChannelPlan]:
    """(a copy of `model` without its dead channels, the plan by which it was cut).

    A channel is dead where every weight that reads it is zero, or where no weight or bias writes it. A removed channel
    may leave others without readers, so the search is repeated until nothing changes. Each group keeps one channel.

    Raises:
        UsageError: the model's channels cannot be followed.
    """
    groups, _ = find_groups(model, example)
    if not groups:
        raise UsageError("no channels can be removed from this model.")
    state = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    for zeros in (True, False):  # an activation that does not keep zero at zero allows only the first kind
        plan = ChannelPlan.of(model, groups, _channels_alive(model, state, groups, zeros=zeros))
        slim = slimmed(model, plan)
        with torch.no_grad():
            slim_outputs, dense_outputs = (floats_in(call(net, {}, example)) for net in (slim, model))
        pairs = list(zip(slim_outputs, dense_outputs, strict=True))
        if all(float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max()) for a, b in pairs if b.numel()):
            return slim, plan
    raise UsageError("the model without its dead channels answers otherwise: it uses them in a way unknown to allot.")


def _channels_alive(
    model: nn.Module, state: Mapping[str, Tensor], groups: Sequence[Group], *, zeros: bool
) -> dict[str, list[int]]:
    tensors = dict(state)
    alive = {group.name: set(range(group.total)) for group in groups}
    while True:
        before = sum(map(len, alive.values()))
        for group in groups:
            read = _has_weights(tensors, group, reads=True)
            used = read & _can_be_nonzero(model, tensors, group) if zeros else read
            alive[group.name] &= set(used.nonzero().flatten().tolist())
            alive[group.name] = alive[group.name] or {0}
        if sum(map(len, alive.values())) == before:
            return {name: sorted(channels) for name, channels in alive.items()}
        plan = ChannelPlan.of(model, groups, alive)
        for name in plan.tensors:
            tensors[name] = state[name] * plan.mask(name, state[name].shape).to(state[name].device)


def _has_weights(tensors: Mapping[str, Tensor], group: Group, *, reads: bool) -> Tensor:
    """`[channels]`: whether a weight that reads (writes) the channel is not zero."""
    used = torch.zeros(group.total, dtype=torch.bool)
    for member in group.members:
        tensor = tensors[member.tensor]
        if member.reads == reads and tensor.dim() > (0 if reads else 1):
            line = (tensor != 0).movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).any(1).cpu()
            used |= line[torch.tensor(member.places)].any(1)
    return used


def _can_be_nonzero(model: nn.Module, tensors: Mapping[str, Tensor], group: Group) -> Tensor:
    """`[channels]`: whether the channel can differ from zero: a weight or bias writes it, or a norm shifts it."""
    alive = _has_weights(tensors, group, reads=False)
    for member in group.members:
        owner, _, attribute = member.tensor.rpartition(".")
        value = tensors[member.tensor]
        if value.dim() != 1 or member.reads or attribute not in ("bias", "running_mean", "in_proj_bias"):
            continue
        if attribute == "running_mean":  # scaled by gamma
            scale = tensors.get(f"{owner}.weight")
            value = value if scale is None else value * scale
        alive |= (value != 0).cpu()[torch.tensor(member.places)].any(1)
    return alive
