"""Multiply-accumulates of each layer, counted while the model runs once; and which layers a batch norm follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from allot.network.computed import Computed
from allot.network.hooks import hooked, module_places, watched_norms
from allot.network.kinds import UNDECIDED
from allot.network.layers import Layer, Place, Scope, places_by_parameter
from allot.network.products import Product, observed


@dataclass
class Uses:
    """How a pass used the weights of layers, beside the MACs of each.

    Attributes:
        direct: layer -> MACs of operators that read its weight, or a plain copy of it.
        computed: layers from whose weight another one is computed, which meets the inputs.
        unseen: layers whose module ran, while no operator was seen that multiplies by the weight.
        idle: layers that did not run.
    """

    direct: dict[str, int] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)


def measured(scope: Scope, model: nn.Module, forward: Callable[[], Any], uses: Uses | None = None) -> Scope:
    """`scope` with each layer's MACs, and whether a batch norm follows, seen while `forward()` runs `model` once.

    Matrix products and convolutions are recognised by the memory of the weight they read (or of a copy of it, as
    autocast makes), so that functional use, attention and shared weights all count. A layer that the example never
    reaches costs 0 MACs. A weight of 3 dimensions is in scope, as experts, where a product sums over one of them.

    Args:
        uses: filled with how the pass used the weights.
    """
    uses = Uses() if uses is None else uses
    places = places_by_parameter(model)
    forms: dict[str, str] = {}  # of weights of 3 dimensions
    by_weight: dict[str, int] = {}
    by_module: dict[str, int] = {}
    normalised: dict[str, set[str]] = {}
    ran: set[str] = set()
    watched = _watched(scope, places)
    sizes = {layer.name: layer.total for layer in watched}

    def count_product(product: Product | None, cost: tuple[str, int]) -> None:
        name, macs = cost
        uses.direct[name] = uses.direct.get(name, 0) + macs
        by_weight[name] = by_weight.get(name, 0) + macs
        if product is not None:
            forms[name] = product.layer.kind

    def count_computed(names: frozenset[str], weight: Tensor, macs: int) -> None:
        uses.computed.update(names)
        weights = sum(sizes[name] for name in names)
        for name in names:  # put together from several weights, as in one product for three projections
            by_weight[name] = by_weight.get(name, 0) + round(macs * sizes[name] / weights)

    def count_output(layer: Layer, place: Place, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        transposed = place.kind == "conv_transposed"
        tensor = _first_argument(args, kwargs) if transposed else output
        ran.add(layer.name)
        if isinstance(tensor, Tensor):
            channels = layer.shape[0] if transposed else layer.rows
            by_module[layer.name] = by_module.get(layer.name, 0) + layer.total * (tensor.numel() // channels)

    computed = Computed(count_computed)
    hooks = [(place.module, partial(count_output, layer, place)) for layer, place in module_places(scope, places)]
    with (
        hooked(hooks),
        watched_norms(model, scope, normalised),
        observed(model, watched, count_product, computed),
    ):
        forward()
    decided = [layer for layer in scope.undecided if forms.get(layer.name) == layer.kind]
    order = {name: number for number, name in enumerate(places)}
    layers = sorted([*scope, *decided], key=lambda layer: order[layer.name]) if decided else scope.layers
    # a weight whose products cannot be seen is counted from its module's output instead
    macs = {layer.name: by_weight.get(layer.name) or by_module.get(layer.name, 0) for layer in layers}
    unused = {layer.name for layer in layers if layer.kind != "lookup"} - by_weight.keys() - computed.touched
    uses.unseen, uses.idle = unused & ran, unused - ran
    layers = tuple(replace(layer, macs=macs[layer.name], normalised=layer.name in normalised) for layer in layers)
    skipped = {name: reason.removesuffix(f" {UNDECIDED}") for name, reason in scope.skipped.items()}
    skipped = {name: reason for name, reason in skipped.items() if name not in {layer.name for layer in decided}}
    whole = max(computed.macs, sum(macs.values()))  # where products cannot be seen, those of layers are counted alone
    return replace(scope, layers=layers, skipped=skipped, undecided=(), macs=whole)


def _watched(scope: Scope, places: Mapping[str, list[Place]]) -> list[Layer]:
    """The layers in scope, undecided ones in both forms, and then all others: a weight is no input of theirs."""
    watched = [*scope, *scope.undecided]
    if scope.undecided:
        seen = {layer.name for layer in watched}
        first = {name: holders[0] for name, holders in places.items() if name not in seen}
        certain = {name: place for name, place in first.items() if place.certainty == 2}
        watched += [Layer(name, tuple(place.parameter.shape), place.kind) for name, place in certain.items()]
    return watched


def _first_argument(args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)
