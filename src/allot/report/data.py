"""report.json: everything a report shows, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from allot.budget.allocation import Allocation
from allot.budget.channels import channel_budget
from allot.budget.costs import least_bits
from allot.export.files.formats import BITMASK, PLAIN, SLIM
from allot.network.layers import plain_state
from allot.run.problem import Candidate, Problem
from allot.run.reading import Readable
from allot.run.store import read_run


def report(result: Any) -> dict[str, Any]:
    """What an `allot.Result` was asked and reached, per limit and per layer: counts in whole numbers, times in seconds.

    `macs` and a layer's `macs` are null where no example input was there to count them with; `bytes` is
    {dense, file, limit}: the dense model's file, the bitmask (or slim) file, and the information limit, what no file of
    these weights can be smaller than: sum of n_l (H(density_l) + density_l bits) / 8 and all other tensors, H the
    entropy of a coin (of channels, n_l H(density_l) says which of a group's are left); null until the run is saved.
    `priced` is the kind of the tightest limit, in whose units prices are. `how` is what the allocator does, in a
    sentence, empty of one that is the user's own; `compute` the choices about memory and speed that are not the usual
    ones; `settings` what else decides a run that was saved: its recipe's other keys, hyperparameters, digest of the
    model. `latency` is null where time was not limited. `unreadable` counts calibration samples that were left out.
    `exports` are what `allot export` adds. `diagnostics` is what methods tell about how they came to their result, by
    method.
    """
    problem, candidate, names, directory = result.problem, result.candidate, result.names, result.directory
    budget, kept = problem.budget, candidate.allocation.kept
    sizes = budget.sizes(kept)
    counted = all(layer.macs is not None for layer in problem.scope)
    total = sum(layer.total for layer in problem.scope)
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
        "kept": sum(sizes.values()),
        "total": total,
        "sparsity": 1 - sum(sizes.values()) / total,
        "priced": budget.binding(kept),
        "macs": {"dense": _dense_macs(problem), "sparse": budget.cost("macs", kept)} if counted else None,
        "bytes": {
            "dense": _size(directory, PLAIN),
            "file": _size(directory, SLIM if problem.scope.groups else BITMASK),
            "limit": _limit(problem, kept) if directory else None,
        },
        "layers": layer_rows(problem, candidate.allocation),
        "groups": group_rows(problem, candidate.allocation),
        "skipped": dict(problem.scope.skipped),
        "scores": dict(result.scores) if result.scores else None,
        "unreadable": _unreadable(problem),
        "latency": dict(result.latency) if result.latency else None,
        "exports": [],
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.log.seconds.items()},
        "images": {"forward": result.log.forward, "backward": result.log.backward},
        "diagnostics": dict(candidate.diagnostics),
        "histograms": _histograms(problem, candidate),
    }


def layer_rows(problem: Problem, allocation: Allocation) -> list[dict[str, Any]]:
    """`{name, shape, kept, total, density, macs, price}` of every layer.

    `macs` are the dense ones; `price` is what one more weight costs in units of the tightest limit, null where channels
    are pruned.
    """
    kept = problem.budget.sizes(allocation.kept)
    price = {} if problem.scope.groups else problem.budget.prices(kept)
    return [
        {
            "name": layer.name,
            "shape": list(layer.shape),
            "kept": kept[layer.name],
            "total": layer.total,
            "density": kept[layer.name] / layer.total,
            "macs": layer.macs,
            "price": price.get(layer.name),
        }
        for layer in problem.scope
    ]


def group_rows(problem: Problem, allocation: Allocation) -> list[dict[str, Any]]:
    """`{name, kept, total, density, layers, price}` of every group of channels; empty where single weights are pruned.

    `price` is what one more channel costs in units of the tightest limit.
    """
    kept = allocation.kept
    price = channel_budget(problem.budget).prices(kept) if problem.scope.groups else {}
    return [
        {
            "name": group.name,
            "kept": kept[group.name],
            "total": group.total,
            "density": kept[group.name] / group.total,
            "layers": list(group.layers),
            "price": price[group.name],
        }
        for group in problem.scope.groups
    ]


_ELSEWHERE = {"model", "budget", "method", "allocate", "score", "pattern", "repair", "seed", "workers"}


def _settings(problem: Problem, directory: Path | None) -> dict[str, Any]:
    """What decides a run beside what a report says anyway; the threads that read samples do not."""
    if not directory or not (directory / "run.json").exists():
        read = problem.calibration
        return {"samples": len(read), "batch_size": read.batch_size} if read else {}
    run = read_run(directory)
    configuration = run.get("configuration", {})
    told = {key: value for key, value in run.get("recipe", {}).items() if key not in _ELSEWHERE}
    told["digest"] = run.get("fingerprint", {}).get("model")
    if cut := configuration.get("fit"):  # hyperparameters then depend on how fast the machine was
        return told | {"max_minutes": cut["minutes"]}
    return told | {"hyperparameters": configuration.get("hyperparameters", {})}


BINS = 40


def _histograms(problem: Problem, candidate: Candidate) -> dict[str, dict[str, list[float]]]:
    """Layer -> `{edges, dense, sparse}`: weights of the dense and of the sparse model by value, zeros not counted."""
    tensors = candidate.effective(problem)
    found = {}
    for layer in problem.scope:
        both = [t.detach().float().cpu().numpy().ravel() for t in (problem.dense[layer.name], tensors[layer.name])]
        edge = max(float(np.abs(values).max()) for values in both) or 1.0
        edges = np.linspace(-edge, edge, BINS + 1)
        counts = [np.histogram(values[values != 0], edges)[0].tolist() for values in both]
        found[layer.name] = {"edges": edges.round(7).tolist(), "dense": counts[0], "sparse": counts[1]}
    return found


def _unreadable(problem: Problem) -> int:
    source = problem.calibration.source if problem.calibration else None
    return len(source.unreadable) if isinstance(source, Readable) else 0


def _dense_macs(problem: Problem) -> int:
    return sum(layer.macs or 0 for layer in problem.scope)


def _limit(problem: Problem, kept: Mapping[str, int]) -> int:
    if problem.scope.groups:
        tensors = channel_budget(problem.budget).cost("bytes", kept) - channel_budget(problem.budget).header
        return math.ceil(tensors + sum(least_bits(group.total, kept[group.name]) for group in problem.scope.groups) / 8)
    state = plain_state(problem.model)[0]
    sizes = {name: value.element_size() for name, value in state.items()}
    others = sum(value.numel() * sizes[name] for name, value in state.items() if name not in kept)
    bits = sum(least_bits(layer.total, kept[layer.name]) for layer in problem.scope)
    return math.ceil(others + bits / 8 + sum(sizes[name] * count for name, count in kept.items()))


def _size(directory: Path | None, name: str) -> int | None:
    return (directory / name).stat().st_size if directory and (directory / name).exists() else None
