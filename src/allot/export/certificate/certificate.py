"""Certificates: the promised values, the values that the re-opened files hold, and whether they agree."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allot.errors import UsageError
from allot.export.certificate.probe import ANSWERS, ENDING, holds_tensors, probe_of, probe_rows
from allot.export.certificate.records import record_rows, record_rows_to_come
from allot.export.certificate.recount import Recounted, recount
from allot.export.certificate.rows import Row, checked, digest, digest_rows, seal_row, sealed
from allot.export.certificate.structure import structure_row
from allot.export.files.destination import is_run
from allot.export.files.formats import (
    ALLOCATION,
    BITMASK,
    CERTIFICATE,
    OWN,
    PLAIN,
    PLAN,
    PROBE,
    PROMISED,
    REPORT,
    RUN,
    SLIM,
    TABLES,
    has_marks,
    untouched,
)
from allot.network.arguments import typed
from allot.network.channels import ChannelPlan
from allot.run.store import json_text, read_run

_DIRECTORIES = {"model.xml": "openvino", "config.json": "hf"}  # a file that every directory of the form holds


def certify(
    directory: Path,
    kept: Mapping[str, int],
    allocated: Mapping[str, int],
    structure: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The certificate of a run whose files are written: `{promised, rows, passed, sha256}`, `sha256` of the other keys.

    Its records are promised when they are written (`allot.export.certificate.records`).

    Args:
        directory: the run directory; holds model.safetensors, a smaller file and allocation.json.
        kept: layer name -> weights that the allocation keeps.
        allocated: layer -> weights, or group -> channels, that the allocation keeps.
        structure: of `structure_of`, where the pattern has structure inside a layer.
    """
    files = {name: digest(directory / name) for name in PROMISED if (directory / name).exists()}
    promised: dict[str, Any] = {"kept": dict(kept), "allocated": dict(allocated), "files": files}
    if structure:
        promised["structure"] = structure
    rows = _promised_rows(directory, promised, files)
    return sealed({"promised": promised, "rows": rows, "passed": all(row["passed"] for row in rows)})


@typed
def verify(path: str | Path, model: nn.Module | None = None, *, trust: bool = False) -> dict[str, Any]:
    """Re-open and recount a run or an exported file: `{passed, rows: [{file, check, promised, found, passed}]}`.

    A run is compared with its certificate, and its exports with their digests; a single file of tensors with its seal
    and the limits in its metadata; a file for a runtime, and its outputs, with the probe beside it. Nothing is
    unpickled, and a program (.pt2) is not opened unless it is trusted. Checksums detect corruption, not tampering.

    Args:
        model: the dense model, or another with its code: exported files that hold only tensors are loaded into it, and
            its outputs are compared with their probes as well.
        trust: open programs whose digests are right, count their weights and compare their outputs: a program can run
            any code.
    Raises:
        UsageError: neither a finished run nor a file that allot wrote; or a model, and no probe for it.

    >>> verify("no/such/run")
    Traceback (most recent call last):
    allot.errors.UsageError: no/such/run: no such file or directory.
    """
    path = Path(path)
    if not os.path.exists(path):  # not `path.exists`, which raises where a name is too long
        if rows := _rows_of_missing(path):
            return {"passed": False, "rows": rows}
        raise UsageError(f"{path}: no such file or directory.")
    if path.name.endswith("probe.safetensors"):
        raise UsageError(f"{path} is the probe of an export: verify the file or directory that it lies beside.")
    if _is_export(path):
        rows = probe_rows(path, model=model, trust=trust)
        if holds_tensors(path):
            rows = _single_file_rows(path) + rows
    else:
        rows = _run_rows(path, model, trust=trust) if path.is_dir() else _single_file_rows(path)
    if model is not None and not any(row["check"] == ANSWERS for row in rows) and all(row["passed"] for row in rows):
        raise UsageError(f"{path} has no probe to ask a model: allot export RUN --to safetensors writes one.")
    return {"passed": all(row["passed"] for row in rows), "rows": rows}


def place_of(path: Path, row: Row) -> Path:
    """The file that a row of `verify(path)` is about."""
    return (path.parent if _is_export(path) or path.is_file() else path) / row["file"]


def _is_export(path: Path) -> bool:
    return probe_of(path).exists()


def _rows_of_missing(path: Path) -> list[Row]:
    """Failed rows of a file that is gone from a run; none where no run promises it."""
    if not os.path.isdir(path.parent) or not is_run(path.parent):
        return []
    rows = _run_rows(path.parent, None, trust=False)
    return [row for row in rows if row["file"] == path.name and not row["passed"]]


def _single_file_rows(path: Path) -> list[Row]:
    """Rows of a file of tensors, or of another file of a run.

    Raises:
        UsageError: a file of another kind, or a part of an export.
    """
    if probe_of(path.parent).exists():
        raise UsageError(f"{path} is part of an export: verify {path.parent}.")
    if path.suffix in (".onnx", ".pt2"):
        raise UsageError(f"no {probe_of(path).name} beside {path}: copy it there, or export again.")
    if path.suffix != ".safetensors" and path.name in OWN and is_run(path.parent):
        return [row for row in _run_rows(path.parent, None, trust=False) if row["file"] in (path.name, CERTIFICATE)]
    rows = [checked(path.name, "untouched", "yes", "yes" if untouched(path) else "no")]
    if rows[0]["passed"]:
        return rows + recount(path, None).rows
    if not has_marks(path) and not _is_export(path) and not (path.name in OWN and is_run(path.parent)):
        raise UsageError(f"{path} was not written by allot: it carries no budget.")
    recount_rows = recount(path, None).rows
    return recount_rows if recount_rows[0]["check"] == "opens" else rows  # no safetensors file, or a part of one


def _run_rows(path: Path, model: nn.Module | None, *, trust: bool) -> list[Row]:
    """Rows of a run directory.

    Raises:
        UsageError: no run directory, or a run that is not finished.
    """
    for name, form in _DIRECTORIES.items():
        if (path / name).exists() and not is_run(path):
            probe = probe_of(path)
            raise UsageError(f"no {probe.name} in {path}, an export to {form}: copy it there, or export again.")
    if not is_run(path) and _is_rest_of_run(path):
        return [checked(name, "exists", "yes", "no", passed=False) for name in (CERTIFICATE, RUN)]
    rows, promised = certificate_rows(path)
    if promised is None:
        return rows + export_rows(path, None, model, trust=trust)
    digest_of_run = promised["files"][PLAIN]["sha256"]
    rows += record_rows(path, promised) + report_rows(path, promised)
    return rows + export_rows(path, digest_of_run, model, trust=trust)


def _is_rest_of_run(directory: Path) -> bool:
    """Whether a directory holds what a run leaves beside its certificate."""
    plain = directory / PLAIN
    return plain.is_file() and (directory / ALLOCATION).is_file() and has_marks(plain)


def rows_of_run(directory: Path, report: Mapping[str, Any]) -> list[Row]:
    """The checks that `verify` makes of a finished run, for its page: the same ones, in the same order.

    The files of the model are not read again: their checks are those that were made when the certificate was written.
    Records, of which the page is one, are promised when they are written.

    Args:
        report: what report.json holds, or is about to hold.
    Raises:
        UsageError: the certificate cannot be read.
    """
    path = directory / CERTIFICATE
    try:
        content = path.read_bytes()
        certificate = json.loads(content)
        keys = ("file", "check", "promised", "found", "passed")
        rows = [seal_row(CERTIFICATE, content), *({key: row[key] for key in keys} for row in certificate["rows"])]
        promised, run = certificate["promised"], certificate["promised"]["files"][PLAIN]["sha256"]
    except _BROKEN as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    rows += record_rows_to_come(directory) + _report_rows(_content_of(report, directory / REPORT), promised)
    return rows + export_rows(directory, run, None, trust=False, report=report)


def _content_of(report: Mapping[str, Any], path: Path) -> bytes:
    """The bytes of report.json: of the file where it holds this report, else as they will be written."""
    content = path.read_bytes() if path.is_file() else b""
    with suppress(*_BROKEN):
        if sealed(json.loads(content)) == sealed(report):
            return content
    return json_text(sealed(report)).encode()


def certificate_rows(path: Path) -> tuple[list[Row], Mapping[str, Any] | None]:
    """(rows of a run's files, compared with its certificate; its promises, None if they cannot be relied on).

    Raises:
        UsageError: no run, or a run that is not finished.
    """
    rows = state_rows(path)
    try:
        content = (path / CERTIFICATE).read_bytes()
        rows.append(seal_row(CERTIFICATE, content))
        if rows[-1]["passed"]:  # else nothing is known of the promises
            promised = json.loads(content)["promised"]
            file_rows = _promised_rows(path, promised)
            reliable = all(row["passed"] for row in file_rows if row["file"] == CERTIFICATE)
            return rows + file_rows, promised if reliable else None
    except (*_BROKEN, ArithmeticError) as error:
        rows.append(_unreadable(CERTIFICATE, "a certificate", error))
    return rows, None


def _promised_rows(
    directory: Path, promised: Mapping[str, Any], digests: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Row]:
    """Rows of every promised file, and of the comparison of the two model files.

    Args:
        digests: those of the files on the disk, if they were computed a moment ago; None: they are computed.
    """
    files = promised["files"]
    needed = {PLAIN, ALLOCATION} | ({SLIM, PLAN} if SLIM in files else {BITMASK})
    wrong = [*(needed - files.keys()), *(name for name in files if name not in PROMISED)]
    rows = [checked(CERTIFICATE, "files", "those of a run", sorted(wrong) or "those of a run")]
    if wrong:
        return rows
    recounts: dict[str, Recounted] = {}
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            rows.append(checked(name, "exists", "yes", "no", passed=False))
            continue
        rows += digest_rows(name, expected, path, digests[name] if digests else None)
        if name not in (PLAN, TABLES, ALLOCATION):
            recounts[name] = recount(path, promised["kept"])
            rows += recounts[name].rows
    rows += allocation_rows(directory, promised["allocated"], of="group" if SLIM in files else "layer")
    if "structure" in promised and PLAIN in recounts:
        rows.append(structure_row(PLAIN, promised["structure"], promised["kept"], recounts[PLAIN].state))
    if all(row["passed"] for row in rows):
        rows.append(_same_tensors_row(directory, recounts))
    return rows


def _same_tensors_row(directory: Path, recounts: Mapping[str, Recounted]) -> Row:
    plain, other = recounts[PLAIN].state, SLIM if SLIM in recounts else BITMASK
    stored, aliases = recounts[other].state, recounts[other].aliases
    plan = ChannelPlan({}, {}, {})
    if other == SLIM:
        plan = ChannelPlan.from_json(json.loads((directory / PLAN).read_text()))
    same = plain.keys() == stored.keys() and all(
        torch.equal(plan.cut(aliases.get(name, name), plain[name]), stored[name]) for name in plain
    )
    return checked(other, f"same tensors as {PLAIN}", "yes", "yes" if same else "no")


_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_STATES = ("running", "stopped", "done")


def state_rows(directory: Path) -> list[Row]:
    """No rows if the run is done, or was saved by hand; a failed row if run.json cannot be read.

    Raises:
        UsageError: no run, or a run that is not finished.
    """
    has_certificate = (directory / CERTIFICATE).exists()
    if has_certificate and not (directory / RUN).exists():
        return []
    try:
        state = read_run(directory)["state"]
    except UsageError as error:
        if not has_certificate:
            raise
        return [checked(RUN, "opens", "what was asked", str(error), passed=False)]
    if state not in _STATES and has_certificate:
        return [checked(RUN, "state", "done", state, passed=False)]
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
        return _report_rows((directory / REPORT).read_bytes(), promised)
    except OSError as error:
        return [_unreadable(REPORT, "a report", error)]


def _report_rows(content: bytes, promised: Mapping[str, Any]) -> list[Row]:
    try:
        report = json.loads(content)
        listed = {layer["name"]: layer["kept"] for layer in report["layers"]}
        sizes = {kind: report["bytes"][kind] for kind in ("dense", "file")}
        files, kept = promised["files"], promised["kept"]
        wanted = {"dense": files[PLAIN]["bytes"], "file": files[SLIM if SLIM in files else BITMASK]["bytes"]}
        _exports(report)
        return [
            seal_row(REPORT, content),
            checked(REPORT, "kept per layer", "as promised", _differing(kept, listed)),
            checked(REPORT, "kept", sum(kept.values()), report["kept"]),
            checked(REPORT, "bytes", wanted, sizes),
        ]
    except _BROKEN as error:
        return [_unreadable(REPORT, "a report", error)]


def export_rows(
    directory: Path,
    run: str | None,
    model: nn.Module | None,
    *,
    trust: bool,
    report: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Rows of every export in the run; exports in the report must exist, have a probe and come from this run.

    Args:
        run: the promised SHA-256 of the run's model.safetensors; None: unknown.
        model: the dense model, into which files of tensors are loaded to compare outputs.
        trust: whether programs are opened.
        report: the content of report.json; None: it is read.
    """
    probes = {*directory.glob(f"*{ENDING}"), *directory.glob(f"*/{PROBE}")}
    rows: list[Row] = []
    try:
        listed = _exports(json.loads((directory / REPORT).read_text()) if report is None else report)
    except _BROKEN:  # `report_rows` has a row for the broken report
        listed = {}
    listed_probes = {probe_of(directory / name) for name in listed}
    probes |= {p for p in listed_probes if p.exists() and p.resolve().is_relative_to(directory.resolve())}
    for name, probed in listed.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            rows.append(checked(REPORT, "exports", "inside of the run", name))
        elif not path.exists():
            rows.append(checked(name, "exists", "yes", "no", passed=False))
        elif probed and probe_of(path) not in probes:
            rows.append(checked(str(probe_of(path).relative_to(directory)), "exists", "yes", "no", passed=False))
    for probe in sorted(probes):
        export = probe.parent if probe.name == PROBE else probe.with_name(probe.name.removesuffix(ENDING))
        called = export.relative_to(directory)
        origins = () if run is None else (run,) if str(called) in listed else (run, None)
        rows += probe_rows(export, called=called, origins=origins, ask=False, model=model, trust=trust)
    return rows


def _exports(report: Mapping[str, Any]) -> dict[str, bool]:
    """Export in the run that the report lists -> whether it has a probe."""
    return {str(row["inside"]): bool(row["probe"]) for row in report["exports"] if row["inside"] is not None}


def _unreadable(name: str, what: str, error: Exception) -> Row:
    return checked(name, "opens", what, f"cannot be read ({type(error).__name__}: {error})", passed=False)


def _differing(promised: Mapping[str, int], found: Mapping[str, int]) -> str:
    names = [name for name in promised.keys() | found.keys() if promised.get(name) != found.get(name)]
    return ", ".join(sorted(names)) or "as promised"
