"""The rows of exports in report.json, and an export for Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allot.errors import UsageError, VerificationError
from allot.export.certificate.records import rewrite
from allot.export.certificate.rows import seal_row, sealed
from allot.export.files.formats import PAGE, REPORT
from allot.report.page import page_of
from allot.run.store import json_text


class Exported(dict[str, Any]):
    """An exported model: a row of report.json, and the path of its file wherever a path is taken.

    >>> made = Exported(form="onnx", file="x.onnx", bytes=1200, dense_bytes=4800, macs=80, dense_macs=160, error=0.0)
    >>> made
    Exported(x.onnx: onnx, 1,200 of 4,800 bytes, 80 of 160 MACs, opened again and compared)
    >>> str(made.path), made.bytes, made.macs
    ('x.onnx', 1200, 80)
    """

    def __fspath__(self) -> str:
        return str(self["file"])

    @property
    def path(self) -> Path:
        """The file; of slim, openvino and hf the directory."""
        return Path(self["file"])

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(self["bytes"])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layers in scope for one example, as the file computes them."""
        return int(self["macs"])

    @property
    def verified(self) -> bool:
        """Whether the file was opened again and answered as the result does: a file that does not is an error."""
        return self.get("error") is not None

    def __repr__(self) -> str:
        sizes = f"{self['bytes']:,} of {self['dense_bytes']:,} bytes, {self['macs']:,} of {self['dense_macs']:,} MACs"
        compared = ", opened again and compared" if self.verified else ""
        return f"Exported({self['file']}: {self['form']}, {sizes}{compared})"


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
        UsageError: a file cannot be read or written.
        VerificationError: report.json is not what was written there, which a new seal would hide.
    """
    path = run / REPORT
    try:
        content = path.read_bytes()
        earlier, untouched = json.loads(content), seal_row(REPORT, content)["passed"]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not untouched:
        raise VerificationError(f"{path} is not what was written there: allot verify {run} shows what differs.")
    report = {**earlier, **changes}
    rewrite(run, {REPORT: json_text(sealed(report)), PAGE: page_of(run, report)})
