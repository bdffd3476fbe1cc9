"""Short digests that tell whether a run goes on with the model and data that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allot.run.problem import Problem


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
