"""A test of groups of channels: on random weights, a cut model has to give the outputs of a zeroed one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allot.network.applied_masks import masked
from allot.network.call import modes
from allot.network.channels import ChannelPlan, slimmed
from allot.network.draws import generator, seeded
from allot.network.layers import Group
from allot.network.trees import as_arguments, floats_in, map_tensors

TOLERANCE = 1e-5  # of the largest output; a wrong coupling is off by a percent or more


def split_proven(probe: nn.Module, example: Any, groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """(groups that can be cut, names of groups that cannot), found by halving."""
    if not groups:
        return [], []
    _randomise(probe)
    probe = probe.double()
    double = map_tensors(lambda t: t.double() if t.is_floating_point() else t, example)
    try:
        whole = _answers(probe, double)
    except Exception:  # noqa: BLE001 - a model may require its precision
        probe, double = probe.float(), example
        whole = _answers(probe, double)

    def passes(tested: Sequence[Group]) -> bool:
        return _cut_matches(probe, double, groups, tested, whole)

    def sift(tested: Sequence[Group]) -> Iterator[Group]:
        if not tested or passes(tested):
            yield from tested
        elif len(tested) > 1 and not (len({_name_pattern(group) for group in tested}) == 1 and not passes(tested[:1])):
            middle = len(tested) // 2
            yield from sift(tested[:middle])
            yield from sift(tested[middle:])

    kept: list[Group] = list(sift(sorted(groups, key=_name_pattern)))
    while len(kept) > 1 and not passes(kept):  # single groups pass, all together fail
        kept.pop()
    names = {group.name for group in kept}
    return [group for group in groups if group.name in names], [g.name for g in groups if g.name not in names]


def _name_pattern(group: Group) -> str:
    """The name without numbers of blocks: if the first of repeated blocks fails, all of them do."""
    return re.sub(r"\.\d+(?=\.)", ".#", group.name)


def _cut_matches(
    probe: nn.Module, example: Any, groups: Sequence[Group], tested: Iterable[Group], whole: Sequence[Tensor]
) -> bool:
    """Whether cutting half of the channels of `tested` gives the outputs that zeroing them gives.

    Three halves: a random one, the first and the last; a net that slices or flips its channels fails one of them.
    """
    cut = {group.name for group in tested}
    every = [list(range(group.total)) for group in groups]
    drawn = [torch.randperm(group.total, generator=generator(i)).tolist() for i, group in enumerate(groups)]
    for orders in (drawn, every, [order[::-1] for order in every]):
        kept = {
            group.name: order[: max(group.total // 2, 1)] if group.name in cut else order
            for group, order in zip(groups, orders, strict=True)
        }
        if not _cut_is_zeroed(probe, example, ChannelPlan.of(probe, groups, kept), whole):
            return False
    return True


def _cut_is_zeroed(probe: nn.Module, example: Any, plan: ChannelPlan, whole: Sequence[Tensor]) -> bool:
    zeroed = {}
    for name, parameter in probe.named_parameters():
        if name in plan.tensors:
            zeroed[name] = masked(parameter.detach(), plan.mask(name, parameter.shape).to(parameter.device))
    try:
        ours = _answers(slimmed(probe, plan), example)
        theirs = _answers(probe, example, zeroed)
    except Exception:  # noqa: BLE001 - the model's code may require the old sizes
        return False
    return all(
        a.shape == b.shape == c.shape
        and bool(((a - b).abs().max() <= TOLERANCE * c.abs().max().clamp_min(1e-30)).item())
        for a, b, c in zip(ours, theirs, whole, strict=True)
        if a.numel()
    )


def _answers(model: nn.Module, example: Any, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    args, kwargs = as_arguments(example)
    with torch.no_grad(), seeded(0), modes(model, lambda module: False):
        return floats_in(torch.func.functional_call(model, dict(tensors or {}), args, kwargs))


def _randomise(model: nn.Module) -> None:
    """Fill with values that hide no channel: no zero scales, no equal channels, no tiny branches."""
    draw = generator(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            random = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                random = 0.5 + random.abs()
            elif isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                random = random * (tensor.numel() / tensor.shape[0]) ** -0.5
            elif not (isinstance(tensor, nn.Parameter) or name.endswith("running_mean")):
                continue  # a constant table of the model
            tensor.copy_(random)
