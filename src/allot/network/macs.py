"""Multiply-accumulates of each layer, counted while the model runs once; and which layers a batch norm follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from allot.network.hooks import hooked, module_places
from allot.network.layers import Layer, Place, Scope, is_batch_norm, places_by_parameter


def measured(scope: Scope, model: nn.Module, forward: Callable[[], Any]) -> Scope:
    """`scope` with each layer's MACs, and whether a batch norm follows, seen while `forward()` runs `model` once.

    Matrix products and convolutions are recognised by the memory of the weight they read (or of a copy of it, as
    autocast makes), so that functional use, attention and shared weights all count. A layer that the example never
    reaches costs 0 MACs.
    """
    places = places_by_parameter(model)
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for layer in scope:
        weight = places[layer.name][0].parameter
        start = int(weight.storage_offset())
        spans.setdefault(weight.untyped_storage().data_ptr(), []).append((start, start + weight.numel(), layer.name))
    counter = _MacCounter(spans)
    by_module: dict[str, int] = {}
    outputs: dict[int, tuple[str, Tensor]] = {}
    normalised: set[str] = set()

    def count_output(layer: Layer, place: Place, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        transposed = place.kind == "conv_transposed"
        tensor = _first_argument(args, kwargs) if transposed else output
        if isinstance(tensor, Tensor):
            channels = layer.shape[0] if transposed else layer.rows
            by_module[layer.name] = by_module.get(layer.name, 0) + layer.total * (tensor.numel() // channels)
            outputs[id(output)] = (layer.name, output)  # keeping it alive keeps its id from being reused

    def note_normalised(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (source := id(_first_argument(args, kwargs))) in outputs:
            normalised.add(outputs[source][0])

    hooks: list[tuple[nn.Module, Any]] = [
        *((place.module, partial(count_output, layer, place)) for layer, place in module_places(scope, places)),
        *((module, note_normalised) for module in model.modules() if is_batch_norm(module)),
    ]
    # a torch-function mode keeps nn.MultiheadAttention off its fused path, which hides its matrix products
    with hooked(hooks), BaseTorchFunctionMode(), torch.no_grad(), counter:
        forward()
    # a weight that is recomputed before use (standardised, cast) is counted from its module's output instead
    macs = {layer.name: counter.macs.get(layer.name) or by_module.get(layer.name, 0) for layer in scope}
    layers = (replace(layer, macs=macs[layer.name], normalised=layer.name in normalised) for layer in scope)
    return replace(scope, layers=tuple(layers))


class _MacCounter(TorchDispatchMode):
    def __init__(self, spans: dict[int, list[tuple[int, int, str]]]) -> None:
        super().__init__()
        self.spans = spans
        self.macs: dict[str, int] = {}
        self.copies: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket
        if operator not in _PRODUCTS and operator not in _CONVOLUTIONS:
            with self:  # under inference_mode, linear and conv2d arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if operator in _PRODUCTS:
            left, right = args[_PRODUCTS[operator]], args[_PRODUCTS[operator] + 1]
            if name := self._weight(right) or self._weight(left):
                self._add(name, out.numel() * left.shape[-1])
        elif operator in _CONVOLUTIONS and (name := self._weight(args[1])):
            weight, transposed = args[1], args[6]
            positions = (args[0] if transposed else out).numel() // weight.shape[0]
            self._add(name, weight.numel() * positions)
        elif operator in _COPIES and (name := self._weight(args[0])) and out.numel() == args[0].numel():
            self.copies.append(out)  # kept alive, so that its memory is not reused
            start = out.storage_offset()
            spans = self.spans.setdefault(out.untyped_storage().data_ptr(), [])
            spans.append((start, start + out.numel(), name))
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
_COPIES = (_aten.clone, _aten._to_copy)


def _first_argument(args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)
