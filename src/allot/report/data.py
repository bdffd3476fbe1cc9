"""report.json: everything a report shows, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from allot.budget.allocation import Allocation
from allot.budget.channels import channel_budget
from allot.budget.costs import mask_entropy
from allot.export.files.formats import BITMASK, PLAIN, SLIM, metadata_of, plain_size
from allot.network.layers import plain_state
from allot.run.problem import Candidate, Problem
from allot.run.reading import Readable
from allot.run.store import read_run


def report(result: Any) -> dict[str, Any]:
    """The budget of an `allot.Result`, the amounts that were reached, and the counts of every layer, ready for JSON.

    Counts are whole numbers, times are seconds. `macs`, also of a layer, is null where no example input was there to
    count MACs with. `bytes` is {dense, file, with_ideal_mask}: the dense model's file, the bitmask (or slim) file, and
    the size with an ideal mask: sum of n_l (H(density_l) + density_l bits) / 8 and all other tensors, H the entropy of
    a coin (of channels, n_l H(density_l) says which channels of a group remain); values count as they are, so a
    compressed file can be smaller; null until the run is saved. `priced` is the kind of the tightest limit, the unit of
    prices. `how` is what the allocator does, in a sentence, empty for an allocator of the user. `compute` are the
    choices about memory and speed that differ from the defaults, `settings` the other choices that decide a saved run:
    other keys of the recipe, hyperparameters, digest of the model. `guarantees` are rows {kind, asked, limit, found,
    met, text}, one for each guarantee on the quality, like max_drop. `latency` is null where time was not limited.
    `unreadable` counts calibration samples that were left out; `watch` is the watch set, `{samples, kind, unsure,
    images}`, empty where there are no inputs; `fidelity` are the distances from the dense net on it, `{stage, step,
    kl | error, agreement}` in order, the last one that of the net that came out, `undone` those of nets that were
    dropped; `guard` says so in sentences; `untrained` are signs that the dense model was never trained (see
    `allot.run.untrained`); `weights` counts all weights of the model, in scope or not; `whole` is the model whole, see
    `of_whole_model`. `exports` are the rows that `allot export` adds. `diagnostics` are the values that methods report
    about their work, by method.
    """
    return {**figures(result), "histograms": result.histograms}


def figures(result: Any) -> dict[str, Any]:
    """The content of a report but for the histograms of weights, which are slow to count."""
    problem, candidate, names, directory = result.problem, result.candidate, result.names, result.directory
    budget, kept = problem.budget, candidate.allocation.kept
    kept_weights = sum(budget.sizes(kept).values())
    dense_macs = [layer.macs for layer in problem.scope if layer.macs is not None]
    counted = len(dense_macs) == len(problem.scope)
    source = problem.calibration.source if problem.calibration else None
    return {
        "allot": metadata.version("allot"),
        "model": result.label,
        "method": result.method,
        "allocate": names.allocate,
        "score": names.score,
        "pattern": names.pattern,
        "repair": list(names.repair),
        "seed": problem.seed,
        "how": result.summary,
        "settings": _settings(problem, directory),
        "compute": problem.compute.to_json(),
        "budget": budget.rows(kept),
        "kept": kept_weights,
        "total": budget.total,
        "sparsity": 1 - kept_weights / budget.total,
        "priced": budget.binding(kept),
        "macs": {"dense": sum(dense_macs), "sparse": budget.cost("macs", kept)} if counted else None,
        "bytes": {
            "dense": _file_size(directory, PLAIN),
            "file": _file_size(directory, SLIM if problem.scope.groups else BITMASK),
            "with_ideal_mask": _size_with_ideal_mask(problem, kept) if directory else None,
        },
        "layers": layer_rows(problem, candidate.allocation),
        "groups": group_rows(problem, candidate.allocation),
        "skipped": dict(problem.scope.skipped),
        "weights": weights_of(problem.model),
        "whole": of_whole_model(problem, kept, directory),
        "scores": dict(result.scores) if result.scores else None,
        "guarantees": [dict(row) for row in result.guarantees],
        "unreadable": len(source.unreadable) if isinstance(source, Readable) else 0,
        "latency": dict(result.latency) if result.latency else None,
        "exports": [],
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.log.seconds.items()},
        "images": {"forward": result.log.forward, "backward": result.log.backward},
        "watch": {**result.log.watch, "images": result.log.watched} if result.log.watch else {},
        "fidelity": list(result.log.fidelity),
        "guard": list(result.log.guard),
        "untrained": list(result.log.untrained),
        "diagnostics": dict(candidate.diagnostics),
    }


def weights_of(model: nn.Module) -> int:
    """Number of weights of a model, in scope or not: of all parameters of two dimensions or more but biases."""
    return sum(_sizes_of_weights(model).values())


def _sizes_of_weights(model: nn.Module) -> dict[str, int]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1]
    return {name: parameter.numel() for name, parameter in named if "bias" not in name.rpartition(".")[2]}


def of_whole_model(problem: Problem, kept: Mapping[str, int], directory: Path | None = None) -> dict[str, Any]:
    """`{weights, macs, bytes}` of the whole model, out of scope included, each `{dense, sparse}`.

    `macs` is null where no example input was there. `bytes` are those of the files, predicted until the run is saved.
    """
    budget, all_weights = problem.budget, weights_of(problem.model)
    removed = budget.total - sum(budget.sizes(kept).values())
    if problem.scope.groups:  # channels go from tensors out of scope as well
        extents = {extent.name: extent for extent in channel_budget(budget).extents}
        removed = sum(total - int(extents[name].size(kept)) for name, total in _sizes_of_weights(problem.model).items())
    small = _file_size(directory, SLIM if problem.scope.groups else BITMASK) or budget.cost("bytes", kept)
    state, facts = plain_state(problem.model)[0], metadata_of(problem.model, problem.scope, budget)
    macs = None
    if problem.scope.macs is not None:
        spared = sum(layer.macs or 0 for layer in problem.scope) - budget.cost("macs", kept)
        macs = {"dense": problem.scope.macs, "sparse": problem.scope.macs - spared}
    return {
        "weights": {"dense": all_weights, "sparse": all_weights - removed},
        "macs": macs,
        "bytes": {"dense": _file_size(directory, PLAIN) or plain_size(state, facts), "sparse": small},
    }


def layer_rows(problem: Problem, allocation: Allocation) -> list[dict[str, Any]]:
    """`{name, shape, kept, total, density, macs, price}` of every layer.

    `macs` are those of the dense layer; `price` is the cost of one more weight in units of the tightest limit, null
    where channels are pruned.
    """
    kept = problem.budget.sizes(allocation.kept)
    prices = {} if problem.scope.groups else problem.budget.prices(kept)
    return [
        {"name": layer.name, "shape": list(layer.shape)}
        | _density(kept[layer.name], layer.total)
        | {"macs": layer.macs, "price": prices.get(layer.name)}
        for layer in problem.scope
    ]


def group_rows(problem: Problem, allocation: Allocation) -> list[dict[str, Any]]:
    """`{name, kept, total, density, layers, price}` of every group of channels; empty where single weights are pruned.

    `price` is the cost of one more channel in units of the tightest limit.
    """
    kept = allocation.kept
    prices = channel_budget(problem.budget).prices(kept) if problem.scope.groups else {}
    return [
        {"name": group.name}
        | _density(kept[group.name], group.total)
        | {"layers": list(group.layers), "price": prices[group.name]}
        for group in problem.scope.groups
    ]


def _density(kept: int, total: int) -> dict[str, Any]:
    return {"kept": kept, "total": total, "density": kept / total}


_OTHER_KEYS = {
    "model",
    "budget",
    "method",
    "allocate",
    "score",
    "pattern",
    "repair",
    "seed",
    "workers",
    "max_drop",
    "min_fidelity",
}


def _settings(problem: Problem, directory: Path | None) -> dict[str, Any]:
    """The choices that decide a run and have no key of their own in a report; not the threads that read samples."""
    if not directory or not (directory / "run.json").exists():
        data = problem.calibration
        return {"samples": len(data), "batch_size": data.batch_size} if data else {}
    run = read_run(directory)
    configuration = run.get("configuration", {})
    settings = {key: value for key, value in run.get("recipe", {}).items() if key not in _OTHER_KEYS}
    settings["digest"] = run.get("fingerprint", {}).get("model")
    if cut := configuration.get("fit"):  # hyperparameters then depend on how fast the machine was
        return settings | {"max_minutes": cut["minutes"]}
    return settings | {"hyperparameters": configuration.get("hyperparameters", {})}


BINS = 40


def histograms(problem: Problem, candidate: Candidate) -> dict[str, dict[str, list[float]]]:
    """Layer -> `{edges, dense, sparse}`: weights of the dense and of the sparse model by value, zeros not counted."""
    tensors, counted = candidate.one_at_a_time(problem), {}
    for layer in problem.scope:
        weights = [t.detach().float().cpu().numpy().ravel() for t in (problem.dense[layer.name], tensors[layer.name])]
        edge = max(max(float(values.max()), -float(values.min())) for values in weights) or 1.0
        edges = np.linspace(-edge, edge, BINS + 1)
        dense, sparse = (np.histogram(values[values != 0], edges)[0].tolist() for values in weights)
        counted[layer.name] = {"edges": edges.round(7).tolist(), "dense": dense, "sparse": sparse}
    return counted


def _size_with_ideal_mask(problem: Problem, kept: Mapping[str, int]) -> int:
    if problem.scope.groups:
        budget = channel_budget(problem.budget)
        bits = sum(mask_entropy(group.total, kept[group.name]) for group in problem.scope.groups)
        return math.ceil(budget.cost("bytes", kept) - budget.header + bits / 8)
    state = plain_state(problem.model)[0]
    sizes = {name: value.element_size() for name, value in state.items()}
    others = sum(value.numel() * sizes[name] for name, value in state.items() if name not in kept)
    bits = sum(mask_entropy(layer.total, kept[layer.name]) for layer in problem.scope)
    return math.ceil(others + bits / 8 + sum(sizes[name] * count for name, count in kept.items()))


def _file_size(directory: Path | None, name: str) -> int | None:
    return (directory / name).stat().st_size if directory and (directory / name).exists() else None
