"""Tables of latency: the time of layers and of whole nets in the runtime that will serve them.

Every layer is timed alone at several sizes of its weight; then whole nets with fewer channels are timed, and

    T = b + s sum_l T_l + m M        (`allot.budget.latency`)

is fitted to them in relative squares, b, s and m at least 0: operations between layers, and fused operations, are in
the time of no layer. The median of each counts, timed in turn, so that a busy machine slows all of them alike. Where no
such T comes near the times of the whole nets, other work disturbed the measurement, and all is measured once more. Then
the net with equal shares at the limit is timed beside the dense net: where T misses it, these two determine b and s.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allot.budget.bisection import largest
from allot.budget.channels import Extent
from allot.budget.costs import Term
from allot.budget.latency import Latency, LayerTimes, Sides, monotone
from allot.budget.units import Amount
from allot.errors import UsageError, check_number, unknown
from allot.export.runtimes.forms import write_and_reopen
from allot.export.runtimes.onnx import onnx_session
from allot.export.timing.clock import Run, timed
from allot.network.call import attempt
from allot.network.channels import ChannelPlan, copied, slimmed
from allot.network.hooks import hooked, module_places
from allot.network.layers import Group, Layer, Scope, places_by_parameter
from allot.network.trees import as_arguments, map_tensors

RUNTIMES = ("onnx", "torch")
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # shares of its channels that a layer is timed with, on either side
WHOLE = (1.0, 0.75, 0.5, 0.3)  # shares of the net, the same in all groups
MIXED = 4  # number of nets with a different share in each group
FAR = 0.25  # a relative error of T above this: other work disturbed the clock


@dataclass(frozen=True)
class Runtime:
    """The runtime that serves the model: ONNX Runtime or PyTorch on this machine, `batch` samples at a time."""

    name: str
    batch: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Runtime:
        """`onnx`, `torch`, or with a batch size, `onnx:64`; None: onnx if it is installed, one sample at a time.

        Raises:
            UsageError: another runtime, a runtime that is not installed, or no batch size.

        >>> Runtime.parse("torch:64")
        Runtime(name='torch', batch=64)
        """
        installed = importlib.util.find_spec("onnxruntime") is not None
        name, colon, batch = (text or ("onnx" if installed else "torch")).partition(":")
        if name not in RUNTIMES:
            raise unknown("runtime", name, RUNTIMES)
        if name == "onnx" and not installed:
            raise UsageError("onnxruntime is not installed: pip install 'allot[onnx]', or --runtime torch.")
        if colon and not batch.isdecimal():
            raise UsageError(f"runtime {text!r}: a batch size after the colon is accepted, like {name}:64.")
        check_number("runtime: batch size", int(batch or 1), 1, whole=True)
        return cls(name, int(batch or 1))

    def __str__(self) -> str:
        return self.name if self.batch == 1 else f"{self.name}:{self.batch}"

    def ready(self, model: nn.Module, example: Any) -> Run:
        """A function that runs one batch of `model`; for ONNX Runtime, the model is written and opened first.

        Args:
            example: a batch of one input.
        """
        batch = repeated(example, self.batch)
        model = copied(model).eval()  # a forward pass may write to the model that was passed in
        if self.name == "onnx":
            with tempfile.TemporaryDirectory() as folder:
                opened, _ = write_and_reopen(model, batch, Path(folder) / "model.onnx", "onnx")
            return lambda: opened.run(batch)
        args, kwargs = as_arguments(batch)

        def run() -> Any:
            with torch.no_grad():
                return model(*args, **kwargs)

        return run


def latency_of(
    model: nn.Module,
    scope: Scope,
    groups: Sequence[Group],
    extents: Sequence[Extent],
    terms: Sequence[Term],
    example: Any,
    asked: str,
    *,
    runtime: Runtime,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Latency:
    """The tables of a model, measured here and now: half a minute for a small net, minutes for a large one.

    Args:
        example: a batch of one input.
        asked: the limit, as in `Budget`; the tables are scaled to be right for the uniform net at the limit.
        on_step: called with (done, of) after each layer and each whole net.
    Raises:
        UsageError: the runtime does not run the model.
    """
    tensors = {extent.name: extent for extent in extents}
    products = products_of(model, scope, example)
    done, steps = itertools.count(1), len(products) + len(WHOLE) + MIXED + 1

    def progress() -> None:
        if on_step:
            on_step(min(next(done), steps), steps)

    def channels(shares: Mapping[str, float]) -> dict[str, int]:
        rounded = {t.name: max(round(shares[t.name] * t.total / t.step), 1) * t.step for t in terms}
        return {t.name: min(max(rounded[t.name], t.lower), t.upper) for t in terms}

    def uniform(share: float) -> dict[str, int]:
        return channels({term.name: share for term in terms})

    def sides(net: Mapping[str, int]) -> dict[str, Sides]:
        return {name: (float(side[0]), float(side[1])) for name in timed_names if (side := tensors[name].sides(net))}

    def ready(net: Mapping[str, int]) -> Run:
        plan = ChannelPlan.of(model, groups, {name: range(count) for name, count in net.items()})
        run = runtime.ready(slimmed(model, plan), example)
        progress()
        return run

    timed_names = [product.layer.name for product in products]
    draw = random.Random(seed)
    nets = [uniform(share) for share in WHOLE]
    nets += [channels({term.name: draw.uniform(0.2, 1) for term in terms}) for _ in range(MIXED)]
    runs = {str(i): ready(net) for i, net in enumerate(nets)}

    def measured() -> Latency:
        layers = _tables(products, tensors, {term.name: term for term in terms}, runtime, progress)
        whole = [1e9 * time for time in timed(runs, seconds=3.0, least=7).values()]
        alone = Latency(str(runtime), runtime.batch, layers, 0.0, 1.0, 0.0, round(whole[0]))
        traffic = replace(alone, scale=0.0, traffic=1.0)
        b, s, m, off = fitted(whole, *([table.of(sides(net))[0] for net in nets] for table in (alone, traffic)))
        return replace(alone, base=b, scale=s, traffic=m, off=off)

    tables = measured()
    if tables.off > FAR:
        tables = min(tables, measured(), key=lambda table: table.off)
    limit = Amount.read("latency", asked)
    ceiling = float(limit.value) * (tables.dense if limit.relative else 1)
    at_limit = uniform(largest(lambda share: tables.of(sides(uniform(share)))[0] <= ceiling, 1.0))
    taken = timed({"dense": runs["0"], "at limit": ready(at_limit)}, seconds=2.0, least=9)
    time = taken["at limit"] / taken["dense"] * tables.dense
    if abs(tables.of(sides(at_limit))[0] / time - 1) > FAR and time < tables.dense:
        tables = through(tables, sides(nets[0]), sides(at_limit), time)
    return tables.slowed(time / tables.of(sides(at_limit))[0])


def through(tables: Latency, dense: Mapping[str, Sides], small: Mapping[str, Sides], time: float) -> Latency:
    """The tables with b and s such that T is the time of the dense net, and `time` of a smaller one; b is at least 0.

    Args:
        dense, small: the sides of the weights of both nets.
        time: nanoseconds, less than the dense net takes.
    """
    alone = replace(tables, base=0.0, scale=1.0, traffic=0.0, slow=1.0)
    most, least = (alone.of(sides)[0] for sides in (dense, small))
    scale = min((tables.dense - time) / max(most - least, 1e-9), tables.dense / most)
    return replace(alone, base=tables.dense - scale * most, scale=scale)


def _tables(
    products: Sequence[Product],
    tensors: Mapping[str, Extent],
    terms: Mapping[str, Term],
    runtime: Runtime,
    progress: Callable[[], None],
) -> tuple[LayerTimes, ...]:
    """Every layer alone, at SHARES of its channels on both sides; equal layers are timed once."""

    def grid(fixed: int, groups: Sequence[tuple[str, int]]) -> tuple[int, ...]:
        sides = set()
        for share in SHARES:
            pairs = [(terms[name], places) for name, places in groups]
            steps = [max(round(share * term.total / term.step), 1) * term.step for term, _ in pairs]
            sides.add(fixed + sum(places * min(k, term.total) for k, (term, places) in zip(steps, pairs, strict=True)))
        return tuple(sorted(sides))

    measured: dict[Any, tuple[tuple[float, ...], ...]] = {}
    layers = []
    for product in products:
        rows, columns = (grid(*dim) for dim in tensors[product.layer.name].dims[:2])
        key = (product.settings, rows, columns)
        if key not in measured:
            runs = {f"{r} {c}": product.ready(runtime, r, c) for r, c in itertools.product(rows, columns)}
            taken = timed(runs, seconds=0.3, least=7)
            measured[key] = monotone([[1e9 * taken[f"{r} {c}"] for c in columns] for r in rows])
        times = tuple(tuple(product.calls * time for time in row) for row in measured[key])
        layers.append(LayerTimes(product.layer.name, rows, columns, times, product.out, product.places * runtime.batch))
        progress()
    return tuple(layers)


def time_both(
    dense: nn.Module, slim: nn.Module, example: Any, runtime: Runtime, *, seconds: float = 2.0
) -> list[float]:
    """Nanoseconds a batch, measured in turn: `[dense, slim]`."""
    nets = {"dense": dense, "slim": slim}
    taken = timed({name: runtime.ready(net, example) for name, net in nets.items()}, seconds=seconds, least=9)
    return [1e9 * taken[name] for name in nets]


def fitted(
    whole: Sequence[float], sums: Sequence[float], traffic: Sequence[float]
) -> tuple[float, float, float, float]:
    """(b, s, m, largest relative error): least relative squares of b + s sums + m traffic - whole, none below 0."""
    weight = 1 / np.array(whole)
    columns = np.stack([np.ones(len(whole)), np.array(sums), np.array(traffic)])
    solutions = []
    for used in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2]):
        solution, weighted = np.zeros(3), columns[used] * weight
        scale = np.abs(weighted).max(1)  # sums and traffic are of different size
        solution[used] = np.linalg.lstsq((weighted / scale[:, None]).T, np.ones(len(whole)))[0] / scale
        if (solution >= 0).all():
            solutions.append(solution)
    best = min(solutions, key=lambda solution: np.square(solution @ columns * weight - 1).sum())  # a constant is one
    b, s, m = map(float, best)
    return b, s, m, float(np.abs(best @ columns * weight - 1).max())


@dataclass(frozen=True)
class Product:
    """One layer alone: a convolution or a matrix product, with a weight of any size.

    Attributes:
        convolution: stride, padding, dilation, output padding; None for a matrix product.
        inside: spatial sides of the input; of a matrix product, its rows a sample.
        calls: how often the layer runs in one pass.
        places: numbers a sample in one output channel, in all calls.
        like: the weight.
    """

    layer: Layer
    convolution: tuple[tuple[int, ...], ...] | None
    inside: tuple[int, ...]
    calls: int
    places: int
    like: Tensor

    @property
    def settings(self) -> Any:
        """Everything that determines its time but the size of its weight."""
        return self.layer.kind, self.layer.groups, self.layer.shape[2:], self.convolution, self.inside

    @property
    def out(self) -> int:
        return int(self.layer.kind in ("conv_transposed", "linear_transposed"))

    def ready(self, runtime: Runtime, rows: int, columns: int) -> Run:
        """A function that runs the layer with a weight `[rows, columns, *kernel]`."""
        weight = torch.randn(rows, columns, *self.layer.shape[2:])
        groups = rows if self.layer.groups == self.layer.shape[0] > 1 else self.layer.groups
        into = (columns, rows)[self.out] if self.convolution is None else rows if self.out else columns * groups
        if self.convolution is None:
            x = torch.randn(runtime.batch * self.inside[0], into)
            weight = weight if self.out else weight.t().contiguous()
        else:
            x = torch.randn(runtime.batch, into, *self.inside)
        if runtime.name == "onnx":
            return _one_node(x, weight, self._node(groups))
        x, weight = x.to(self.like), weight.to(self.like)  # its device and dtype
        if self.convolution is None:
            return lambda: x @ weight
        stride, padding, dilation, extra = self.convolution
        return lambda: torch.convolution(x, weight, None, stride, padding, dilation, bool(self.out), extra, groups)

    def _node(self, groups: int) -> tuple[str, dict[str, Any]]:
        """Name and attributes of its ONNX operator."""
        if self.convolution is None:
            return "MatMul", {}
        stride, padding, dilation, extra = self.convolution
        settings: dict[str, Any] = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
        return ("ConvTranspose", settings | {"output_padding": extra}) if self.out else ("Conv", settings)


def products_of(model: nn.Module, scope: Scope, example: Any) -> list[Product]:
    """Every layer that the example reaches, with the shapes of its inputs."""
    seen: dict[str, list[tuple[nn.Module, torch.Size, int]]] = {}

    def record(layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(layer.name, []).append((module, x.shape, output.numel() // layer.rows))

    places = places_by_parameter(model)
    with hooked((place.module, partial(record, layer)) for layer, place in module_places(scope, places)):
        attempt(model, example, {})
    products = []
    for layer in scope:
        if not layer.macs:
            continue
        uses, weight = max(layer.macs // layer.total, 1), places[layer.name][0].parameter.detach()
        calls = seen.get(layer.name, [])
        if not calls or not layer.kind.startswith("conv"):  # the projections of an attention are products, too
            count = max(len(calls), 1)
            products.append(Product(layer, None, (max(uses // count, 1),), count, uses, weight))
            continue
        module: Any = calls[0][0]
        inside = tuple(calls[0][1][2 - len(layer.shape) :])
        sized = (module.stride, module.dilation, getattr(module, "output_padding", 0))
        stride, dilation, extra = (_per_side(value, len(inside)) for value in sized)
        padding = _padding(module.padding, layer.shape[2:], dilation)
        outputs = sum(numbers for _, _, numbers in calls)
        products.append(Product(layer, (stride, padding, dilation, extra), inside, len(calls), outputs, weight))
    return products


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    if padding == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return _per_side(0 if padding == "valid" else padding, len(kernel))


def _per_side(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * dims


def _one_node(x: Tensor, weight: Tensor, node: tuple[str, dict[str, Any]]) -> Run:
    """A function that runs an ONNX graph of this one operator."""
    from onnx import TensorProto, helper, numpy_helper

    operator, settings = node
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "weight"], ["y"], **settings)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.numpy(), "weight")],
    )
    # the versions that the exporter of models writes
    written = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnx_session(written.SerializeToString())
    inputs = {"x": x.numpy()}
    return lambda: session.run(None, inputs)


def repeated(inputs: Any, times: int) -> Any:
    """A batch of `times` copies of one input.

    >>> repeated(torch.ones(1, 3), 4).shape
    torch.Size([4, 3])
    """
    return map_tensors(lambda x: x.repeat(times, *[1] * (x.dim() - 1)) if x.dim() else x, inputs)
