"""One file of tensors, re-opened and recounted: its rows of a certificate."""

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
from allot.export.files.formats import TABLES, PlainState
from allot.export.files.latency_tables import load_tables


@dataclass(frozen=True)
class Recounted:
    """A recounted file: rows; its state dict, each tensor read when it is asked for; tied name -> stored name."""

    rows: list[Row]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Weights:
    """The counts of one layer: of its tensor nothing is kept."""

    nonzeros: int
    finite: bool
    shape: torch.Size

    @classmethod
    def of(cls, weight: Tensor) -> _Weights:
        return cls(int(torch.count_nonzero(weight)), bool(torch.isfinite(weight).all()), weight.shape)


_BROKEN = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)


def recount(path: Path, kept: Mapping[str, int] | None) -> Recounted:
    """Whether a file opens, no layer holds more weights than allowed, and every limit on such a file is met.

    One tensor of the file is in memory at a time.

    Args:
        kept: layer name -> weights that it may hold; None: unknown.
    """
    state: Mapping[str, Tensor] = {}
    try:
        state = opened = PlainState.of(path)
        layers = opened.metadata.get("layers", {})
        weights = {name: _Weights.of(opened[name]) for name in layers if name in opened}
    except UsageError as error:
        return Recounted([checked(path.name, "opens", "a whole file", str(error), passed=False)])
    except _BROKEN as error:
        return Recounted([_not_understood(path, error)], state)
    try:
        return Recounted(_rows(path, weights, opened.metadata, kept), state, opened.metadata["aliases"])
    except _BROKEN as error:
        return Recounted([_not_understood(path, error)], state)


def _not_understood(path: Path, error: Exception) -> Row:
    problem = f"cannot be understood ({type(error).__name__}: {error})"
    return checked(path.name, "metadata", "layers and limits", problem, passed=False)


def _rows(
    path: Path, weights: Mapping[str, _Weights], metadata: Mapping[str, Any], kept: Mapping[str, int] | None
) -> list[Row]:
    missing = [name for name in metadata["layers"] if name not in weights]
    rows = [checked(path.name, "layers present", "all", ", ".join(missing) or "all")]
    if missing:
        return rows
    nonzeros = {name: weights[name].nonzeros for name in metadata["layers"]}
    broken = [name for name in nonzeros if not weights[name].finite]
    rows.append(checked(path.name, "weights finite", "all", ", ".join(broken) or "all"))
    if kept is not None:
        limits = {name: kept.get(name, 0) for name in nonzeros}
        over = [f"{name} {count:,} > {limits[name]:,}" for name, count in nonzeros.items() if count > limits[name]]
        rows.append(checked(path.name, "nonzeros per layer", "at most kept", ", ".join(over) or "at most kept"))
    costs = _costs(path, weights, metadata, nonzeros)
    for kind, limit in metadata["limits"].items():
        label = f"{kind}={metadata['asked'][kind]}" + (", ns by the tables" if kind == "latency" else "")
        unit = " kept" if kind == "sparsity" else ""
        if kind in costs:
            promise, value = f"at most {limit:,}{unit}", f"{costs[kind]:,}{unit}"
            rows.append(checked(path.name, label, promise, value, passed=costs[kind] <= limit))
        elif kind not in ("bytes", "latency"):
            rows.append(checked(path.name, label, f"at most {limit:,}", "cannot be counted", passed=False))
    return rows


def _costs(
    path: Path, weights: Mapping[str, _Weights], metadata: Mapping[str, Any], nonzeros: Mapping[str, int]
) -> dict[str, int]:
    """Costs of the file by kind of limit; bytes and latency only of the formats that these limits apply to."""
    costs = {"params": sum(nonzeros.values()), "sparsity": sum(nonzeros.values())}
    if all(macs is not None for _, macs in metadata["layers"].values()):
        exact = (
            Fraction(nonzeros[name] * macs, math.prod(shape)) for name, (shape, macs) in metadata["layers"].items()
        )
        costs["macs"] = math.ceil(sum(exact))
    if metadata["format"] in ("bitmask", "slim"):
        costs["bytes"] = path.stat().st_size
    if metadata["format"] == "slim" and (tables := path.with_name(TABLES)).exists():  # times of one machine
        sides = {name: (float(weights[name].shape[0]), float(weights[name].shape[1])) for name in metadata["layers"]}
        costs["latency"] = math.ceil(load_tables(tables).of(sides)[0])
    return costs
