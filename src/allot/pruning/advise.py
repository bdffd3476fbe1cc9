"""What pays on this machine, for this model: measured on its own layers before anything is pruned.

channels       the tables of a budget of time (`allot.export.timing.latency`) foretell nets with equal shares of
channels unstructured   linear layers as compressed-sparse-row matrices beside their dense selves, in PyTorch, and what
               the whole net would gain; of convolutions no runtime here has a sparse kernel: single weights make the
               file smaller
2:4            linear layers in half precision on a GPU with sparse tensor cores, where there is one

A density breaks even where the sparse layer takes as long as the dense one; between densities measured, on the line.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.budget.channels import channel_budget
from allot.budget.latency import Latency
from allot.errors import AllotError, UsageError
from allot.export.files.formats import csr
from allot.export.runtimes.sparse import has_sparse_tensor_cores, linear_layers, semi_structured
from allot.export.timing.clock import PAYS, timed
from allot.export.timing.latency import Runtime, latency_of, repeated
from allot.export.timing.sparse_layers import inputs_of, time_converted
from allot.network.call import attempt
from allot.network.channels import copied
from allot.network.draws import generator
from allot.network.layers import Scope
from allot.network.macs import measured
from allot.pruning.setup import make_problem
from allot.run.calibration import moved
from allot.run.patterns import Channels, parse

MACS = (0.9, 0.7, 0.5, 0.3)  # shares of the MACs that nets of fewer channels are foretold at
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
LAYERS = 4  # linear layers that are measured, those with most MACs
WORTH = 1.1  # times as fast, below which nothing is advised: what is foretold is less sure than what was timed

_PRUNE = "allot prune MODEL --data DATA --out RUN"


def advise(
    model: nn.Module,
    example: Any,
    *,
    pattern: str = "channels:8",
    runtime: Runtime | None = None,
    seed: int = 0,
    label: str = "MODEL",
    data: str = "DATA",
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What was measured, and what it comes to.

    Args:
        example: a batch of one input.
        pattern: in what multiples channels go.
        runtime: where channels are timed; where None, ONNX Runtime if it is installed and takes the model, else
            PyTorch, one sample at a time.
        label, data: what the model and its data are called in commands that are advised.
        on_step: as in `latency_of`.
    Returns:
        `{"machine", "runtime", "pattern", "channels": [{"macs", "faster"}], "why_not", "linear": [{"layer", "layers",
        "share", "faster": {density: times}, "break_even"}], "net": {"milliseconds", "faster": {density: times}} or
        null, "semi_structured": {layer: times} or null, "said": [sentence]}`; `faster` and times are over dense. A row
        of `linear` stands for `layers` of one shape; `net` is what the whole net is foretold to gain in PyTorch when
        those of them that gain are sparse.
    Raises:
        UsageError: no pattern of channels, or the model does not run on the example, or the runtime cannot take it.
    """
    if not isinstance(parse(pattern), Channels):
        raise UsageError(f"pattern {pattern!r}: channels, or channels:8 for multiples of 8, is accepted.")
    scope = measured(Scope.of(model), model, lambda: attempt(model, example, {}))
    runtime = _taking(model, example, runtime)
    channels, why_not = _channels(model, example, pattern, runtime, seed, on_step)
    linear, net = _linear(copied(model).eval(), repeated(example, runtime.batch), scope)
    told = {
        "machine": machine(),
        "runtime": str(runtime),
        "pattern": pattern,
        "channels": channels,
        "why_not": why_not,
        "linear": linear,
        "net": net,
        "semi_structured": _semi_structured(model, example, [layer.name for layer in scope]),
    }
    return {**told, "said": [said.replace("DATA", data).replace("MODEL", label) for said in _said(told)]}


def break_even(densities: Sequence[float], faster: Sequence[float]) -> float | None:
    """The highest density at which the sparse layer is as fast as the dense one; None where it never is.

    Args:
        densities: descending.
        faster: times as fast as dense, of each.
    """
    if faster[0] >= 1:
        return densities[0]
    for (d, before), (e, after) in itertools.pairwise(zip(densities, faster, strict=True)):
        if before < 1 <= after:
            return d + (e - d) * (1 - before) / (after - before)
    return None


def _taking(model: nn.Module, example: Any, runtime: Runtime | None) -> Runtime:
    """A runtime that takes the model: the one asked for, or the first that does.

    Raises:
        UsageError: the one asked for cannot.
    """
    first = runtime or Runtime.parse(None)
    try:
        first.ready(model, example)
    except UsageError:
        if runtime or first.name == "torch":
            raise
        return Runtime("torch")
    return first


def _channels(
    model: nn.Module,
    example: Any,
    pattern: str,
    runtime: Runtime,
    seed: int,
    on_step: Callable[[int, int], None] | None,
) -> tuple[list[dict[str, float]], str | None]:
    """How much faster nets with equal shares of channels are foretold to be; or why no channels can go."""

    def tables(*problem: Any) -> Latency:
        model, scope, groups, extents, terms, example, _ = problem
        half = "50%"  # where tables are made right, whatever is asked
        return latency_of(
            model, scope, groups, extents, terms, example, half, runtime=runtime, seed=seed, on_step=on_step
        )

    try:
        budget = channel_budget(
            make_problem(model, Budget(latency="99.9%"), parse(pattern), example=example, latency=tables).budget
        )
    except AllotError as error:
        said = str(error).rstrip(".")
        # of the limit above nobody has heard
        return [], "fewer channels are not foretold to be any faster" if said.startswith("latency=") else said
    assert budget.latency is not None
    found = []
    for share in MACS:
        try:
            asked = replace(budget.weights, latency=None, macs=f"{100 * share:g}%")
            kept = replace(budget, weights=asked).counts({term.name: 1.0 for term in budget.terms})
        except AllotError:  # so few MACs are out of reach
            continue
        share = budget.cost("macs", kept) / sum(term.macs or 0 for term in budget.weights.terms)
        found.append({"macs": share, "faster": budget.latency.dense / max(budget.time(kept)[0], 1.0)})
    return found, None


def _linear(model: nn.Module, example: Any, scope: Scope) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Linear layers as sparse matrices, beside themselves, at every density; and what the net gains from that."""
    macs = {layer.name: layer.macs or 0 for layer in scope}
    try:
        layers = linear_layers(model, macs)
    except UsageError:
        return [], None
    alike: dict[Any, list[str]] = {}
    inputs = inputs_of(layers, model, example)
    for name, x in inputs.items():
        alike.setdefault((layers[name].weight.shape, x.shape), []).append(name)
    shares = {names[0]: sum(macs[name] for name in names) / max(sum(macs.values()), 1) for names in alike.values()}
    heaviest = sorted(alike.values(), key=lambda names: -shares[names[0]])[:LAYERS]
    whole = timed({"net": lambda: attempt(model, example, {})}, least=7, seconds=0.5)["net"]
    rows, saved = [], dict.fromkeys(DENSITIES, 0.0)
    for names in heaviest:
        try:
            taken = _densities(layers[names[0]], inputs[names[0]])
        except RuntimeError:  # numbers, or inputs, that sparse matrices do not take
            continue
        faster = {density: taken["dense"] / taken[density] for density in DENSITIES}
        for density in DENSITIES:
            if faster[density] >= PAYS:  # what gains nothing stays dense
                saved[density] += len(names) * (taken["dense"] - taken[density])
        rows.append(
            {
                "layer": names[0],
                "layers": len(names),
                "share": shares[names[0]],
                "faster": {f"{density:g}": value for density, value in faster.items()},
                "break_even": break_even(DENSITIES, list(faster.values())),
            }
        )
    net = {f"{d:g}": whole / max(whole - gain, 1e-3 * whole) for d, gain in saved.items()}
    return rows, {"milliseconds": 1000 * whole, "faster": net}


def _densities(layer: nn.Linear, x: Tensor) -> dict[Any, float]:
    """Seconds that the layer takes, dense and at every density; which weights are left is up to chance.

    Raises:
        RuntimeError: numbers, or inputs, that sparse matrices do not take.
    """
    weight, draw = layer.weight.detach(), generator(0)
    matrices: dict[Any, Tensor] = {"dense": weight}
    for density in DENSITIES:
        matrices[density] = csr((torch.rand(weight.shape, generator=draw) < density).to(weight) * weight)
    with torch.no_grad():
        runs = {key: partial(torch.nn.functional.linear, x, matrix, layer.bias) for key, matrix in matrices.items()}
        return timed(runs, seconds=0.5, least=7)


def _semi_structured(model: nn.Module, example: Any, names: list[str]) -> dict[str, float] | None:
    """Linear layers as 2:4 in half precision on the GPU, beside themselves; None without sparse tensor cores."""
    if not has_sparse_tensor_cores():
        return None
    half = copied(model).to("cuda", torch.float16).eval()
    try:
        layers = linear_layers(half, names)
    except UsageError:
        return {}
    for layer in layers.values():
        if layer.in_features % 4 == 0:  # which two of four does not matter for time
            layer.weight.data.view(-1, 4)[:, 2:] = 0
    example = moved(example, torch.device("cuda"), torch.float16)
    return {name: taken.faster for name, taken in time_converted(layers, half, example, semi_structured).items()}


def _said(told: Mapping[str, Any]) -> list[str]:
    """What it comes to, in sentences."""
    said = []
    best = max(told["channels"], key=lambda row: row["faster"], default=None)
    if told["why_not"] or best is None:
        said.append(f"Channels: no advice ({told['why_not'] or 'no share of the MACs is within reach'}).")
    elif best["faster"] < WORTH:
        said.append(
            f"Channels do not pay here: at most {best['faster']:.2f}x as fast ({told['pattern']}, "
            f"{told['runtime']}). This model waits more than it computes."
        )
    else:
        pays = next(row for row in told["channels"] if row["faster"] >= WORTH)
        least = told["channels"][-1]
        more = f"; at {100 * least['macs']:.0f} %: {least['faster']:.2f}x" if least is not pays else ""
        said.append(
            f"Channels pay from {100 * pays['macs']:.0f} % of the MACs down ({pays['faster']:.2f}x as fast{more}): "
            f"{_PRUNE} "
            f"--budget macs={100 * min(pays['macs'], 0.5):.0f}% --method dsa --pattern {told['pattern']}"
        )
    net = (told["net"] or {"faster": {}})["faster"]
    pay_net = {density: times for density, times in net.items() if times >= WORTH}
    if pay_net:
        (density, times), (least, most) = next(iter(pay_net.items())), list(net.items())[-1]
        said.append(
            f"Single weights pay from a density of {density} down, as sparse matrices in PyTorch ({times:.2f}x for the "
            f"whole net; at {least}: {most:.2f}x): {_PRUNE} --budget sparsity={1 - float(density):g}, then "
            "allot export RUN --to csr, which converts the layers that gain."
        )
    else:
        best = f" (at most {max(net.values()):.2f}x for the whole net, as sparse matrices in PyTorch)" if net else ""
        said.append(f"Single weights: size only. Nothing here runs faster for them{best}.")
    if (halves := told["semi_structured"]) is None:
        said.append("2:4: no GPU with sparse tensor cores here, size only.")
    elif pay := [times for times in halves.values() if times >= WORTH]:
        said.append(
            f"2:4 pays for {len(pay)} of {len(halves)} linear layers in half precision on the GPU, up to "
            f"{max(pay):.2f}x: {_PRUNE} --budget sparsity=50% --pattern 2:4, then allot export RUN --to 2:4"
        )
    elif halves:
        said.append(f"2:4 does not pay on the GPU here: at most {max(halves.values()):.2f}x as fast.")
    else:
        said.append("2:4: no linear layer takes it.")
    return said


def machine() -> dict[str, Any]:
    """Processor, its instructions, threads, GPU, and the runtimes that are installed."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
    versions = {}
    for package in ("torch", "onnxruntime", "openvino", "tensorrt"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "processor": name or platform.processor() or platform.machine(),
        "instructions": [flag for flag in known if flag in flags],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "sparse_tensor_cores": has_sparse_tensor_cores(),
        "runtimes": versions,
    }
