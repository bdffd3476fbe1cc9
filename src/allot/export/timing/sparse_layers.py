"""Linear layers timed as sparse matrices, each beside the dense layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allot.export.runtimes.opened import apply
from allot.export.runtimes.sparse import Convert
from allot.export.timing.clock import Speedup, side_by_side
from allot.network.hooks import hooked
from allot.network.trees import cloned


def time_converted(
    layers: Mapping[str, nn.Linear], model: nn.Module, example: Any, convert: Convert
) -> dict[str, Speedup]:
    """Layer that is called, and can be converted -> its speed-up on its inputs."""
    speedups = {}
    for name, x in inputs_of(layers, model, example).items():
        layer = layers[name]
        try:
            dense, sparse = (_linear(x, weight, layer.bias) for weight in (layer.weight, convert(layer.weight)))
            speedups[name] = side_by_side(dense, sparse, seconds=0.2)
        except (RuntimeError, ValueError):  # sizes or dtypes that the kernel does not take
            continue
    return speedups


def inputs_of(layers: Mapping[str, nn.Linear], model: nn.Module, example: Any) -> dict[str, Tensor]:
    """Layer that is called -> its input on the example."""
    inputs: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: Any, output: Any) -> None:
        inputs.setdefault(name, (*args, *kwargs.values())[0])

    with hooked((layer, partial(record, name)) for name, layer in layers.items()), torch.no_grad():
        apply(model, cloned(example))
    return inputs


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            torch.nn.functional.linear(x, weight, bias)

    return run
