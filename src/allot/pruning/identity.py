"""The identity of a run, its configuration and digests of model and data: a run resumes only with the same identity."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import metadata
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from allot.network.layers import Rules
from allot.processes import check_equal, single_process, world_size
from allot.pruning.request import Prepared
from allot.run.driver import repeatable
from allot.run.problem import Problem


def identity(prepared: Prepared) -> dict[str, Any]:
    """`{"configuration", "fingerprint"}`, JSON-ready: a run resumes only with the same identity.

    Raises:
        UsageError: the processes of torchrun have different models or data.
    """
    request, problem, chain = prepared.request, prepared.problem, prepared.requested_chain
    with single_process(), repeatable(request.model, request.seed, "fingerprint"):
        digests = fingerprint(problem)
    for source, digest in digests.items():
        check_equal(f"the {source}", digest)
    inputs, watched = problem.calibration, problem.watch.inputs.indices if problem.watch else ()
    rules = request.rules or Rules()
    if left := [name for name in request.left_dense if name not in rules.exclude]:
        rules = replace(rules, exclude=(*rules.exclude, *left))
    configuration = {
        "budget": request.budget.to_json(),
        "method": chain.method,
        "allocate": chain.names.allocate,
        "score": chain.names.score,
        "pattern": chain.names.pattern,
        "repair": list(chain.names.repair),
        "hyperparameters": {
            part: settings(getattr(chain, part)) for part in ("allocate", "score", "pattern", "repair")
        },
        **asdict(rules),
        "seed": request.seed,
        "samples": len({*inputs.indices, *watched}) if inputs else 0,
        "batch_size": inputs.batch_size if inputs else 0,
    }
    optional = {
        "runtime": str(request.runtime) if request.budget.latency is not None else None,
        "stream": str(request.stream) if request.stream else None,
        "batch_norm": problem.batch_norm if problem.batch_norm != "batch" else None,
        "views": request.views,
        "comparison": settings(problem.comparison.to_json()),
        "fit": prepared.cut,
        "compute": problem.compute.identity(),
    }
    configuration |= {key: value for key, value in optional.items() if value}
    return {"configuration": configuration, "fingerprint": digests}


def notes(prepared: Prepared, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The other entries of run.json, which may differ in a resumed run: versions, recipe, memory, processes."""
    request, configuration = prepared.request, identity["configuration"]
    recipe = {key: value for key, value in configuration.items() if key not in ("hyperparameters", "fit")}
    recipe["budget"] = [f"{kind}={amount}" for kind, amount in request.budget.to_json().items()]
    recipe |= {"options": settings(request.chain.names.options), "compute": request.compute.to_json()}
    return {
        "versions": {
            "allot": metadata.version("allot"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "recipe": recipe | dict(request.recipe),
        "requested": dict(request.recipe),  # without what was chosen for lack of a request
        "memory": prepared.memory,
        "processes": world_size(),
    }


def fingerprint(problem: Problem) -> dict[str, str]:
    """Short digests of the model's tensors and of the calibration samples."""
    model = hashlib.sha256()
    for name, value in sorted(problem.dense.items()):
        model.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        _digest(value, model)
    digests = {"model": model.hexdigest()[:16]}
    for name, inputs in (("calibration", problem.calibration), ("watch set", problem.watch and problem.watch.inputs)):
        if inputs:
            data = hashlib.sha256(str(inputs.indices).encode())
            for k in range(inputs.batches):
                _digest(inputs.batch(k)[0], data)
            digests[name] = data.hexdigest()[:16]
    return digests


def _digest(batch: Any, into: Any) -> None:
    if isinstance(batch, Tensor) and batch.layout is not torch.strided:
        sparse = batch.detach().to_sparse_coo().coalesce()
        _digest((sparse.indices(), sparse.values()), into)
    elif isinstance(batch, Tensor):
        into.update(batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(batch, Mapping):
        for key, value in sorted(batch.items()):
            into.update(str(key).encode())
            _digest(value, into)
    elif isinstance(batch, tuple | list):
        for value in batch:
            _digest(value, into)
    else:
        into.update(repr(batch).encode())


def settings(value: Any) -> Any:
    """Hyperparameters as JSON: dataclasses by type and field, a user's functions by name and code."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__qualname__, **{f.name: settings(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): settings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [settings(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, FunctionType) and not value.__module__.startswith("allot."):
        code = (value.__code__.co_code, value.__code__.co_consts, [c.cell_contents for c in value.__closure__ or ()])
        digest = hashlib.sha256(re.sub(r" at 0x\w+", "", repr(code)).encode()).hexdigest()[:8]
        return f"{value.__module__}.{value.__qualname__}#{digest}"
    return getattr(value, "__name__", None) or re.sub(r" at 0x\w+", "", repr(value))
