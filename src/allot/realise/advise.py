"""What pays on this machine, for this model: measured on its own layers before anything is pruned.

channels       the tables of a budget of time (`allot.realise.timing`) foretell nets with equal shares of channels
unstructured   a linear layer as a compressed-sparse-row matrix beside its dense self, in PyTorch; of convolutions no
               runtime here has a sparse kernel: a smaller file is what single weights give
2:4            linear layers in half precision on a GPU with sparse tensor cores, where there is one

A density breaks even where the sparse layer takes as long as the dense one; between densities measured, on the line.
"""

from __future__ import annotations

import itertools
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.budget import Budget
from allot.calibration import moved
from allot.channels import copied
from allot.errors import AllotError, UsageError
from allot.evaluate import attempt
from allot.latency import Latency
from allot.layers import Scope
from allot.macs import measured
from allot.patterns import parse
from allot.pose import pose
from allot.realise.clock import timed
from allot.realise.sparse import has_sparse_tensor_cores, linear_layers, semi_structured, times_faster
from allot.realise.timing import Product, Runtime, latency_of, products_of

MACS = (0.9, 0.7, 0.5, 0.3)  # shares of the MACs that nets of fewer channels are foretold at
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
LAYERS = 4  # linear layers that are measured, those with most MACs
WORTH = 1.1  # times as fast, below which nothing is advised: what is foretold is less sure than what was timed


def advise(
    model: nn.Module,
    example: Any,
    *,
    pattern: str = "channels:8",
    runtime: Runtime | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What was measured, and what it comes to.

    Args:
        example: a batch of one input.
        pattern: in what multiples channels go.
        runtime: where channels are timed; ONNX Runtime, one sample at a time, where it is installed.
        on_step: as in `latency_of`.
    Returns:
        `{"machine", "runtime", "pattern", "channels": [{"macs", "faster"}], "why_not", "linear": [{"layer", "share",
        "faster": {density: times}, "break_even"}], "semi_structured": {layer: times} or null, "said": [sentence]}`;
        `faster` and times are over dense, above 1 pays.
    Raises:
        UsageError: the model does not run on the example, or the runtime cannot take it.
    """
    runtime = runtime or Runtime.parse(None)
    scope = measured(Scope.of(model), model, lambda: attempt(model, example, {}))
    total = sum(layer.macs or 0 for layer in scope) or 1
    channels, why_not = _channels(model, example, pattern, runtime, seed, on_step)
    found: dict[Any, Product] = {}
    for product in products_of(model, scope, example):
        if product.convolution is None:
            found.setdefault((product.settings, product.layer.shape), product)
    heaviest = sorted(found.values(), key=lambda product: -(product.layer.macs or 0))[:LAYERS]
    linear = [_linear(product, runtime.batch, total) for product in heaviest]
    told = {
        "machine": machine(),
        "runtime": str(runtime),
        "pattern": pattern,
        "channels": channels,
        "why_not": why_not,
        "linear": linear,
        "semi_structured": _semi_structured(model, example, [layer.name for layer in scope]),
    }
    return {**told, "said": _said(told)}


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
        budget = pose(model, Budget(latency="99.9%"), parse(pattern), example=example, latency=tables).channels
    except AllotError as error:
        return [], str(error)
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


def _linear(product: Product, batch: int, total: int) -> dict[str, Any]:
    """One linear layer as a sparse matrix, beside itself."""
    weight = product.like.float().cpu()
    weight = weight.t() if product.out else weight
    x = torch.randn(batch * product.inside[0], weight.shape[1])
    runs: dict[str, Callable[[], Tensor]] = {"dense": lambda: x @ weight.t()}
    for density in DENSITIES:
        kept = (torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < density) * weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the layout is called beta
            sparse = kept.to_sparse_csr()
        runs[f"{density:g}"] = lambda sparse=sparse: sparse @ x.t()  # type: ignore[misc]
    taken = timed(runs, seconds=0.5, least=7)
    faster = {density: taken["dense"] / taken[f"{density:g}"] for density in DENSITIES}
    return {
        "layer": product.layer.name,
        "share": (product.layer.macs or 0) / total,
        "faster": {f"{density:g}": value for density, value in faster.items()},
        "break_even": break_even(DENSITIES, list(faster.values())),
    }


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
    return times_faster(layers, half, moved(example, torch.device("cuda"), torch.float16), semi_structured)


def _said(told: Mapping[str, Any]) -> list[str]:
    """What it comes to, in sentences."""
    said = []
    best = max(told["channels"], key=lambda row: row["faster"], default=None)
    if told["why_not"]:
        said.append(f"Channels: none can go ({told['why_not']})")
    elif best is None or best["faster"] < WORTH:
        said.append(
            f"Channels do not pay here: at most {best['faster'] if best else 1:.2f}x as fast ({told['pattern']}, "
            f"{told['runtime']}). This model waits more than it computes."
        )
    else:
        pays = next(row for row in told["channels"] if row["faster"] >= WORTH)
        least = told["channels"][-1]
        said.append(
            f"Channels pay from {100 * pays['macs']:.0f} % of the MACs down ({pays['faster']:.2f}x as fast; at "
            f"{100 * least['macs']:.0f} %: {least['faster']:.2f}x): allot prune MODEL "
            f"--budget macs={100 * min(pays['macs'], 0.5):.0f}% --method dsa --pattern {told['pattern']}"
        )
    pay = [row for row in told["linear"] if row["break_even"] is not None]
    if pay:
        share, at = sum(row["share"] for row in pay), sorted(f"{row['break_even']:.2f}" for row in pay)
        said.append(
            f"Single weights: as sparse matrices in PyTorch, {len(pay)} of {len(told['linear'])} linear layers "
            f"measured break even at a density of {at[0]}{f' to {at[-1]}' if len(set(at)) > 1 else ''}, with "
            f"{100 * share:.0f} % of the MACs: allot export RUN --to csr converts the layers that gain."
        )
    else:
        said.append("Single weights: nothing runs faster for them here; they make the file smaller, and that is all.")
    if (halves := told["semi_structured"]) is None:
        said.append("2:4: no GPU with sparse tensor cores here, size only.")
    elif pay := [times for times in halves.values() if times >= WORTH]:
        said.append(
            f"2:4 pays for {len(pay)} of {len(halves)} linear layers in half precision on the GPU, up to "
            f"{max(pay):.2f}x: allot prune MODEL --pattern 2:4, then allot export RUN --to 2:4"
        )
    else:
        said.append(f"2:4 does not pay on the GPU here: at most {max(halves.values(), default=0):.2f}x as fast.")
    return said
