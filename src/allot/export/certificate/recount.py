"""One file of tensors, re-opened and recounted: the rows of a certificate about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allot.errors import UsageError
from allot.export.certificate.rows import Row, checked
from allot.export.files.formats import TABLES, read
from allot.export.files.latency_tables import load_tables

_SIZED = ("bitmask", "slim")  # the formats that a limit of bytes is about


@dataclass(frozen=True)
class Recounted:
    """A file as it was found: rows, its state dict, tied name -> stored name."""

    rows: list[Row]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


def recounted(path: Path, kept: Mapping[str, int] | None) -> Recounted:
    """It opens, no layer holds more than it may, and every limit that is about such a file holds.

    Args:
        kept: layer name -> weights that it may hold, where more is known than the file says.
    """
    try:
        state, about = read(path)
    except UsageError as error:
        return Recounted([checked(path.name, "opens", "a whole file", str(error), passed=False)])
    try:
        return Recounted(_rows(path, state, about, kept), state, about["aliases"])
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        problem = f"cannot be understood ({type(error).__name__}: {error})"
        return Recounted([checked(path.name, "metadata", "layers and limits", problem, passed=False)], state)


def _rows(
    path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], kept: Mapping[str, int] | None
) -> list[Row]:
    missing = [name for name in about["layers"] if name not in state]
    rows = [checked(path.name, "layers present", "all", ", ".join(missing) or "all")]
    if missing:
        return rows
    found = {name: int(torch.count_nonzero(state[name])) for name in about["layers"]}
    broken = [name for name in found if not bool(torch.isfinite(state[name]).all())]
    rows.append(checked(path.name, "weights finite", "all", ", ".join(broken) or "all"))
    if kept is not None:
        over = [f"{name} {found[name]:,} > {kept.get(name, 0):,}" for name in found if found[name] > kept.get(name, 0)]
        rows.append(checked(path.name, "nonzeros per layer", "at most kept", ", ".join(over) or "at most kept"))
    costs = _costs(path, state, about, found)
    for kind, limit in about["limits"].items():
        label = f"{kind}={about['asked'][kind]}" + (", ns by the tables" if kind == "latency" else "")
        unit = " kept" if kind == "sparsity" else ""
        if kind in costs:
            promise, holds = f"at most {limit:,}{unit}", f"{costs[kind]:,}{unit}"
            rows.append(checked(path.name, label, promise, holds, passed=costs[kind] <= limit))
        elif kind not in ("bytes", "latency"):
            rows.append(checked(path.name, label, f"at most {limit:,}", "cannot be counted", passed=False))
    return rows


def _costs(
    path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], found: Mapping[str, int]
) -> dict[str, int]:
    """What the file costs by kind of limit; bytes and time only where the file is the one that these are about."""
    costs = {"params": sum(found.values()), "sparsity": sum(found.values())}
    if all(macs is not None for _, macs in about["layers"].values()):
        exact = (Fraction(found[name] * macs, math.prod(shape)) for name, (shape, macs) in about["layers"].items())
        costs["macs"] = math.ceil(sum(exact))
    if about["format"] in _SIZED:
        costs["bytes"] = path.stat().st_size
    if about["format"] == "slim" and (tables := path.with_name(TABLES)).exists():  # how fast a machine was
        sides = {name: (float(state[name].shape[0]), float(state[name].shape[1])) for name in about["layers"]}
        costs["latency"] = math.ceil(load_tables(tables).of(sides)[0])
    return costs
