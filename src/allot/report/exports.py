"""Exports as rows of a run's report: written one after the other, shown on its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allot.errors import UsageError
from allot.export.certificate.rows import sealed
from allot.report.page import write_run
from allot.run.store import write


def exports_of(run: Path | None) -> list[dict[str, Any]]:
    """The rows in a run's report.json; none where there is no report yet.

    Raises:
        UsageError: the report cannot be read.
    """
    path = run / "report.json" if run else None
    if path is None or not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["exports"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def add_export(run: Path, row: dict[str, Any]) -> None:
    """Put a row into a run's report.json, in place of an earlier one of the same file; all else stays as it is.

    Raises:
        UsageError: the report cannot be read or written.
    """
    others = [other for other in exports_of(run) if (other["form"], other["file"]) != (row["form"], row["file"])]
    save_report(run, {**json.loads((run / "report.json").read_text()), "exports": [*others, row]})


def save_report(run: Path, report: dict[str, Any]) -> None:
    """Write a run's report.json, sealed, and its page.

    Raises:
        UsageError: they cannot be written.
    """
    write(run / "report.json", json.dumps(sealed(report), indent=2) + "\n")
    write_run(run, report)
