"""What happens at each layer while a model runs: MACs, second moments of inputs, moments of outputs.

Everything here watches ordinary forward passes of the user's own modules; nothing is traced or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from allot.errors import UsageError
from allot.layers import ATTENTION_INPUTS, Layer, Place, Scope, places_of


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation per channel, each `[C]` in float64; `+` pools two sets exactly."""

    count: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Moments over all but the last dimension of `values` `[..., C]`."""
        flat = values.detach().reshape(-1, values.shape[-1]).double()
        mean = flat.mean(0)
        return cls(torch.full_like(mean, float(len(flat))), mean, (flat - mean).square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        step = other.mean - self.mean
        share = other.count / count
        deviation = self.deviation + other.deviation + step.square() * self.count * share
        return Moments(count, self.mean + step * share, deviation)

    def to_state(self) -> dict[str, Tensor]:
        """As a dict of tensors: `Moments(**state)` is the inverse."""
        return {"count": self.count, "mean": self.mean, "deviation": self.deviation}

    @property
    def variance(self) -> Tensor:
        """Biased variance `[C]`."""
        return self.deviation / self.count


def measured(scope: Scope, model: nn.Module, forward: Callable[[], Any]) -> Scope:
    """`scope` with each layer's MACs, and whether a batch norm follows, seen while `forward()` runs `model` once.

    Matrix products and convolutions are recognised by the memory of the weight they read, so that functional use,
    attention and shared weights all count. A layer that the example never reaches costs 0 MACs.
    """
    places = places_of(model)
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for layer in scope:
        weight = places[layer.name][0].parameter
        start = int(weight.storage_offset())
        spans.setdefault(weight.untyped_storage().data_ptr(), []).append((start, start + weight.numel(), layer.name))
    counter = _MacCounter(spans)
    unseen: dict[str, int] = {}
    outputs: dict[int, tuple[str, Tensor]] = {}
    normalised: set[str] = set()
    with ExitStack() as stack:
        for layer in scope:
            for place in places[layer.name]:
                if layer.kind.startswith(("linear", "conv")) and _holds_layer(place):
                    stack.enter_context(_hooked(place.module, _noted(layer, unseen, outputs)))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stack.enter_context(_hooked(module, _follows(outputs, normalised)))
        # a torch-function mode keeps nn.MultiheadAttention off its fused path, which hides its matrix products
        stack.enter_context(BaseTorchFunctionMode())
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        forward()
    # a weight that is recomputed before use (standardised, cast) is counted from its module's output instead
    macs = {layer.name: counter.macs.get(layer.name) or unseen.get(layer.name, 0) for layer in scope}
    found = (replace(layer, macs=macs[layer.name], normalised=layer.name in normalised) for layer in scope)
    return replace(scope, layers=tuple(found))


@contextmanager
def watched_inputs(model: nn.Module, scope: Scope, visit: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """While open, each forward pass calls `visit(layer, squares)`: for every weight the sum of its squared inputs.

    `squares` has the weight's shape. For a layer that is linear in its weight it is d/dw sum(forward(x^2; w)), which
    holds for every kernel, stride, padding and group; the module's own forward is used.
    """
    places = places_of(model)
    busy: set[int] = set()

    def plain(layer: Layer, place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if id(module) in busy:
                return
            busy.add(id(module))
            try:
                visit(layer, _squares(place, args, kwargs))
            finally:
                busy.discard(id(module))

        return hook

    def attention(layers: Mapping[str, Layer]) -> Callable[..., None]:
        def hook(module: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any) -> None:
            if id(module) in busy:
                return
            busy.add(id(module))
            try:
                for attribute, layer in layers.items():
                    if attribute == "out_proj.weight":
                        visit(layer, _column_squares(_attended(module, args, kwargs)).expand(layer.shape))
                    else:
                        parts = _projected(module, attribute, args, kwargs)
                        rows = [_column_squares(x).expand(stop - start, -1) for start, stop, x in parts]
                        visit(layer, torch.cat(rows))
            finally:
                busy.discard(id(module))

        return hook

    with ExitStack() as stack:
        for layer in scope:
            for place in places[layer.name]:
                if layer.kind.startswith(("linear", "conv")) and _holds_layer(place):
                    stack.enter_context(_hooked(place.module, plain(layer, place)))
        for module, layers in _attentions(model, scope, places):
            stack.enter_context(_hooked(module, attention(layers)))
        yield


Affine = tuple[Tensor, Tensor]


@contextmanager
def watched_outputs(model: nn.Module, scope: Scope, visit: Callable[[Layer, Moments], Affine | None]) -> Iterator[None]:
    """While open, each forward pass calls `visit(layer, moments of its output rows)`.

    Where `visit` returns `(scale, shift)`, both `[rows]`, the pass goes on as if the layer had given
    scale * output + shift. Tied layers are not visited: what is right for one use may be wrong for the other.
    """
    places = places_of(model)
    busy: set[int] = set()

    def plain(layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            rows = output.movedim(layer.output_dim, -1)
            affine = visit(layer, Moments.of(rows))
            if affine is None:
                return None
            scale, shift = (value.to(output) for value in affine)
            return (rows * scale + shift).movedim(-1, layer.output_dim)

        return hook

    def attention(layers: Mapping[str, Layer]) -> Callable[..., Any]:
        def hook(module: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any) -> Any:
            if id(module) in busy:
                return None
            changed = _corrected_projections(module, layers, args, kwargs, visit)
            if changed:
                busy.add(id(module))
                try:
                    output = torch.func.functional_call(module, changed, args, kwargs)
                finally:
                    busy.discard(id(module))
            attended, weights = output
            layer = layers.get("out_proj.weight")
            affine = visit(layer, Moments.of(attended)) if layer else None
            if affine is not None:
                scale, shift = (value.to(attended) for value in affine)
                attended = attended * scale + shift
            return attended, weights

        return hook

    with ExitStack() as stack:
        for layer in scope:
            if layer.kind.startswith(("linear", "conv")) and not layer.aliases:
                stack.enter_context(_hooked(places[layer.name][0].module, plain(layer)))
        for module, layers in _attentions(model, scope, places):
            stack.enter_context(_hooked(module, attention({a: v for a, v in layers.items() if not v.aliases})))
        yield


def bias_of(model: nn.Module, layer: Layer) -> tuple[str, slice] | None:
    """Name of the bias that is added to `layer`'s output, and the part of it; None where there is none."""
    place = places_of(model)[layer.name][0]
    start = 0
    attribute = "bias"
    if layer.kind == "attention_in":
        attribute = "in_proj_bias"
        start = {"k_proj_weight": 1, "v_proj_weight": 2}.get(place.attribute, 0) * getattr(place.module, "embed_dim", 0)
    if place.module._parameters.get(attribute) is None:
        return None
    name = f"{place.module_name}.{attribute}" if place.module_name else attribute
    return name, slice(start, start + layer.rows)


class _MacCounter(TorchDispatchMode):
    def __init__(self, spans: Mapping[int, list[tuple[int, int, str]]]) -> None:
        super().__init__()
        self.spans = spans
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in _PRODUCTS:
            left, right = args[_PRODUCTS[operator]], args[_PRODUCTS[operator] + 1]
            if name := self._weight(right) or self._weight(left):
                self._add(name, out.numel() * left.shape[-1])
        elif operator in _CONVOLUTIONS and (name := self._weight(args[1])):
            weight, transposed = args[1], args[6]
            positions = (args[0] if transposed else out).numel() // weight.shape[0]
            self._add(name, weight.numel() * positions)
        return out

    def _weight(self, tensor: Tensor) -> str | None:
        offset = tensor.storage_offset()
        spans = self.spans.get(tensor.untyped_storage().data_ptr(), ())
        return next((name for start, end, name in spans if start <= offset < end), None)

    def _add(self, name: str, macs: int) -> None:
        self.macs[name] = self.macs.get(name, 0) + macs


_aten = torch.ops.aten
# operator -> position of the left factor of its matrix product
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.mv: 0, _aten.addmm: 1, _aten.baddbmm: 1, _aten.addmv: 1}
_CONVOLUTIONS = (_aten.convolution, _aten._convolution)


def _noted(layer: Layer, macs: dict[str, int], outputs: dict[int, tuple[str, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = args[0] if layer.kind == "conv_transposed" else output
        channels = layer.shape[0] if layer.kind == "conv_transposed" else layer.rows
        macs[layer.name] = macs.get(layer.name, 0) + layer.total * (tensor.numel() // channels)
        outputs[id(output)] = (layer.name, output)  # holding it keeps the id from being used again

    return hook


def _follows(outputs: dict[int, tuple[str, Tensor]], normalised: set[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if args and id(args[0]) in outputs:
            normalised.add(outputs[id(args[0])][0])

    return hook


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _holds_layer(place: Place) -> bool:
    """False for the embedding end of a tied weight, whose input is not multiplied with it."""
    return not isinstance(place.module, nn.Embedding | nn.EmbeddingBag)


def _attentions(
    model: nn.Module, scope: Iterable[Layer], places: Mapping[str, list[Place]]
) -> list[tuple[nn.MultiheadAttention, dict[str, Layer]]]:
    """Each attention module with its layers in scope, by attribute ("out_proj.weight" for the output)."""
    by_place = {place.name: layer for layer in scope for place in places[layer.name]}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            names = {attribute: prefix + attribute for attribute in (*ATTENTION_INPUTS, "out_proj.weight")}
            layers = {a: by_place[n] for a, n in names.items() if n in by_place}
            if layers:
                found.append((module, layers))
    return found


def _projected(module: nn.MultiheadAttention, attribute: str, args: Any, kwargs: Any) -> list[tuple[int, int, Tensor]]:
    """(first row, last row + 1, input) of each projection that an attention weight holds."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    width = module.embed_dim
    inputs = [given["query"], given["key"], given["value"]]
    if attribute == "in_proj_weight":
        return [(i * width, (i + 1) * width, x) for i, x in enumerate(inputs)]
    return [(0, width, inputs[ATTENTION_INPUTS.index(attribute) - 1])]


def _attended(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> Tensor:
    """What the output projection multiplies: the module run with an identity in its place."""
    weight = module.out_proj.weight
    identity = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    if module.out_proj.bias is not None:
        identity["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
    return torch.func.functional_call(module, identity, args, kwargs)[0]


def _corrected_projections(
    module: nn.MultiheadAttention,
    layers: Mapping[str, Layer],
    args: Any,
    kwargs: Any,
    visit: Callable[[Layer, Moments], Affine | None],
) -> dict[str, Tensor]:
    """The attention's input projections after `visit` had its say; empty where nothing changes."""
    changed: dict[str, Tensor] = {}
    bias = module.in_proj_bias
    for attribute, layer in layers.items():
        if attribute == "out_proj.weight":
            continue
        weight = getattr(module, attribute)
        first = max(ATTENTION_INPUTS.index(attribute) - 1, 0) * module.embed_dim
        parts = []
        for start, stop, x in _projected(module, attribute, args, kwargs):
            added = None if bias is None else bias[first + start : first + stop]
            parts.append(Moments.of(nn.functional.linear(x, weight[start:stop], added)))
        moments = Moments(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("count", "mean", "deviation"))
        )
        affine = visit(layer, moments)
        if affine is not None:
            scale, shift = (value.to(weight) for value in affine)
            changed[attribute] = weight * scale[:, None]
            if bias is not None:
                new = changed.get("in_proj_bias", bias).clone()
                rows = slice(first, first + layer.rows)
                new[rows] = new[rows] * scale + shift
                changed["in_proj_bias"] = new
    return changed


def _column_squares(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)


def _squares(place: Place, args: Any, kwargs: Any) -> Tensor:
    weight = getattr(place.module, place.attribute)
    generator = torch.Generator().manual_seed(0)
    probe = (torch.rand(weight.shape, generator=generator) + 0.5).to(weight.device).requires_grad_()
    tensors = {place.attribute: probe}
    bias = getattr(place.module, "bias", None)
    if isinstance(bias, Tensor):
        tensors["bias"] = torch.zeros_like(bias, dtype=probe.dtype)
    args, kwargs = _squared(args), {key: _squared((value,))[0] for key, value in kwargs.items()}
    with torch.enable_grad():
        total = torch.func.functional_call(place.module, tensors, args, kwargs).sum()
    (squares,) = torch.autograd.grad(total, probe)
    # Euler: <d out/dw, w> = out exactly where the layer is linear in w; a standardised weight is not
    if not torch.isclose((squares * probe).sum(), total, rtol=1e-2, atol=1e-6 * float(total.abs() + 1)):
        raise UsageError(
            f"{place.name}: {type(place.module).__name__} is not linear in its weight, so its inputs' norms mean "
            "nothing for single weights. Exclude the layer or use the score 'magnitude'."
        )
    return squares.detach()


def _squared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach().float().square() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
