"""Products of a layer's weight with its inputs, seen below the modules while the model runs.

A pass of any module comes down to a few operators of torch: matrix products, convolutions, and the LSTM kernel. A
weight is recognised among their operands by its memory, so that functional use, subclasses with a forward of their own,
attention, experts and shared weights all count. A weight that is recomputed before use (standardised, say) is not
recognised here, but in `allot.network.computed`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from allot.network.computed import Computed
from allot.network.kinds import EXPERTS
from allot.network.layers import Layer, places_by_parameter
from allot.network.memory import Held, Memory, copies_made_anew, extent

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
        inputs: `[positions, K]`, `[groups, positions, K]`, or `[batch, channels, *size]` where a kernel moves over it.
        window: how the kernel moves; None for a matrix product.
        groups: into how many problems of equal size `rows` falls, each with its own part of the inputs.
        positions: number of outputs that each row computes.
        version: counts the changes of the inputs' memory so far.
    """

    layer: Layer
    rows: slice
    inputs: Tensor
    window: Window | None
    groups: int
    positions: int
    version: int

    @property
    def key(self) -> Hashable:
        """Equal for products that read the same columns, as long as both inputs are alive."""
        x = self.inputs
        return x.data_ptr(), self.version, x.shape, x.stride(), self.window, self.groups

    def columns(self, every: int = 1, offset: int = 0) -> Iterator[Float[Tensor, "groups positions K"]]:
        """The inputs as the matrix that the rows are multiplied with, a part of the positions at a time.

        `K` runs as the columns of `layer.matrix` do.

        Args:
            every: about one of so many positions is taken, on a grid; of each sample at least one where a kernel moves.
            offset: the first position that is taken.
        """
        if self.window is None:
            stack = (self.inputs if self.inputs.dim() == 3 else self.inputs[None])[:, offset % every :: every]
            yield from stack.split(max(1, COLUMNS // (len(stack) * stack.shape[-1])), 1)
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
            _unrolled(part[:, None], self.window, 1, 1, 0).view(len(part), -1, places).sum(1)
            for part in x.split(at_once)
        ]
        return torch.cat(seen).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(1)


@contextmanager
def watched_products(model: nn.Module, scope: Iterable[Layer], visit: Callable[[Product], None]) -> Iterator[None]:
    """While open, each pass calls `visit(product)` at each product of a layer in `scope`, without gradients."""
    with observed(model, scope, lambda product, cost: None if product is None else visit(product)):
        yield


Seen = Callable[["Product | None", tuple[str, int]], None]


@contextmanager
def observed(model: nn.Module, scope: Iterable[Layer], seen: Seen, computed: Computed | None = None) -> Iterator[None]:
    """While open, `seen(product, (layer name, MACs))` runs at each operator that multiplies by a layer's weight.

    `product` is None where the operator uses the weight in a form that is not a product of its rows.

    Args:
        computed: follows weights that are computed from those of the layers.
    """
    layers = list(scope)
    places = places_by_parameter(model)
    mode = _Operators(seen, computed)

    def register(module: nn.Module, args: Any, kwargs: Any) -> None:
        """Tensors may be put in place for one pass: they are looked up when it starts."""
        mode.memory = Memory()
        for layer in layers:
            place = places[layer.name][0]
            tensor = getattr(place.module, place.attribute).detach()
            mode.memory.add(Held(layer, *extent(tensor), tensor.stride()), tensor)
        if computed:
            computed.begin(mode.memory)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if computed:
            computed.enter((args, kwargs))

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(register, with_kwargs=True).remove)
        for module in model.modules() if computed else ():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no such hook
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.enter_context(copies_made_anew())
        stack.enter_context(_Plain())
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        yield


class _Plain(BaseTorchFunctionMode):
    """Keeps nn.MultiheadAttention off its fused path, and recurrent layers off cuDNN: both hide matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECURRENT and torch.backends.cudnn.is_available():
            with torch.backends.cudnn.flags(enabled=False):
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Seen, computed: Computed | None) -> None:
        super().__init__()
        self.seen, self.computed = seen, computed
        self.memory = Memory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        react = _OPERATORS.get(func._overloadpacket) or _BY_NAME.get(func.name())
        if react is None and func._overloadpacket not in _PRODUCTS:
            with self:  # under inference_mode, linear and conv2d arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        react_before = _PRODUCTS.get(func._overloadpacket)
        if react_before is not None:  # who needs the inputs alone may end the pass before the product is computed
            react_before(self, (*args, *kwargs.values()))
        out = func(*args, **kwargs)
        if react is not None:
            react(self, (*args, *kwargs.values()), out)
        if self.computed:
            self.computed.follow(func, args, kwargs, out)
        return out

    def report(self, weights: list[Held], operand: Tensor, inputs: Tensor, version: int) -> None:
        """Report the products of `operand`, which holds one of these weights, with `inputs`.

        Args:
            operand: `[batch, rows, K]`.
            inputs: `[batch, positions, K]`.
        """
        for weight in weights:
            products = list(_products_of(weight, operand, inputs, version))
            for product in products:
                rows = product.rows.stop - product.rows.start
                self.seen(product, (weight.layer.name, rows * product.positions * product.inputs.shape[-1]))
            if products:
                return
        self.seen(None, (weights[0].layer.name, operand.shape[1] * inputs.shape[:2].numel() * operand.shape[2]))


def _products_of(weight: Held, operand: Tensor, inputs: Tensor, version: int) -> Iterator[Product]:
    """The products of `operand` with `inputs` where it holds whole rows of the weight, as `_Operators.report` has them.

    Matrices that follow one another are one product in groups; the inputs of one matrix are put together.
    """
    layer, (count, K) = weight.layer, operand.shape[1:]
    offset, (of_batch, *strides) = int(operand.storage_offset()), operand.stride()
    starts = []
    for number in range(len(operand)):
        rows = weight.rows_of(offset + number * of_batch, (count, K), strides)
        if rows is None:
            return
        starts.append(rows.start)
    if len(starts) == 1:
        yield Product(layer, slice(starts[0], starts[0] + count), inputs[0], None, 1, inputs.shape[1], version)
    elif all(after == before + count for before, after in itertools.pairwise(starts)):
        yield Product(layer, slice(starts[0], starts[-1] + count), inputs, None, len(starts), inputs.shape[1], version)
    else:
        batches: dict[int, list[int]] = {}
        for number, start in enumerate(starts):
            batches.setdefault(start, []).append(number)
        for start, numbers in batches.items():
            part = (inputs if len(numbers) == len(inputs) else inputs[numbers]).flatten(0, 1)
            yield Product(layer, slice(start, start + count), part, None, 1, len(part), version)


def _version(tensor: Tensor) -> int:
    """Counts changes; tensors of inference mode do not, so that each use of one has another number."""
    return -next(_uses) if tensor.is_inference() else int(tensor._version)


_uses = itertools.count(1)


def _matrix_product(first: int) -> Callable[[_Operators, Any], None]:
    """Reacts to a product of two matrices, or of two stacks of them, the first of which is argument `first`."""

    def react(mode: _Operators, args: Any) -> None:
        left, right = args[first], args[first + 1]
        found = [(mode.memory.find(right), right, left, True), (mode.memory.find(left), left, right, False)]
        # where both may be weights, one that is no layer for sure was read as an input
        found.sort(key=lambda operand: (not operand[0], *(weight.layer.kind in EXPERTS for weight in operand[0][:1])))
        weights, operand, other, of_right = found[0]
        if not weights:
            return
        if operand.dim() == 1:  # a matrix times a vector
            mode.seen(None, (weights[0].layer.name, left.numel()))
            return
        version = _version(other)
        operand, other = (x if x.dim() == 3 else x[None] for x in (operand, other if other.dim() > 1 else other[None]))
        vector = left.dim() > right.dim()
        if of_right:
            mode.report(weights, operand.transpose(1, 2), other, version)
        else:
            mode.report(weights, operand, other if vector else other.transpose(1, 2), version)

    return react


def _grouped_product(mode: _Operators, args: Any, out: Tensor) -> None:
    """(inputs, weights, ends, ...): each matrix of the weights is multiplied with the inputs up to its end."""
    inputs, operand = args[:2]
    weights = mode.memory.find(operand)
    if not weights:
        return
    if inputs.dim() != 2 or operand.dim() != 3:
        mode.seen(None, (weights[0].layer.name, out.numel() * inputs.shape[-1]))
        return
    start = 0
    for number, end in enumerate(args[2].tolist()):
        if end > start:
            mode.report(
                weights, operand[number : number + 1].transpose(1, 2), inputs[None, start:end], _version(inputs)
            )
        start = end


def _convolution(mode: _Operators, args: Any, out: Tensor) -> None:
    """(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    inputs, operand, _, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    if not (weights := mode.memory.find(operand)):
        return
    weight = weights[0]
    positions = out.numel() // out.shape[1] * (1 if inputs.dim() == operand.dim() else 0)
    outputs = (inputs if transposed else out).numel() // operand.shape[0]
    cost = weight.layer.name, operand.numel() * outputs
    whole = operand.shape == weight.layer.shape and operand.stride() == weight.strides
    kinds = ("conv_transposed",) if transposed else ("conv",)
    if not whole or not positions or weight.layer.kind not in kinds:
        mode.seen(None, cost)
        return
    kernel = tuple(operand.shape[2:])
    stride, padding, dilation = (
        tuple(value) * (len(kernel) if len(value) == 1 else 1) for value in (stride, padding, dilation)
    )
    window = Window(kernel, stride, padding, dilation, bool(transposed), tuple(output_padding) if transposed else ())
    product = Product(
        weight.layer, slice(0, weight.layer.rows), inputs, window, int(groups), positions, _version(inputs)
    )
    mode.seen(product, cost)


def _lstm(mode: _Operators, args: Any, out: Any) -> None:
    """(input, w_ih, w_hh, b_ih, b_hh, hx, cx, reverse, ...) of one layer and direction; the first output is h."""
    inputs, of_inputs, of_hidden, _, _, before, _, reverse = args[:8]
    hidden = out[0]
    first = before.reshape(1, *hidden.shape[1:])
    previous = torch.cat([hidden[1:], first] if reverse else [first, hidden[:-1]])
    for operand, values in ((of_inputs, inputs), (of_hidden, previous)):
        if weights := mode.memory.find(operand):
            mode.report(weights, operand[None], values.reshape(1, -1, values.shape[-1]), _version(values))


def _copy(mode: _Operators, args: Any, out: Any) -> None:
    """A copy of a weight, as autocast makes, is used in its place."""
    _follow(mode, args[0], out, None)


def _pick(mode: _Operators, args: Any, out: Any) -> None:
    """(weight, indices): matrices of a stack are copied, one a token say."""
    first, *others = args[1]
    if isinstance(first, Tensor) and all(index is None for index in others):
        _follow(mode, args[0], out, first.nonzero().flatten() if first.dtype == torch.bool else first)


def _select(mode: _Operators, args: Any, out: Any) -> None:
    """(weight, dimension, indices)."""
    if args[1] == 0:
        _follow(mode, args[0], out, args[2].reshape(-1))


def _follow(mode: _Operators, source: Tensor, out: Tensor, index: Tensor | None) -> None:
    for weight in mode.memory.find(source):
        if copy := weight.copied(source, out, index):
            mode.memory.add(copy, out)


_aten = torch.ops.aten
_PRODUCTS: Mapping[Any, Callable[[_Operators, Any], None]] = {
    **{operator: _matrix_product(0) for operator in (_aten.mm, _aten.bmm, _aten.mv)},
    **{operator: _matrix_product(1) for operator in (_aten.addmm, _aten.baddbmm, _aten.addmv)},
}
_OPERATORS: Mapping[Any, Callable[[_Operators, Any, Any], None]] = {
    **dict.fromkeys((_aten.convolution, _aten._convolution), _convolution),
    **dict.fromkeys((_aten.clone, _aten._to_copy), _copy),
    _aten.mkldnn_rnn_layer: _lstm,
    _aten._grouped_mm: _grouped_product,
    _aten.index: _pick,
    _aten.index_select: _select,
}
_BY_NAME = {"transformers::grouped_mm_fallback": _grouped_product}  # where torch has no kernel for groups


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
