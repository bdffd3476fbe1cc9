"""ONNX files, .onnx, for any batch size, opened by ONNX Runtime; extra `onnx`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import VerificationError
from allot.export.runtimes.opened import Form, Opened, by_name, capture, need, quiet
from allot.network.trees import as_arguments


def _write(model: nn.Module, example: Any, path: Path) -> None:
    need("onnx", "onnx", "onnxscript")
    args, kwargs = as_arguments(example)
    with quiet():
        program = torch.onnx.export(capture(model, args, kwargs), dynamo=True, verbose=False, external_data=False)
        assert program is not None
        program.save(str(path), external_data=False)


def onnx_session(content: bytes) -> Any:
    """ONNX Runtime on the CPU; waiting threads sleep, or sessions that are timed in turn would compete for cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _open(path: Path) -> Opened:
    need("onnx", "onnx", "onnxruntime")
    content = path.read_bytes()
    _refuse_other_files(path, content)
    session = onnx_session(content)
    names = [value.name for value in session.get_inputs()]

    def run(example: Any) -> list[Tensor]:
        inputs = {name: value.numpy() for name, value in by_name(example, names).items()}
        return [torch.from_numpy(output) for output in session.run(None, inputs)]

    def weights() -> Iterator[Tensor]:
        import onnx

        for tensor in onnx.load(path).graph.initializer:
            kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
            if tensor.data_type in kinds and len(tensor.dims) > 1:
                yield torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())

    return Opened(run, path.stat().st_size, weights, lambda example: _macs(path, by_name(example, names)))


def _refuse_other_files(path: Path, content: bytes) -> None:
    """Raises:
    VerificationError: a tensor lies in another file, which can be any file of this machine; allot writes none.
    """
    import onnx

    for tensor in _tensors(onnx.load_from_string(content)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "?")
            raise VerificationError(f"{path.name} keeps {tensor.name} in another file, {place}, which is not read.")


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor anywhere in a message, those of attributes and of inner graphs too."""
    import onnx

    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def _macs(path: Path, inputs: Mapping[str, Tensor]) -> int:
    import onnx

    proto = onnx.load(path)
    for value in proto.graph.input:
        for place, side in zip(value.type.tensor_type.shape.dim, inputs[value.name].shape, strict=True):
            place.dim_value = side
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")  # the shapes name the open batch
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {
        value.name: [place.dim_value for place in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            total += math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("MatMul", "Gemm"):
            turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if turned else -1]
        elif node.op_type == "Einsum":
            terms = next(a.s.decode() for a in node.attribute if a.name == "equation").partition("->")[0].split(",")
            sides = {
                letter: side
                for term, name in zip(terms, node.input, strict=True)
                for letter, side in zip(term.strip(), shapes[name], strict=True)
            }
            total += math.prod(sides.values()) if len(terms) > 1 else 0
    return total


ONNX = Form(".onnx", _write, _open)
