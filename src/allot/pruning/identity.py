"""What identifies a run: its configuration, and digests of the model and the data; a run resumes with the same only."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import metadata
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from allot.network.layers import Rules
from allot.processes import check_equal, single_process, world_size
from allot.pruning.asked import Asked
from allot.run.driver import repeatable
from allot.run.problem import Chain, Problem


@dataclass(frozen=True)
class Limited:
    """What limits of time and memory make of a run.

    Attributes:
        problem: with choices of `Compute` that keep training within the memory.
        chain: what is run: training cut to fit, repairs streamed.
        as_asked: the chain that was asked for, training cut to fit.
        time: by how much steps were cut, see `cut_of`; None without a limit.
        memory: what was chosen, see `choose_compute`; None without a limit.
    """

    problem: Problem
    chain: Chain
    as_asked: Chain
    time: Mapping[str, Any] | None
    memory: Mapping[str, Any] | None

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What the report says of the limits."""
        limits = {"fit": self.time, "memory": self.memory}
        return {name: value for name, value in limits.items() if value}


def identity(asked: Asked, limited: Limited) -> dict[str, Any]:
    """`{"configuration", "fingerprint"}`, JSON-ready: a run that was begun with others is not resumed.

    Raises:
        UsageError: world_size of torchrun have other models or data.
    """
    with single_process(), repeatable(asked.model, asked.seed, "fingerprint"):
        digests = fingerprint(limited.problem)
    for what, digest in digests.items():
        check_equal(f"the {what}", digest)
    chain, rules, inputs = limited.as_asked, asked.rules or Rules(), limited.problem.calibration
    configuration = {
        "budget": asked.budget.to_json(),
        "method": chain.method,
        "allocate": chain.names.allocate,
        "score": chain.names.score,
        "pattern": chain.names.pattern,
        "repair": list(chain.names.repair),
        "hyperparameters": {
            "allocate": settings(chain.allocate),
            "score": settings(chain.score),
            "pattern": settings(chain.pattern),
            "repair": [settings(part) for part in chain.repair],
        },
        **asdict(rules),
        "seed": asked.seed,
        "samples": len(inputs) if inputs else 0,
        "batch_size": inputs.batch_size if inputs else 0,
    }
    optional = {
        "runtime": str(asked.runtime) if asked.budget.latency is not None else None,
        "stream": str(asked.stream) if asked.stream else None,
        "fit": limited.time,
        "compute": limited.problem.compute.identity(),
    }
    configuration |= {key: value for key, value in optional.items() if value}
    return {"configuration": configuration, "fingerprint": digests}


def notes(asked: Asked, limited: Limited, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What else run.json holds: versions, the recipe, choices of memory, world_size; a resumed run may differ in it."""
    configuration = identity["configuration"]
    recipe = {key: value for key, value in configuration.items() if key not in ("hyperparameters", "fit")}
    recipe["budget"] = [f"{kind}={amount}" for kind, amount in asked.budget.to_json().items()]
    recipe |= {"options": settings(asked.options), "compute": asked.compute.to_json()}
    versions = {"allot": metadata.version("allot"), "torch": torch.__version__, "python": platform.python_version()}
    return {
        "versions": versions,
        "recipe": recipe | dict(asked.recipe),
        "memory": limited.memory,
        "processes": world_size(),
    }


def fingerprint(problem: Problem) -> dict[str, str]:
    """Short digests of the model's tensors and of the calibration samples."""
    model = hashlib.sha256()
    for name, value in sorted(problem.dense.items()):
        model.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        model.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    found = {"model": model.hexdigest()[:16]}
    if problem.calibration:
        data = hashlib.sha256(str(problem.calibration.indices).encode())
        for k in range(problem.calibration.batches):
            _digest(problem.calibration.batch(k)[0], data)
        found["calibration"] = data.hexdigest()[:16]
    return found


def _digest(batch: Any, into: Any) -> None:
    if isinstance(batch, Tensor):
        into.update(batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(batch, Mapping):
        for key, value in sorted(batch.items()):
            into.update(str(key).encode())
            _digest(value, into)
    elif isinstance(batch, tuple):
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
        inside = (value.__code__.co_code, value.__code__.co_consts, [c.cell_contents for c in value.__closure__ or ()])
        digest = hashlib.sha256(re.sub(r" at 0x\w+", "", repr(inside)).encode()).hexdigest()[:8]
        return f"{value.__module__}.{value.__qualname__}#{digest}"
    return getattr(value, "__name__", None) or re.sub(r" at 0x\w+", "", repr(value))
