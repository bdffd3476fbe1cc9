"""Observers of layers while a model runs: moments of outputs, and layers as functions of their weights.

Forward hooks observe ordinary forward passes of the user's modules; no module is traced or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from allot.network.kinds import ATTENTION_INPUTS, INSIDE
from allot.network.layers import Layer, Place, Scope, is_batch_norm, places_by_parameter
from allot.processes import all_gather

Attention = nn.MultiheadAttention


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation per channel, each `[C]` in float64; `+` pools two sets exactly."""

    count: Float[Tensor, " C"]
    mean: Float[Tensor, " C"]
    deviation: Float[Tensor, " C"]

    @classmethod
    def of(cls, values: Float[Tensor, "*positions C"]) -> Moments:
        """Moments over all but the last dimension of `values` `[..., C]`; no values at all give zeros.

        Where several processes share a batch, the moments of the whole batch.
        """
        flat = values.detach().reshape(-1, values.shape[-1]).double()
        mean = flat.mean(0) if len(flat) else flat.new_zeros(flat.shape[-1])
        moments = torch.stack([torch.full_like(mean, float(len(flat))), mean, (flat - mean).square().sum(0)])
        first, *others = (cls(*part) for part in all_gather(moments))
        return sum(others, first)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        step = other.mean - self.mean
        share = other.count / count.clamp_min(1)
        deviation = self.deviation + other.deviation + step.square() * self.count * share
        return Moments(count, self.mean + step * share, deviation)

    def to_state(self) -> dict[str, Tensor]:
        """As a dict of tensors: `Moments(**state)` is the inverse."""
        return {"count": self.count, "mean": self.mean, "deviation": self.deviation}

    @property
    def variance(self) -> Tensor:
        """Biased variance `[C]`; 0 where nothing was counted."""
        return self.deviation / self.count.clamp_min(1)


Affine = tuple[Tensor, Tensor]


@contextmanager
def watched_outputs(model: nn.Module, scope: Scope, visit: Callable[[Layer, Moments], Affine | None]) -> Iterator[None]:
    """While open, each forward pass calls `visit(layer, moments of its output rows)`.

    Where `visit` returns `(scale, shift)`, both `[rows]`, the pass continues with scale * output + shift as the layer's
    output (the input projections of an attention without biases take no shift). Tied layers are not visited: a
    correction for one use may be wrong for the other.
    """

    def plain(layer: Layer, place: Place, args: Any, kwargs: Any, output: Any) -> Any:
        rows = output.movedim(layer.output_dim, -1)
        affine = visit(layer, Moments.of(rows))
        if affine is None:
            return None
        scale, shift = (value.to(output) for value in affine)
        return (rows * scale + shift).movedim(-1, layer.output_dim)

    def attention(module: Attention, layers: Mapping[str, Layer], args: Any, kwargs: Any, output: Any) -> Any:
        if changed := _corrected_projections(module, layers, args, kwargs, visit):
            output = torch.func.functional_call(module, changed, args, kwargs)
        attended, weights = output
        layer = layers.get("out_proj.weight")
        affine = visit(layer, Moments.of(attended)) if layer else None
        if affine is not None:
            scale, shift = (value.to(attended) for value in affine)
            attended = attended * scale + shift
        return attended, weights

    with _hooked_layers(model, [layer for layer in scope if not layer.aliases], plain, attention):
        yield


Apply = Callable[[Tensor, Tensor | None], Tensor]


@contextmanager
def watched_layers(model: nn.Module, scope: Scope, visit: Callable[[Layer, Apply, Tensor], None]) -> Iterator[None]:
    """While open, each forward pass calls `visit(layer, apply, output)` after it has applied a layer.

    `apply(weight, bias)` returns the layer's output for the same inputs with another weight and bias `[rows]` (None:
    the layer's bias), shaped like `output`; for the input projections of an attention both are flat.
    """

    def plain(layer: Layer, place: Place, args: Any, kwargs: Any, output: Any) -> None:
        def apply(weight: Tensor, bias: Tensor | None) -> Tensor:
            tensors = {place.attribute: weight} | ({} if bias is None else {"bias": bias})
            return torch.func.functional_call(place.module, tensors, args, kwargs)

        visit(layer, apply, output)

    def attention(module: Attention, layers: Mapping[str, Layer], args: Any, kwargs: Any, output: Any) -> None:
        for attribute, layer in layers.items():
            if attribute == "out_proj.weight":
                parts = [(0, layer.rows, _out_proj_input(module, args, kwargs))]
                visit(layer, _projection_function(parts, module.out_proj.bias, flat=False), output[0])
                continue
            rows = _attention_rows(module, attribute, layer)
            bias_rows = None if module.in_proj_bias is None else module.in_proj_bias[rows]
            apply = _projection_function(_projections(module, attribute, args, kwargs), bias_rows)
            visit(layer, apply, apply(getattr(module, attribute), None))

    with _hooked_layers(model, scope, plain, attention):
        yield


@contextmanager
def _hooked_layers(
    model: nn.Module, scope: Iterable[Layer], plain: Callable[..., Any], attention: Callable[..., Any]
) -> Iterator[None]:
    """While open, `plain` or `attention` runs after each layer, not in passes that it makes itself.

    Args:
        plain: called with (layer, place, args, kwargs, output); a result other than None replaces the output.
        attention: called with (module, its layers by attribute, args, kwargs, output), likewise.
    """
    places = places_by_parameter(model)
    busy: set[int] = set()

    def guarded(react: Callable[..., Any], *subject: Any) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if id(module) in busy:
                return None
            busy.add(id(module))
            try:
                return react(*subject, args, kwargs, output)
            finally:
                busy.discard(id(module))

        return hook

    hooks = [(place.module, guarded(plain, layer, place)) for layer, place in module_places(scope, places)]
    attentions = _attention_layers(model, scope, places)
    with hooked([*hooks, *((module, guarded(attention, module, layers)) for module, layers in attentions)]):
        yield


def _projection_function(parts: list[tuple[int, int, Tensor]], default: Tensor | None, *, flat: bool = True) -> Apply:
    """The function that applies projections to several inputs, each with its rows of a weight and of the bias."""

    def apply(weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = default if bias is None else bias
        outputs = [
            nn.functional.linear(x, weight[start:stop], None if bias is None else bias[start:stop])
            for start, stop, x in parts
        ]
        return torch.cat([output.flatten() for output in outputs]) if flat else outputs[0]

    return apply


def _attention_rows(module: Attention, attribute: str, layer: Layer) -> slice:
    """The part of in_proj_bias that belongs to an input projection."""
    start = max(ATTENTION_INPUTS.index(attribute) - 1, 0) * module.embed_dim
    return slice(start, start + layer.rows)


def biases_of(model: nn.Module, scope: Iterable[Layer]) -> dict[str, tuple[str, slice]]:
    """Layer name -> (name of the bias that is added to its output, the layer's part of it).

    Only of layers with one bias, which is added to what the layer alone gives.
    """
    places = places_by_parameter(model)
    biases: dict[str, tuple[str, slice]] = {}
    for layer in scope:
        if layer.kind in INSIDE:
            continue
        place, attribute, rows = places[layer.name][0], "bias", slice(0, layer.rows)
        if layer.kind == "attention_in":
            attribute = "in_proj_bias"
            if isinstance(place.module, Attention):
                rows = _attention_rows(place.module, place.attribute, layer)
        if place.module._parameters.get(attribute) is not None:
            biases[layer.name] = f"{place.module_name}.{attribute}".lstrip("."), rows
    return biases


def _version(output: Any) -> int:
    return int(output._version) if isinstance(output, Tensor) and not output.is_inference() else 0


@contextmanager
def watched_norms(model: nn.Module, scope: Iterable[Layer], after: dict[str, set[str]]) -> Iterator[None]:
    """While open, each pass notes `after[layer]`: names of the batch norms that its output goes straight into."""
    outputs: dict[int, tuple[str, Any, int]] = {}

    def note_output(layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # keeping it alive keeps its id from being reused; an activation in place changes its version
        outputs[id(output)] = (layer.name, output, _version(output))

    def note_norm(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        source = args[0] if args else next(iter(kwargs.values()), None)
        if id(source) in outputs and outputs[id(source)][2] == _version(source):
            after.setdefault(outputs[id(source)][0], set()).add(name)

    layers = module_places(scope, places_by_parameter(model))
    norms = [(name, module) for name, module in model.named_modules() if is_batch_norm(module)]
    hooks = [
        *((place.module, partial(note_output, layer)) for layer, place in layers),
        *((module, partial(note_norm, name)) for name, module in norms),
    ]
    with hooked(hooks):
        yield


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """While open, each `hook(module, args, kwargs, output)` runs after each forward pass of its module."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def module_places(scope: Iterable[Layer], places: Mapping[str, list[Place]]) -> list[tuple[Layer, Place]]:
    """(layer, place) of each module that multiplies its input by a layer's weight, once; no parts of attentions."""
    unique = {
        (layer.name, id(place.module)): (layer, place)
        for layer in scope
        for place in places[layer.name]
        if place.kind.startswith(("linear", "conv"))
    }
    return list(unique.values())


def _attention_layers(
    model: nn.Module, scope: Iterable[Layer], places: Mapping[str, list[Place]]
) -> list[tuple[Attention, dict[str, Layer]]]:
    """Each attention module with its layers in scope, by attribute ("out_proj.weight" for the output)."""
    by_place = {place.name: layer for layer in scope for place in places[layer.name]}
    attentions = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            prefix = f"{name}." if name else ""
            names = {attribute: prefix + attribute for attribute in (*ATTENTION_INPUTS, "out_proj.weight")}
            layers = {a: by_place[n] for a, n in names.items() if n in by_place}
            if layers:
                attentions.append((module, layers))
    return attentions


def _projections(module: Attention, attribute: str, args: Any, kwargs: Any) -> list[tuple[int, int, Tensor]]:
    """(first row, last row + 1, input) of each projection that an attention weight holds."""
    named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    width = module.embed_dim
    inputs = [named["query"], named["key"], named["value"]]
    if attribute == "in_proj_weight":
        return [(i * width, (i + 1) * width, x) for i, x in enumerate(inputs)]
    return [(0, width, inputs[ATTENTION_INPUTS.index(attribute) - 1])]


def _out_proj_input(module: Attention, args: Any, kwargs: Any) -> Tensor:
    """The input of the output projection: the module's output with an identity as that projection."""
    weight = module.out_proj.weight
    identity = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    if module.out_proj.bias is not None:
        identity["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
    return torch.func.functional_call(module, identity, args, kwargs)[0]


def _corrected_projections(
    module: Attention, layers: Mapping[str, Layer], args: Any, kwargs: Any, visit: Callable[[Layer, Moments], Any]
) -> dict[str, Tensor]:
    """The attention's input projections as corrected by `visit`; empty where nothing changes."""
    changed: dict[str, Tensor] = {}
    bias = module.in_proj_bias
    for attribute, layer in layers.items():
        if attribute == "out_proj.weight":
            continue
        weight = getattr(module, attribute)
        first = _attention_rows(module, attribute, layer).start
        parts = []
        for start, stop, x in _projections(module, attribute, args, kwargs):
            added = None if bias is None else bias[first + start : first + stop]
            parts.append(Moments.of(nn.functional.linear(x, weight[start:stop], added)))
        columns = zip(*((part.count, part.mean, part.deviation) for part in parts), strict=True)
        if (affine := visit(layer, Moments(*map(torch.cat, columns)))) is not None:
            scale, shift = (value.to(weight) for value in affine)
            changed[attribute] = weight * scale[:, None]
            if bias is not None:
                new = changed.get("in_proj_bias", bias).clone()
                rows = slice(first, first + layer.rows)
                new[rows] = new[rows] * scale + shift
                changed["in_proj_bias"] = new
    return changed
