"""Rows of a run's files beside its certificate: its state, its allocation, its report, the exports in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from allot.errors import UsageError
from allot.export.certificate.probe import ENDING, probe_of, probe_rows
from allot.export.certificate.rows import Row, checked, seal_row
from allot.export.files.formats import ALLOCATION, BITMASK, CERTIFICATE, PLAIN, PROBE, REPORT, SLIM
from allot.run.store import read_run

_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_STATES = ("running", "stopped", "done")


def state_rows(directory: Path) -> list[Row]:
    """No rows if the run is done, or was saved by hand; a failed row if run.json cannot be read.

    Raises:
        UsageError: no run, or a run that is not finished.
    """
    has_certificate = (directory / CERTIFICATE).exists()
    if has_certificate and not (directory / "run.json").exists():
        return []
    try:
        state = read_run(directory)["state"]
    except UsageError as error:
        if not has_certificate:
            raise
        return [checked("run.json", "opens", "what was asked", str(error), passed=False)]
    if state not in _STATES and has_certificate:
        return [checked("run.json", "state", "done", state, passed=False)]
    if state != "done":
        raise UsageError(f"{directory} is not finished: run the same prune command again to go on.")
    return []


def allocation_rows(directory: Path, promised: Mapping[str, int], *, of: str) -> list[Row]:
    """Whether allocation.json can be read, and keeps the promised number in each layer or group."""
    if not (directory / ALLOCATION).is_file():
        return []  # `certificate_rows` has a row for the missing file
    try:
        layers = json.loads((directory / ALLOCATION).read_text())["layers"]
        listed = {name: layer["kept"] for name, layer in layers.items()}
    except _BROKEN as error:
        return [_unreadable(ALLOCATION, "an allocation", error)]
    return [checked(ALLOCATION, f"kept per {of}", "as promised", _differing(promised, listed))]


def report_rows(directory: Path, promised: Mapping[str, Any]) -> list[Row]:
    """Whether report.json shows the counts and sizes that the certificate promises."""
    try:
        text = (directory / REPORT).read_text()
        report = json.loads(text)
        listed = {layer["name"]: layer["kept"] for layer in report["layers"]}
        sizes = {kind: report["bytes"][kind] for kind in ("dense", "file")}
        files, kept = promised["files"], promised["kept"]
        wanted = {"dense": files[PLAIN]["bytes"], "file": files[SLIM if SLIM in files else BITMASK]["bytes"]}
        _exports(report)
        return [
            seal_row(REPORT, text),
            checked(REPORT, "kept per layer", "as promised", _differing(kept, listed)),
            checked(REPORT, "kept", sum(kept.values()), report["kept"]),
            checked(REPORT, "bytes", wanted, sizes),
        ]
    except _BROKEN as error:
        return [_unreadable(REPORT, "a report", error)]


def export_rows(directory: Path, run: str | None, model: nn.Module | None, *, trust: bool) -> list[Row]:
    """Rows of every export in the run; exports in the report must exist, have a probe and come from this run.

    Args:
        run: the promised SHA-256 of the run's model.safetensors; None: unknown.
        model: the dense model, into which files of tensors are loaded to compare outputs.
        trust: whether programs are opened.
    """
    probes = {*directory.glob(f"*{ENDING}"), *directory.glob(f"*/{PROBE}")}
    rows, listed = [], _listed(directory)
    probes |= {probe for name in listed if (probe := probe_of(directory / name)).exists()}
    for name, probed in listed.items():
        path = directory / name
        if not path.exists():
            rows.append(checked(name, "exists", "yes", "no", passed=False))
        elif probed and probe_of(path) not in probes:
            rows.append(checked(str(probe_of(path).relative_to(directory)), "exists", "yes", "no", passed=False))
    for probe in sorted(probes):
        export = probe.parent if probe.name == PROBE else probe.with_name(probe.name.removesuffix(ENDING))
        called = export.relative_to(directory)
        origins = () if run is None else (run,) if str(called) in listed else (run, None)
        rows += probe_rows(export, called=called, origins=origins, ask=False, model=model, trust=trust)
    return rows


def _listed(directory: Path) -> dict[str, bool]:
    """Export that the report lists -> whether it has a probe; {} if it cannot be read, see `report_rows`."""
    try:
        return _exports(json.loads((directory / REPORT).read_text()))
    except _BROKEN:
        return {}


def _exports(report: Mapping[str, Any]) -> dict[str, bool]:
    return {str(row["inside"]): bool(row["probe"]) for row in report["exports"] if row["inside"] is not None}


def _unreadable(name: str, what: str, error: Exception) -> Row:
    return checked(name, "opens", what, f"cannot be read ({type(error).__name__}: {error})", passed=False)


def _differing(promised: Mapping[str, int], found: Mapping[str, int]) -> str:
    names = [name for name in promised.keys() | found.keys() if promised.get(name) != found.get(name)]
    return ", ".join(sorted(names)) or "as promised"
