"""Whether the zeros of a pruned weight arrive where the model multiplies by it.

A model may compute another weight before use: standardise it, add a low-rank update, read it by another reference than
the parameter. Then zeros in the parameter are none in the product. Such layers run twice with half of their weights
masked, the second time with the other half: an entry of the computed weight that takes its value from one entry of the
parameter, and keeps zeros, is zero in one of the two passes.

    w_A = A * w,   w_B = (1 - A) * w,   A ~ Bernoulli(1/2):    zeros arrive where f(w_A) * f(w_B) = 0
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.applied_masks import masked
from allot.network.computed import Computed
from allot.network.draws import generator
from allot.network.kinds import FLOATS
from allot.network.layers import Layer, Scope
from allot.network.macs import Uses
from allot.network.memory import has_memory, storage_of
from allot.network.preserved import reached
from allot.network.products import Product, observed

COMPUTED = "computed anew before use: its zeros do not arrive where it meets the inputs"
ELSEWHERE = "used by another reference as well (an attribute or a list), which no mask reaches"
UNSEEN = "no product of its weight with the inputs can be seen, so nothing shows that zeros arrive there"
IDLE = "never runs on these inputs"


def without_lost_zeros(scope: Scope, model: nn.Module, uses: Uses, run: Callable[[Mapping[str, Tensor]], Any]) -> Scope:
    """`scope` without the layers whose zeros do not arrive, each with the reason.

    Args:
        uses: as `measured` filled it.
        run: runs the model on the same inputs as `measured` did, with these tensors in place of its own.
    Raises:
        UsageError: parameters hold no values, and a layer is in doubt.
    """
    reasons = dict.fromkeys(uses.unseen, UNSEEN)
    parameters = dict(model.named_parameters())
    doubtful = uses.computed | referenced_elsewhere(model)
    layers = [layer for layer in scope if layer.name in doubtful and layer.name not in reasons]
    if any(parameters[layer.name].is_meta for layer in layers):
        raise UsageError(f"{layers[0].name}: whether zeros arrive cannot be seen without values: load weights.")
    if layers:
        first, second = (_probe(model, layers, run, other=other) for other in (False, True))
        for layer in layers:
            seen = first[layer.name], second[layer.name]
            if {part.direct for part in seen} != {uses.direct.get(layer.name, 0)}:
                reasons[layer.name] = ELSEWHERE
            elif layer.name in uses.computed and not _arrive(*seen):
                reasons[layer.name] = COMPUTED
    return scope.without(reasons)


def referenced_elsewhere(model: nn.Module) -> set[str]:
    """Names of the parameters in whose memory a tensor lies that a module holds or refers to otherwise.

    In an attribute, in containers and objects below it, or in what its functions, `forward` included, work on.
    """
    by_memory: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters():
        if has_memory(parameter):
            by_memory.setdefault(storage_of(parameter), set()).add(name)
    found: set[str] = set()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            continue  # its list follows the parameters that are put in place
        held: list[Any] = [value for key, value in vars(module).items() if key not in _REGISTRIES]
        forward = inspect.getattr_static(type(module), "forward")  # of a scripted part no function
        for value in reached([*held, forward] if isinstance(forward, FunctionType) else held):
            if isinstance(value, Tensor) and has_memory(value):
                found |= by_memory.get(storage_of(value), set())
    return found


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def conditional(model: nn.Module, idle: Iterable[str]) -> set[str]:
    """Those of the idle layers that are alternatives of layers that ran: elements of a list of which others ran."""
    idle, alternatives = set(idle), set[str]()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            parts = [
                {f"{prefix}.{key}.{name}".lstrip(".") for name, _ in part.named_parameters()}
                for key, part in module.named_children()
            ]
            if any(part and not part & idle for part in parts):
                alternatives.update(*(part & idle for part in parts))
    return alternatives


@dataclass
class _Seen:
    """MACs that read the weight itself, and where the weights computed from it are zero, in order."""

    direct: int = 0
    zeros: list[Tensor] = field(default_factory=list)


def _probe(
    model: nn.Module, layers: Iterable[Layer], run: Callable[[Mapping[str, Tensor]], Any], *, other: bool
) -> dict[str, _Seen]:
    """What is seen of each layer with half of its weights masked; with `other`, the other half.

    Parameters that are all zero, as those of an update before it is trained, would show nothing: they are drawn.
    """
    found = {layer.name: _Seen() for layer in layers}
    parameters, draw = dict(model.named_parameters()), generator(0)
    placed: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.dtype in FLOATS and not bool(parameter.any()):
            placed[name] = torch.randn(parameter.shape, generator=draw).to(parameter)
    for layer in layers:
        mask = torch.rand(layer.shape, generator=draw).lt(0.5).to(parameters[layer.name].device)
        placed[layer.name] = masked(placed.get(layer.name, parameters[layer.name].detach()), mask != other)

    def direct(product: Product | None, cost: tuple[str, int]) -> None:
        found[cost[0]].direct += cost[1]

    def computed(names: frozenset[str], weight: Tensor, macs: int) -> None:
        for name in names:
            found[name].zeros.append(weight.detach() == 0)

    kept = [tensor.detach() for tensor in placed.values()]  # a forward may give a parameter other memory: not to others
    with observed(model, layers, direct, Computed(computed)):
        run(placed)
    del kept
    return found


def _arrive(first: _Seen, second: _Seen) -> bool:
    """Whether each entry of the computed weights is zero in one of the passes."""
    if not first.zeros or [zeros.shape for zeros in first.zeros] != [zeros.shape for zeros in second.zeros]:
        return False
    return all(bool((one | other).all()) for one, other in zip(first.zeros, second.zeros, strict=True))
