"""Directories with OpenVINO's model.xml and model.bin, opened by OpenVINO on the CPU; extra `openvino`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.export.runtimes.opened import Form, Opened, by_name, capture, need, quiet, size_of
from allot.network.trees import as_arguments


def _write(model: nn.Module, example: Any, path: Path) -> None:
    need("openvino", "openvino")
    import openvino

    args, kwargs = as_arguments(example)
    path.mkdir(exist_ok=True)
    with quiet():
        written = openvino.convert_model(capture(model, args, kwargs))
        written.set_friendly_name(type(model).__name__)
        for i, node in enumerate(written.get_ordered_ops()):  # names count up from process start, and so would bytes
            if node.get_type_name() != "Parameter":
                node.set_friendly_name(f"{node.get_type_name()}_{i}")
        openvino.save_model(written, str(path / "model.xml"), compress_to_fp16=False)


def _open(path: Path) -> Opened:
    core = _core()
    model = core.read_model(path / "model.xml")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else bf16 if the processor has it
    compiled = core.compile_model(model, "CPU", exact)
    names = [value.get_any_name() for value in compiled.inputs]

    def run(example: Any) -> list[Tensor]:
        inputs = by_name(example, names)
        outputs = compiled({name: inputs[name].numpy() for name in names})
        return [torch.from_numpy(outputs[output].copy()) for output in compiled.outputs]

    def weights() -> Iterator[Tensor]:
        for node in model.get_ops():
            real = node.get_type_name() == "Constant" and node.get_element_type().is_real()
            if real and len(node.shape) > 1:
                yield torch.from_numpy(node.data.copy())

    def macs(example: Any) -> int:
        fixed = core.read_model(path / "model.xml")
        fixed.reshape({name: list(value.shape) for name, value in by_name(example, names).items()})
        return sum(map(_layer_macs, fixed.get_ops()))

    return Opened(run, size_of(path), weights, macs)


@functools.cache
def _core() -> Any:
    """OpenVINO, which stays loaded: with it would go the memory that it made this thread handle signals in, and the
    next Ctrl-C would end the process by a segmentation fault.
    """
    need("openvino", "openvino")
    import openvino

    return openvino.Core()


_PRODUCTS = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
    "ScaledDotProductAttention",
)


def _layer_macs(node: Any) -> int:
    kind = node.get_type_name()
    if kind not in _PRODUCTS:
        return 0
    first, second, *more = (list(node.input(i).get_shape()) for i in range(node.get_input_size()))
    out = math.prod(node.output(0).get_shape())
    if kind == "Convolution":
        return out * math.prod(second[1:])
    if kind == "GroupConvolution":  # weights [groups, out, in, ...]
        return out * math.prod(second[2:])
    if kind == "ConvolutionBackpropData":
        return math.prod(first) * math.prod(second[1:])
    if kind == "GroupConvolutionBackpropData":  # weights [groups, in, out, ...]
        return math.prod(first) * math.prod(second[2:])
    if kind == "MatMul":
        return out * first[-2 if node.get_attributes()["transpose_a"] else -1]
    return math.prod(first) * second[-2] + math.prod(first[:-1]) * math.prod(more[0][-2:])


OPENVINO = Form("", _write, _open)
