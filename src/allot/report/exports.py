"""The rows of exports in report.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allot.errors import UsageError
from allot.export.certificate.rows import sealed
from allot.report.page import write_run
from allot.run.store import write_json


def exports_of(run: Path | None) -> list[dict[str, Any]]:
    """The rows in report.json of a run; none where there is no report yet.

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
    """Put a row into report.json, in place of an earlier row of the same file, and write the page of the run again.

    Raises:
        UsageError: the report cannot be read, or a file cannot be written.
    """
    others = [other for other in exports_of(run) if (other["form"], other["file"]) != (row["form"], row["file"])]
    update_report(run, {"exports": [*others, row]})


def update_report(run: Path, changes: dict[str, Any]) -> None:
    """Put these values into report.json in place of the earlier ones, and write the page of the run again.

    Raises:
        UsageError: a file cannot be written.
    """
    path = run / "report.json"
    report = {**json.loads(path.read_text()), **changes}
    write_json(path, sealed(report))
    write_run(run, report)
