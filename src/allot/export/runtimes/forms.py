"""Forms that a runtime reads: how each is written, opened again, run, and recounted from what was written.

program   a `torch.export` program (.pt2)             opened by torch.export.load
onnx      ONNX (.onnx), any batch size                opened by ONNX Runtime; extra `onnx`
openvino  a directory with OpenVINO's model.xml       opened by OpenVINO on the CPU; extra `openvino`
hf        a directory of transformers                 opened by from_pretrained; extra `hf`
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from allot.errors import UsageError, first_line
from allot.export.files.formats import PROBE
from allot.network.call import as_arguments
from allot.network.draws import seeded
from allot.network.trees import cloned, tensors_in

log = logging.getLogger("allot")
Run = Callable[[Any], list[Tensor]]


@dataclass(frozen=True)
class Opened:
    """A written model, opened again.

    Attributes:
        run: inputs -> outputs, in order.
        bytes: size on disk.
        weights: every floating-point tensor of two dimensions or more that it holds.
        macs: inputs -> multiply-accumulates of its convolutions and matrix products on them.
    """

    run: Run
    bytes: int
    weights: Callable[[], Iterator[Tensor]]
    macs: Callable[[Any], int]

    def ask(self, example: Any, *, draw: int = 0) -> list[Tensor]:
        """What it answers, the inputs untouched; what PyTorch draws at random on the way is numbered by `draw`."""
        with seeded(draw, {tensor.device for tensor in tensors_in(example)}):
            return self.run(cloned(example))

    @classmethod
    def module(cls, model: Callable[..., Any], size: int = 0) -> Opened:
        """What PyTorch runs."""

        def run(example: Any) -> list[Tensor]:
            with torch.no_grad():
                return list(tensors_in(apply(model, example)))

        def weights() -> Iterator[Tensor]:
            assert isinstance(model, nn.Module)
            known = {id(tensor): tensor.detach() for tensor in (*model.parameters(), *model.buffers())}
            return (tensor for tensor in known.values() if tensor.is_floating_point() and tensor.dim() > 1)

        def counted(example: Any, mode: AbstractContextManager[Any]) -> int:
            with mode, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                apply(model, cloned(example))
            return counter.get_total_flops() // 2

        def macs(example: Any) -> int:
            try:  # what is fused is not counted: with gradients, and by plain mathematics, less is
                return counted(example, torch.enable_grad())
            except Exception:  # noqa: BLE001 - a model that runs without gradients only
                return counted(example, torch.no_grad())

        return cls(run, size, weights, macs)


@dataclass(frozen=True)
class Form:
    """How a form is written and opened.

    Attributes:
        ending: of its file; "" of a form that is a directory.
        runs_code: whether a file of this form can run any code when it is opened.
    """

    ending: str
    write: Callable[[nn.Module, Any, Path], None]
    open: Callable[[Path], Opened]
    runs_code: bool = False


def apply(model: Callable[..., Any], example: Any) -> Any:
    """The model's output on a batch of inputs."""
    args, kwargs = as_arguments(example)
    return model(*args, **kwargs)


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files in a directory but the probe of an export, in order."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.rglob("*") if file.is_file() and file != path / PROBE)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory but the probe."""
    return sum(file.stat().st_size for file in files_of(path))


def _write_program(model: nn.Module, example: Any, path: Path) -> None:
    args, kwargs = as_arguments(example)
    with quiet():
        program = _stripped(_captured(model, args, kwargs))
        buffer = io.BytesIO()  # save looks at the ending of a path
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


def _stripped(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program itself, without example inputs, which would be pickled, and without the file names of its source."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in node.meta.keys() - {"val", "nn_module_stack"}:
                del node.meta[key]
    return program


def _open_program(path: Path) -> Opened:
    content = path.read_bytes()
    with quiet():
        return Opened.module(torch.export.load(io.BytesIO(content)).module(), len(content))


def _write_onnx(model: nn.Module, example: Any, path: Path) -> None:
    _need("onnx", "onnx", "onnxscript")
    args, kwargs = as_arguments(example)
    with quiet():
        program = torch.onnx.export(_captured(model, args, kwargs), dynamo=True, verbose=False, external_data=False)
        assert program is not None
        program.save(str(path), external_data=False)


def onnx_session(content: bytes) -> Any:
    """ONNX Runtime on the CPU; threads that wait sleep, or sessions that are timed in turn would fight for cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path) -> Opened:
    _need("onnx", "onnxruntime")
    session = onnx_session(path.read_bytes())
    names = [each.name for each in session.get_inputs()]

    def run(example: Any) -> list[Tensor]:
        fed = {name: value.numpy() for name, value in _by_name(example, names).items()}
        return [torch.from_numpy(found) for found in session.run(None, fed)]

    def weights() -> Iterator[Tensor]:
        import onnx

        for tensor in onnx.load(path).graph.initializer:
            kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
            if tensor.data_type in kinds and len(tensor.dims) > 1:
                yield torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())

    return Opened(run, path.stat().st_size, weights, lambda example: _onnx_macs(path, _by_name(example, names)))


def _onnx_macs(path: Path, given: Mapping[str, Tensor]) -> int:
    import onnx

    proto = onnx.load(path)
    for value in proto.graph.input:
        for place, side in zip(value.type.tensor_type.shape.dim, given[value.name].shape, strict=True):
            place.dim_value = side
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")  # they name the open batch
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


def _write_openvino(model: nn.Module, example: Any, path: Path) -> None:
    _need("openvino", "openvino")
    import openvino

    args, kwargs = as_arguments(example)
    path.mkdir(exist_ok=True)
    with quiet():
        written = openvino.convert_model(_captured(model, args, kwargs))
        written.set_friendly_name(type(model).__name__)
        for i, node in enumerate(written.get_ordered_ops()):  # names count up from process start, and so would bytes
            if node.get_type_name() != "Parameter":
                node.set_friendly_name(f"{node.get_type_name()}_{i}")
        openvino.save_model(written, str(path / "model.xml"), compress_to_fp16=False)


def _open_openvino(path: Path) -> Opened:
    _need("openvino", "openvino")
    import openvino

    core = openvino.Core()
    read = core.read_model(path / "model.xml")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # it would take bf16 where the processor has it
    compiled = core.compile_model(read, "CPU", exact)
    names = [each.get_any_name() for each in compiled.inputs]

    def run(example: Any) -> list[Tensor]:
        given = _by_name(example, names)
        found = compiled({name: given[name].numpy() for name in names})
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    def weights() -> Iterator[Tensor]:
        for each in read.get_ops():
            real = each.get_type_name() == "Constant" and each.get_element_type().is_real()
            if real and len(each.shape) > 1:
                yield torch.from_numpy(each.data.copy())

    def macs(example: Any) -> int:
        fixed = core.read_model(path / "model.xml")
        fixed.reshape({name: list(value.shape) for name, value in _by_name(example, names).items()})
        return sum(map(_openvino_macs, fixed.get_ops()))

    return Opened(run, size_of(path), weights, macs)


_PRODUCTS = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
    "ScaledDotProductAttention",
)


def _openvino_macs(each: Any) -> int:
    kind = each.get_type_name()
    if kind not in _PRODUCTS:
        return 0
    first, second, *more = (list(each.input(i).get_shape()) for i in range(each.get_input_size()))
    out = math.prod(each.output(0).get_shape())
    if kind == "Convolution":
        return out * math.prod(second[1:])
    if kind == "GroupConvolution":  # weights [groups, out, in, ...]
        return out * math.prod(second[2:])
    if kind == "ConvolutionBackpropData":
        return math.prod(first) * math.prod(second[1:])
    if kind == "GroupConvolutionBackpropData":  # weights [groups, in, out, ...]
        return math.prod(first) * math.prod(second[2:])
    if kind == "MatMul":
        return out * first[-2 if each.get_attributes()["transpose_a"] else -1]
    return math.prod(first) * second[-2] + math.prod(first[:-1]) * math.prod(more[0][-2:])


def _write_pretrained(model: nn.Module, example: Any, path: Path) -> None:
    known: Any = model
    if not hasattr(model, "save_pretrained") or not hasattr(type(model), "from_pretrained"):
        raise UsageError(f"{type(model).__name__} has no save_pretrained: hf is for models of transformers.")
    path.mkdir(exist_ok=True)
    known.save_pretrained(path, safe_serialization=True)


def _open_pretrained(path: Path) -> Opened:
    _need("hf", "transformers")
    import transformers

    try:
        config = json.loads((path / "config.json").read_text())
        kind = getattr(transformers, config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} names no model of transformers in its config.json.") from error
    model = kind.from_pretrained(path, use_safetensors=True)  # the other format is pickled
    return Opened.module(model.eval(), size_of(path))


FORMS: dict[str, Form] = {
    "program": Form(".pt2", _write_program, _open_program, runs_code=True),
    "onnx": Form(".onnx", _write_onnx, _open_onnx),
    "openvino": Form("", _write_openvino, _open_openvino),
    "hf": Form("", _write_pretrained, _open_pretrained),
}


def _by_name(example: Any, names: list[str]) -> dict[str, Tensor]:
    """The inputs by what the file calls them: by their own names where they have some, else in order.

    Raises:
        UsageError: other inputs than the file takes.
    """
    args, kwargs = as_arguments(example)
    given = {name: t.detach().cpu() for name, t in kwargs.items() if isinstance(t, Tensor)}
    in_order = [t.detach().cpu() for t in args if isinstance(t, Tensor)]
    found = given if given else dict(zip(names, in_order, strict=False))
    if found.keys() != set(names) or (in_order and len(in_order) != len(names)):
        raise UsageError(f"the file takes {', '.join(names)}: {len(in_order) or ', '.join(given)} given.")
    return found


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The program, for any batch size where the model allows that."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    many = [value.repeat(2, *[1] * (value.dim() - 1)) if value.dim() and len(value) < 2 else value for value in tensors]
    wide = iter(many)
    as_given = args, dict(kwargs)
    args = tuple(next(wide) if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: next(wide) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    batch = torch.export.Dim("batch", min=1)
    open_batch = [{0: batch} if isinstance(v, Tensor) else None for v in args]
    shapes = (tuple(open_batch), {n: {0: batch} if isinstance(v, Tensor) else None for n, v in kwargs.items()})
    try:
        return torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes[0] if not kwargs else shapes[1])
    except Exception as first:  # noqa: BLE001 - whatever it does not like about an open batch, it may like a fixed one
        try:
            program = torch.export.export(model, *as_given)
            log.warning("%s is exported for inputs of these very shapes: it takes no open batch.", type(model).__name__)
            return program
        except Exception:  # noqa: BLE001 - and whatever it does not like at all is told in one line
            said = first_line(first)
            raise UsageError(f"{type(model).__name__} cannot be captured by torch.export: {said}") from first


def _need(extra: str, *modules: str) -> None:
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)} is not installed: pip install 'allot[{extra}]'.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, exporters keep what they would like to say to themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
