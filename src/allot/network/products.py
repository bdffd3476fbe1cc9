"""Products of a layer's weight with its inputs, seen below the modules while the model runs.

A pass of any module comes down to a few operators of torch: matrix products, convolutions, and the LSTM kernel. A
weight is recognised among their operands by its memory, so that functional use, subclasses with a forward of their own,
attention and shared weights all count. A weight that is recomputed before use (standardised, say) is not recognised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from allot.network.layers import Layer, Place, places_by_parameter

COLUMNS = 2**24  # entries of the unrolled inputs that exist at once


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its inputs; one number a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Product:
    """One product of (a part of) a layer's weight.

    Attributes:
        layer: whose weight is multiplied.
        rows: of `layer.matrix(weight)` that this product computes.
        inputs: `[positions, K]`, or `[batch, channels, *size]` where a kernel moves over it.
        window: how the kernel moves; None for a matrix product.
        groups: into how many problems of equal size `rows` falls, each with its own part of the inputs.
        positions: number of outputs that each row computes.
        output: outputs of all rows, plus `bias`, in any layout; None where the operator does not return them.
    """

    layer: Layer
    rows: slice
    inputs: Tensor
    window: Window | None
    groups: int
    positions: int
    output: Tensor | None = None
    bias: Tensor | None = None

    def energy(self) -> Tensor | None:
        """Sum of the squared outputs, without the bias: 0-dim, float64; None without outputs."""
        if self.output is None:
            return None
        output = self.output if self.bias is None else self.output - self.bias
        return output.float().square().sum(dtype=torch.float64)

    @property
    def key(self) -> Hashable:
        """Equal for products that read the same columns, as long as both inputs are alive."""
        x = self.inputs
        version = object() if x.is_inference() else x._version  # changes in place are not counted there: equal to none
        return x.data_ptr(), version, x.shape, x.stride(), self.window, self.groups

    def columns(self, every: int = 1, offset: int = 0) -> Iterator[Float[Tensor, "groups positions K"]]:
        """The inputs as the matrix that the rows are multiplied with, a part of the positions at a time.

        `K` runs as the columns of `layer.matrix` do.

        Args:
            every: about one of so many positions is taken, on a grid; of each sample at least one where a kernel moves.
            offset: the first position that is taken.
        """
        if self.window is None:
            inputs = self.inputs[offset % every :: every]
            for part in inputs.split(max(1, COLUMNS // self.inputs.shape[-1])):
                yield part[None]
            return
        width = self.layer.total // self.layer.rows * self.groups
        per_sample = max(1, self.positions // len(self.inputs) // every) * width
        for part in self.inputs.split(max(1, COLUMNS // per_sample)):
            yield _unrolled(part, self.window, self.groups, every, offset)

    def squares(self) -> Float[Tensor, "groups K"]:
        """The sum over positions of the squares of `columns()`, in float32 or wider; nothing is unrolled."""
        dtype = torch.promote_types(self.inputs.dtype, torch.float32)
        if self.window is None:
            return torch.stack([part.to(dtype).square().sum(1) for part in self.columns()]).sum(0)
        per_sample = max(1, self.inputs[0].numel())
        parts = self.inputs.split(max(1, COLUMNS // per_sample))
        x = torch.stack([part.to(dtype).square().sum(0) for part in parts]).sum(0)  # [channels, *size]
        places = math.prod(self.window.kernel)
        at_once = max(1, COLUMNS // max(1, self.positions // len(self.inputs) * places))
        seen = [  # channels as samples of one channel: [1, channels * positions, places]
            _unrolled(part[:, None], self.window, 1).view(len(part), -1, places).sum(1) for part in x.split(at_once)
        ]
        return torch.cat(seen).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(1)


@contextmanager
def watched_products(model: nn.Module, scope: Iterable[Layer], visit: Callable[[Product], None]) -> Iterator[None]:
    """While open, each pass calls `visit(product)` after each product of a layer in `scope`, without gradients."""
    with observed(model, scope, lambda product, cost: None if product is None else visit(product)):
        yield


Seen = Callable[["Product | None", tuple[str, int]], None]


@contextmanager
def observed(model: nn.Module, scope: Iterable[Layer], seen: Seen) -> Iterator[None]:
    """While open, `seen(product, (layer name, MACs))` runs after each operator that multiplies by a layer's weight.

    `product` is None where the operator uses the weight in a form that is not a product of its rows.
    """
    layers = list(scope)
    places = places_by_parameter(model)
    mode = _Operators(seen)

    def register(module: nn.Module, args: Any) -> None:
        """Tensors may be put in place for one pass: they are looked up when it starts."""
        mode.weights.clear()
        mode.alive.clear()
        for layer in layers:
            place = places[layer.name][0]
            tensor = _tensor_of(place)
            mode.register(layer, tensor, tensor.stride())

    handle = model.register_forward_pre_hook(register)
    try:
        # a torch-function mode keeps nn.MultiheadAttention off its fused path, which hides its matrix products
        with BaseTorchFunctionMode(), torch.no_grad(), mode:
            yield
    finally:
        handle.remove()


def _tensor_of(place: Place) -> Tensor:
    tensor: Tensor = getattr(place.module, place.attribute)
    return tensor.detach()


@dataclass(frozen=True)
class _Weight:
    """A layer's weight, or a copy of it, in memory: entries `start` to `stop` of a storage.

    `strides` are those of the weight's dimensions; empty where a copy is of another form.
    """

    layer: Layer
    start: int
    stop: int
    strides: tuple[int, ...]

    def rows_of(self, operand: Tensor, row: int, column: int) -> slice | None:
        """Which rows of the layer's matrix `operand` holds, whole, along its dimension `row`.

        None where it holds something else.
        """
        if not self.strides:
            return None
        of_row, of_column = self._matrix_strides()
        count, K = operand.shape[row], operand.shape[column]
        if self.layer.total // self.layer.rows != K:
            return None
        if (count > 1 and operand.stride(row) != of_row) or (K > 1 and operand.stride(column) != of_column):
            return None
        first, rest = divmod(int(operand.storage_offset()) - self.start, of_row)
        return None if rest else slice(first, first + count)

    def _matrix_strides(self) -> tuple[int, int]:
        one, other = self.strides[-2:]
        return (other, one) if self.layer.kind.endswith("_transposed") else (one, other)


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen
        self.weights: dict[int, list[_Weight]] = {}  # by storage
        self.alive: list[Tensor] = []  # copies of weights: as long as they live, their memory is not used again

    def register(self, layer: Layer, tensor: Tensor, strides: tuple[int, ...]) -> None:
        start = int(tensor.storage_offset())
        stop = start + 1 + sum((size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        weight = _Weight(layer, start, stop, strides)
        self.weights.setdefault(tensor.untyped_storage().data_ptr(), []).append(weight)

    def weight_of(self, tensor: Any) -> _Weight | None:
        """The registered weight whose memory `tensor` starts in."""
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return None
        offset = tensor.storage_offset()
        near = self.weights.get(tensor.untyped_storage().data_ptr(), ())
        return next((weight for weight in near if weight.start <= offset < weight.stop), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket
        react = _OPERATORS.get(operator)
        if react is None:
            with self:  # under inference_mode, linear and conv2d arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if react is not None:
            react(self, args, out)
        return out


def _matrix_product(first: int) -> Callable[[_Operators, Any, Any], None]:
    """Reacts to a product of two matrices, or of two stacks of them, the first of which is argument `first`."""

    def react(mode: _Operators, args: Any, out: Tensor) -> None:
        left, right = args[first], args[first + 1]
        for operand, other, of_right in ((right, left, True), (left, right, False)):
            if weight := mode.weight_of(operand):
                product = _product_of(weight, operand, other, of_right=of_right)
                if product is not None:
                    product = replace(product, output=out, bias=args[0] if first else None)
                mode.seen(product, (weight.layer.name, out.numel() * left.shape[-1]))
                return

    return react


def _product_of(weight: _Weight, operand: Tensor, other: Tensor, *, of_right: bool) -> Product | None:
    """The product of a weight's matrix `operand` with `other`, where it is one of whole rows."""
    if operand.dim() == 1:  # a matrix times a vector
        return None
    if operand.dim() == other.dim() == 3 and (operand.stride(0) == 0 or len(operand) == 1):
        # matmul repeats a matrix over a batch whose memory it cannot view as rows
        operand, other = operand[0], other.flatten(0, 1) if of_right else other.transpose(0, 1).flatten(1)
    vector = other.dim() == 1
    if operand.dim() != 2 or other.dim() > 2:
        return None
    rows = weight.rows_of(operand, 1, 0) if of_right else weight.rows_of(operand, 0, 1)
    if rows is None:
        return None
    inputs = other[None] if vector else other if of_right else other.t()
    return Product(weight.layer, rows, inputs, None, 1, len(inputs))


def _convolution(mode: _Operators, args: Any, out: Tensor) -> None:
    """(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    inputs, operand, bias, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    if not (weight := mode.weight_of(operand)):
        return
    positions = out.numel() // out.shape[1] * (1 if inputs.dim() == operand.dim() else 0)
    outputs = (inputs if transposed else out).numel() // operand.shape[0]
    cost = weight.layer.name, operand.numel() * outputs
    whole = operand.shape == weight.layer.shape and operand.stride() == weight.strides
    if not whole or not positions or (not transposed and weight.layer.kind == "conv_transposed"):
        mode.seen(None, cost)
        return
    kernel = tuple(operand.shape[2:])
    stride, padding, dilation = (
        tuple(value) * (len(kernel) if len(value) == 1 else 1) for value in (stride, padding, dilation)
    )
    window = Window(kernel, stride, padding, dilation, bool(transposed), tuple(output_padding) if transposed else ())
    bias = None if bias is None else bias.view(-1, *(1 for _ in kernel))
    rows = slice(0, weight.layer.rows)
    product = Product(weight.layer, rows, inputs, window, int(groups), positions, out, bias)
    mode.seen(product, cost)


def _lstm(mode: _Operators, args: Any, out: Any) -> None:
    """(input, w_ih, w_hh, b_ih, b_hh, hx, cx, reverse, ...) of one layer and direction; the first output is h."""
    inputs, of_inputs, of_hidden, _, _, before, _, reverse = args[:8]
    hidden = out[0]
    previous = torch.cat([hidden[1:], before[None]] if reverse else [before[None], hidden[:-1]])
    for operand, values in ((of_inputs, inputs), (of_hidden, previous)):
        if weight := mode.weight_of(operand):
            flat = values.reshape(-1, values.shape[-1])
            rows = weight.rows_of(operand, 0, 1)
            product = None if rows is None else Product(weight.layer, rows, flat, None, 1, len(flat))
            mode.seen(product, (weight.layer.name, operand.numel() * len(flat)))


def _copy(mode: _Operators, args: Any, out: Any) -> None:
    """A whole copy of a weight, as autocast makes, is used in its place."""
    source = args[0]
    weight = mode.weight_of(source)
    if weight and out.numel() == source.numel() == weight.layer.total:
        dims = dict(zip(zip(source.shape, source.stride(), strict=True), out.stride(), strict=True))
        of_weight = zip(weight.layer.shape, weight.strides, strict=False)
        strides = tuple(dims[size] for size in of_weight if size in dims)
        mode.alive.append(out)
        mode.register(weight.layer, out, strides if len(strides) == len(weight.layer.shape) else ())


_aten = torch.ops.aten
_OPERATORS: Mapping[Any, Callable[[_Operators, Any, Any], None]] = {
    **{operator: _matrix_product(0) for operator in (_aten.mm, _aten.bmm, _aten.mv)},
    **{operator: _matrix_product(1) for operator in (_aten.addmm, _aten.baddbmm, _aten.addmv)},
    **dict.fromkeys((_aten.convolution, _aten._convolution), _convolution),
    **dict.fromkeys((_aten.clone, _aten._to_copy), _copy),
    _aten.mkldnn_rnn_layer: _lstm,
}


def _unrolled(x: Tensor, window: Window, groups: int, every: int, offset: int) -> Float[Tensor, "groups positions K"]:
    """What the kernel sees at each position: kernel positions run slowest along K, channels fastest."""
    kernel, dims = window.kernel, len(window.kernel)
    stride = window.stride
    if window.transposed:
        x, stride = _stuffed(x, window), (1,) * dims
    else:
        x = nn.functional.pad(x, [side for p in reversed(window.padding) for side in (p, p)])
    grids = []  # of each dimension: first position, step, number of positions
    for dim, (k, d, s) in enumerate(zip(kernel, window.dilation, stride, strict=True)):
        count = (x.shape[2 + dim] - d * (k - 1) - 1) // s + 1
        step = min(count, round(every ** (1 / (dims - dim))))
        every = max(1, every // step)
        grids.append((offset % step * s, step * s, len(range(offset % step, count, step))))
    x = x.unflatten(1, (groups, -1))  # [batch, groups, channels, *size]
    seen = []
    for place in itertools.product(*map(range, kernel)):
        if window.transposed:  # a kernel that spreads inputs out reads them backwards
            place = tuple(k - 1 - i for k, i in zip(kernel, place, strict=True))
        part = x
        for dim, (i, d, (first, step, count)) in enumerate(zip(place, window.dilation, grids, strict=True), 3):
            part = part.narrow(dim, i * d + first, (count - 1) * step + 1)
            part = part.unfold(dim, 1, step).squeeze(-1)  # one of every `step`
        seen.append(part.movedim(2, -1).transpose(0, 1).flatten(1, -2))  # [groups, positions, channels]
    return torch.cat(seen, -1)


def _stuffed(x: Tensor, window: Window) -> Tensor:
    """Inputs of a transposed convolution with zeros between and around them, over which the kernel moves by 1."""
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], window.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    every = tuple(slice(None, None, s) for s in window.stride)
    stuffed[(slice(None), slice(None), *every)] = x
    extra = window.output_padding or (0,) * len(sizes)
    sides = []
    for k, d, p, e in zip(window.kernel, window.dilation, window.padding, extra, strict=True):
        sides.append((d * (k - 1) - p, d * (k - 1) - p + e))
    return nn.functional.pad(stuffed, [side for pair in reversed(sides) for side in pair])
