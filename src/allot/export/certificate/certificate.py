"""What was promised, what the re-opened files hold, and whether that is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.export.certificate.probe import ANSWERS, holds_tensors, probe_of, probe_rows
from allot.export.certificate.record import allocation_rows, export_rows, report_rows, state_rows
from allot.export.certificate.recount import Recounted, recounted
from allot.export.certificate.rows import Row, checked, digest, seal_row, sealed
from allot.export.files.destination import is_run
from allot.export.files.formats import (
    ALLOCATION,
    BITMASK,
    CERTIFICATE,
    PLAIN,
    PLAN,
    PROMISED,
    SLIM,
    TABLES,
    has_marks,
    untouched,
)
from allot.network.channels import ChannelPlan

_DIRECTORIES = {"model.xml": "openvino", "config.json": "hf"}  # what a directory of these forms holds


def certify(directory: Path, kept: Mapping[str, int], allocated: Mapping[str, int]) -> dict[str, Any]:
    """The certificate of a run whose files are written: `{promised, rows, passed, sha256}`, the last of the others.

    Args:
        directory: the run directory; holds model.safetensors, a smaller file and allocation.json.
        kept: layer name -> weights that the allocation keeps.
        allocated: what the allocation keeps, in weights of layers or in channels of groups.
    """
    files = {name: digest(directory / name) for name in PROMISED if (directory / name).exists()}
    promised = {"kept": dict(kept), "allocated": dict(allocated), "files": files}
    rows = _promised_rows(directory, promised)
    return sealed({"promised": promised, "rows": rows, "passed": all(row["passed"] for row in rows)})


def verify(path: str | Path, model: nn.Module | None = None, *, trust: bool = False) -> dict[str, Any]:
    """Re-open and recount a run or an exported file: `{passed, rows: [{file, check, promised, found, passed}]}`.

    A run is held to its certificate, its exports to their digests; a single file of tensors to its seal and the limits
    in its own metadata; what a runtime reads, and answers, to the probe beside it. Nothing is unpickled, and a
    program (.pt2) is not opened unless it is trusted. Checksums detect corruption, not tampering.

    Args:
        model: the dense model, or another with its code: exported files that hold nothing but tensors are put into it
            and have to answer their probes as well.
        trust: open programs whose digests are right, count them and compare their answers: a program can run any code.
    Raises:
        UsageError: neither a finished run nor a file that allot wrote; or a model, and no probe for it.
    """
    path = Path(path)
    try:
        there = path.exists()
    except OSError:  # a name that is too long is no name
        there = False
    if not there:
        raise UsageError(f"{path}: no such file or directory.")
    if path.name.endswith("probe.safetensors"):
        raise UsageError(f"{path} is the probe of an export: verify the file or directory that it lies beside.")
    if _is_export(path):
        rows = probe_rows(path, model=model, trust=trust)
        if holds_tensors(path):
            rows = _alone_rows(path) + rows
    else:
        rows = _run_rows(path, model, trust=trust) if path.is_dir() else _alone_rows(path)
    if model is not None and not any(row["check"] == ANSWERS for row in rows) and all(row["passed"] for row in rows):
        raise UsageError(f"{path} has no probe to ask a model: allot export RUN --to safetensors writes one.")
    return {"passed": all(row["passed"] for row in rows), "rows": rows}


def place_of(path: Path, row: Row) -> Path:
    """The file that a row of `verify(path)` is about."""
    return (path.parent if _is_export(path) or path.is_file() else path) / row["file"]


def _is_export(path: Path) -> bool:
    return probe_of(path).exists()


def _alone_rows(path: Path) -> list[Row]:
    """Of a file of tensors.

    Raises:
        UsageError: it is of another kind, or part of something else.
    """
    if probe_of(path.parent).exists():
        raise UsageError(f"{path} is part of an export: verify {path.parent}.")
    if path.suffix in (".onnx", ".pt2"):
        raise UsageError(f"no {probe_of(path).name} beside {path}: copy it there, or export again.")
    rows = [checked(path.name, "untouched", "yes", "yes" if untouched(path) else "no")]
    if rows[0]["passed"]:
        return rows + recounted(path, None).rows
    found = recounted(path, None).rows
    if found[0]["check"] == "opens":
        return found  # no file at all, or a part of one
    if not _is_export(path) and not has_marks(path):
        raise UsageError(f"{path} was not written by allot: it carries no budget.")
    return rows


def _run_rows(path: Path, model: nn.Module | None, *, trust: bool) -> list[Row]:
    """Of a run directory.

    Raises:
        UsageError: it is none, or not finished.
    """
    for name, form in _DIRECTORIES.items():
        if (path / name).exists() and not is_run(path):
            probe = probe_of(path)
            raise UsageError(f"no {probe.name} in {path}, an export to {form}: copy it there, or export again.")
    rows, promised = certified(path)
    if promised is None:
        return rows + export_rows(path, None, model, trust=trust)
    digest_of_run = promised["files"][PLAIN]["sha256"]
    return rows + report_rows(path, promised) + export_rows(path, digest_of_run, model, trust=trust)


def certified(path: Path) -> tuple[list[Row], Mapping[str, Any] | None]:
    """(rows of a run's own files, held to its certificate; what that promises, None where it cannot be relied on).

    Raises:
        UsageError: no run, or one that is not finished.
    """
    rows = state_rows(path)
    try:
        text = (path / CERTIFICATE).read_text()
        rows.append(seal_row(CERTIFICATE, text))
        if rows[-1]["passed"]:  # else nothing is known of what was promised
            content = json.loads(text)
            found = _promised_rows(path, content["promised"])
            known = all(row["passed"] for row in found if row["file"] == CERTIFICATE)
            return rows + found, content["promised"] if known else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        rows.append(checked(CERTIFICATE, "opens", "a certificate", problem, passed=False))
    return rows, None


def _promised_rows(directory: Path, promised: Mapping[str, Any]) -> list[Row]:
    """Of every file that was promised, and of what they say together."""
    files = promised["files"]
    needed = {PLAIN, ALLOCATION} | ({SLIM, PLAN} if SLIM in files else {BITMASK})
    wrong = [*(needed - files.keys()), *(name for name in files if name not in PROMISED)]
    rows = [checked(CERTIFICATE, "files", "those of a run", sorted(wrong) or "those of a run")]
    if wrong:
        return rows
    held: dict[str, Recounted] = {}
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            rows.append(checked(name, "exists", "yes", "no", passed=False))
            continue
        found = digest(path)
        rows.append(checked(name, "bytes on disk", expected["bytes"], found["bytes"]))
        rows.append(checked(name, "sha256", expected["sha256"], found["sha256"]))
        if name not in (PLAN, TABLES, ALLOCATION):
            held[name] = recounted(path, promised["kept"])
            rows += held[name].rows
    rows += allocation_rows(directory, promised["allocated"], of="group" if SLIM in files else "layer")
    if all(row["passed"] for row in rows):
        rows.append(_same_row(directory, held))
    return rows


def _same_row(directory: Path, held: Mapping[str, Recounted]) -> Row:
    """Whether both files hold the same tensors."""
    plain, other = held[PLAIN].state, SLIM if SLIM in held else BITMASK
    if other == SLIM:
        plan, aliases = ChannelPlan.from_json(json.loads((directory / PLAN).read_text())), held[SLIM].aliases
        plain = {name: plan.cut(aliases.get(name, name), value) for name, value in plain.items()}
    return checked(other, f"same tensors as {PLAIN}", "yes", "yes" if _equal(plain, held[other].state) else "no")


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
