"""Which sparsity makes this model faster on this machine: measured on its layers before anything is pruned.

    channels        the tables of a budget of time (`allot.export.timing.latency`) predict nets that keep the same
                    density of channels everywhere
    unstructured    linear layers as compressed-sparse-row matrices beside the dense layers, in PyTorch, and the
                    speed-up of the whole net; no runtime here has a sparse kernel for convolutions, where single
                    weights only make the file smaller
    2:4             linear layers in half precision, on a GPU with sparse tensor cores

A density breaks even where the sparse layer takes as long as the dense one; interpolated between measured densities.
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
from allot.network.arguments import typed
from allot.network.call import attempt
from allot.network.channels import copied
from allot.network.draws import generator
from allot.network.layers import Scope
from allot.network.macs import measured
from allot.network.preserved import preserved, refused_writes
from allot.pruning.setup import make_problem
from allot.report.repeat import shell_lines
from allot.run.calibration import moved
from allot.run.patterns import Channels, parse

MACS = (0.9, 0.7, 0.5, 0.3)  # fractions of the MACs at which nets of fewer channels are predicted
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
LAYERS = 4  # linear layers that are measured, those with most MACs
WORTH = 1.1  # speed-up below which nothing is advised: a prediction is less sure than a measurement


@typed
def advise(
    model: nn.Module,
    example: Any,
    *,
    pattern: str = "channels:8",
    runtime: Runtime | None = None,
    seed: int = 0,
    label: str = "MODEL",
    data: str = "DATA",
    given: Sequence[str] = (),
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The measurements, and the advice that follows from them.

    Args:
        example: a batch of one input.
        pattern: channels, with the multiple in which they are removed.
        runtime: where channels are timed; where None, ONNX Runtime if it is installed and takes the model, else
            PyTorch, one sample at a time.
        label, data: names of the model and its data in the advised commands.
        given: further words of these commands, like ("--weights", "net.safetensors").
        on_step: as in `latency_of`.
    Returns:
        `{"machine", "runtime", "pattern", "channels": [{"macs", "faster"}], "why_not", "linear": [{"layer", "layers",
        "share", "faster": {density: times}, "break_even"}], "net": {"milliseconds", "faster": {density: times}} or
        null, "semi_structured": {layer: times} or null, "said": [sentence],
        "commands": [text]}`; `faster` and times are speed-ups over
        dense. A row of `linear` stands for `layers` of one shape; `net` is the predicted speed-up of the whole net in
        PyTorch when the layers that gain are sparse.
    Raises:
        UsageError: no pattern of channels, or the model does not run on the example, or the runtime cannot take it.
    """
    if not isinstance(parse(pattern), Channels):
        raise UsageError(f"pattern {pattern!r}: channels, or channels:8 for multiples of 8, is accepted.")
    with preserved(model):
        measurements = _measure(model, example, pattern, runtime, seed, on_step)
    commands = _commands(measurements, ["allot", "prune", label, "--data", data, *given])
    return {**measurements, "said": _sentences(measurements), "commands": commands}


def _measure(
    model: nn.Module,
    example: Any,
    pattern: str,
    runtime: Runtime | None,
    seed: int,
    on_step: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    with refused_writes(model):
        scope = measured(Scope.of(model), model, lambda: attempt(model, example, {}))
    runtime = _usable_runtime(model, example, runtime)
    channels, why_not = _channels(model, example, pattern, runtime, seed, on_step)
    linear, net = _linear(copied(model).eval(), repeated(example, runtime.batch), scope)
    return {
        "machine": machine(),
        "runtime": str(runtime),
        "pattern": pattern,
        "channels": channels,
        "why_not": why_not,
        "linear": linear,
        "net": net,
        "semi_structured": _semi_structured(model, example, [layer.name for layer in scope]),
    }


def break_even(densities: Sequence[float], faster: Sequence[float]) -> float | None:
    """The highest density at which the sparse layer is as fast as the dense one; None where it never is.

    Args:
        densities: descending.
        faster: speed-up over dense at each density.

    >>> break_even((0.5, 0.1), (0.5, 1.5))
    0.3
    """
    if faster[0] >= 1:
        return densities[0]
    for (d, before), (e, after) in itertools.pairwise(zip(densities, faster, strict=True)):
        if before < 1 <= after:
            return d + (e - d) * (1 - before) / (after - before)
    return None


def _usable_runtime(model: nn.Module, example: Any, runtime: Runtime | None) -> Runtime:
    """The requested runtime, or the first one that runs the model.

    Raises:
        UsageError: the requested runtime cannot run the model.
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
    """Predicted speed-ups of nets with the same density of channels everywhere; or why no channels can be removed."""

    def tables(*problem: Any) -> Latency:
        model, scope, groups, extents, terms, example, _ = problem
        half = "50%"  # where tables are fitted best, whatever the limit
        return latency_of(
            model, scope, groups, extents, terms, example, half, runtime=runtime, seed=seed, on_step=on_step
        )

    try:
        budget = channel_budget(
            make_problem(model, Budget(latency="99.9%"), parse(pattern), example=example, latency=tables).budget
        )
    except AllotError as error:
        reason = str(error).rstrip(".")
        if reason.startswith("latency="):  # the user does not know the limit above
            reason = "fewer channels are not predicted to be any faster"
        return [], reason
    assert budget.latency is not None
    rows = []
    for fraction in MACS:
        try:
            weights = replace(budget.weights, latency=None, macs=f"{100 * fraction:g}%")
            kept = replace(budget, weights=weights).counts({term.name: 1.0 for term in budget.terms})
        except AllotError:  # so few MACs are out of reach
            continue
        macs = budget.cost("macs", kept) / sum(term.macs or 0 for term in budget.weights.terms)
        rows.append({"macs": macs, "faster": budget.latency.dense / max(budget.time(kept)[0], 1.0)})
    return rows, None


def _linear(model: nn.Module, example: Any, scope: Scope) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Linear layers as sparse matrices beside the dense layers, at every density; and the speed-up of the net."""
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
            seconds = _time_densities(layers[names[0]], inputs[names[0]])
        except RuntimeError:  # numbers, or inputs, that sparse matrices do not take
            continue
        faster = {density: seconds["dense"] / seconds[density] for density in DENSITIES}
        for density in DENSITIES:
            if faster[density] >= PAYS:  # a layer that gains nothing stays dense
                saved[density] += len(names) * (seconds["dense"] - seconds[density])
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


def _time_densities(layer: nn.Linear, x: Tensor) -> dict[Any, float]:
    """Seconds that the layer takes, dense and at every density, with random weights kept.

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
    """Speed-ups of linear layers as 2:4 in half precision on the GPU; None without sparse tensor cores."""
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
    return {name: times.faster for name, times in time_converted(layers, half, example, semi_structured).items()}


def _sentences(measurements: Mapping[str, Any]) -> list[str]:
    """The advice, in sentences."""
    sentences = []
    best = max(measurements["channels"], key=lambda row: row["faster"], default=None)
    pays = _first_that_pays(measurements["channels"])
    if measurements["why_not"] or best is None:
        sentences.append(f"Channels: no advice ({measurements['why_not'] or 'no share of the MACs is within reach'}).")
    elif pays is None:
        sentences.append(
            f"Channels do not pay here: at most {best['faster']:.2f}x as fast ({measurements['pattern']}, "
            f"{measurements['runtime']}). This model waits more than it computes."
        )
    else:
        least = measurements["channels"][-1]
        more = f"; at {100 * least['macs']:.0f} %: {least['faster']:.2f}x" if least is not pays else ""
        sentences.append(
            f"Channels pay from {100 * pays['macs']:.0f} % of the MACs down ({pays['faster']:.2f}x as fast{more})."
        )
    net, pay_net = (measurements["net"] or {"faster": {}})["faster"], _densities_that_pay(measurements)
    if pay_net:
        (density, times), (least, most) = next(iter(pay_net.items())), list(net.items())[-1]
        sentences.append(
            f"Single weights pay from a density of {density} down, as sparse matrices in PyTorch ({times:.2f}x for the "
            f"whole net; at {least}: {most:.2f}x); the export to csr converts the layers that gain."
        )
    else:
        best = f" (at most {max(net.values()):.2f}x for the whole net, as sparse matrices in PyTorch)" if net else ""
        sentences.append(f"Single weights: size only. Nothing here runs faster for them{best}.")
    if (halves := measurements["semi_structured"]) is None:
        sentences.append("2:4: no GPU with sparse tensor cores here, size only.")
    elif pay := [times for times in halves.values() if times >= WORTH]:
        sentences.append(
            f"2:4 pays for {len(pay)} of {len(halves)} linear layers in half precision on the GPU, up to "
            f"{max(pay):.2f}x."
        )
    elif halves:
        sentences.append(f"2:4 does not pay on the GPU here: at most {max(halves.values()):.2f}x as fast.")
    else:
        sentences.append("2:4: no linear layer takes it.")
    return sentences


def _commands(measurements: Mapping[str, Any], prune: Sequence[str]) -> list[str]:
    """The commands for what pays; none where nothing does.

    Args:
        prune: the words that all of them begin with.
    """
    commands: list[list[str]] = []
    if pays := _first_that_pays(measurements["channels"]):
        budget, pattern = f"macs={100 * min(pays['macs'], 0.5):.0f}%", measurements["pattern"]
        words = ["--budget", budget, "--method", "dsa", "--pattern", pattern, "--out", "runs/channels"]
        commands += [[*prune, *words], ["allot", "export", "runs/channels", "--to", "slim"]]
    if densities := _densities_that_pay(measurements):
        sparsity = f"sparsity={1 - float(next(iter(densities))):g}"
        commands += [[*prune, "--budget", sparsity, "--out", "runs/sparse"]]
        commands += [["allot", "export", "runs/sparse", "--to", "csr"]]
    if any(times >= WORTH for times in (measurements["semi_structured"] or {}).values()):
        commands += [[*prune, "--budget", "sparsity=50%", "--pattern", "2:4", "--out", "runs/2-of-4"]]
        commands += [["allot", "export", "runs/2-of-4", "--to", "2:4"]]
    return [shell_lines(words) for words in commands]


def _first_that_pays(channels: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    return next((row for row in channels if row["faster"] >= WORTH), None)


def _densities_that_pay(measurements: Mapping[str, Any]) -> dict[str, float]:
    net = (measurements["net"] or {"faster": {}})["faster"]
    return {density: times for density, times in net.items() if times >= WORTH}


def machine() -> dict[str, Any]:
    """Processor, its instructions, threads, GPU, and the runtimes that are installed."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    instructions = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
    versions = {}
    for package in ("torch", "onnxruntime", "openvino", "tensorrt"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "processor": name or platform.processor() or platform.machine(),
        "instructions": [flag for flag in instructions if flag in flags],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "sparse_tensor_cores": has_sparse_tensor_cores(),
        "runtimes": versions,
    }
