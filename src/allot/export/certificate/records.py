"""Records of a run, files that hold no weights: their digests in the certificate, also where a command rewrites them.

    certificate.json   {"promised": {"records": {name: [{"bytes", "sha256"}, ...]}, ...}, ...}

A file has one of the digests listed. There are several only while files are rewritten: the certificate promises the
new content before the first file changes, and the old content until the last one did, so that a kill at any moment
leaves a run that verifies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allot.export.certificate.rows import Row, checked, digest, digest_rows, seal_row, sealed
from allot.export.files.formats import CERTIFICATE, PAGE, RECIPE, RUN, STEPS
from allot.run.store import write, write_json

RECORDS = (RUN, RECIPE, STEPS, PAGE)  # report.json is sealed, and held to the certificate by itself
_CHECKS_OF_A_RECORD = ("bytes on disk", "sha256")
_OF_A_RUN = {RUN, RECIPE, STEPS}  # a result that was saved by hand has none of these


def record(directory: Path) -> None:
    """Promise the records of a certified directory as they are.

    Raises:
        UsageError: the certificate cannot be written.
    """
    found = {name: [digest(directory / name)] for name in RECORDS if (directory / name).is_file()}
    if certificate := _intact(directory):
        _promise(directory, certificate, found)


def rewrite(directory: Path, contents: Mapping[str, str]) -> None:
    """Write these files of a run, and promise those of them that are records; other promises stay.

    Where the certificate is damaged, it stays as it is: to seal it again would hide that.

    Args:
        contents: name of a file -> text.
    Raises:
        UsageError: a file cannot be written.
    """
    certificate = _intact(directory)
    new = {name: _digest_of(contents[name].encode()) for name in RECORDS if name in contents}
    before = dict(certificate["promised"].get("records", {})) if certificate else {}
    if certificate:
        both = {name: [d for d in before.get(name, []) if d != content] + [content] for name, content in new.items()}
        _promise(directory, certificate, {**before, **both})
    for name, text in contents.items():
        write(directory / name, text)
    if certificate and any(name in before for name in new):
        _promise(directory, certificate, {**before, **{name: [content] for name, content in new.items()}})


def record_rows(directory: Path, promised: Mapping[str, Any]) -> list[Row]:
    """Rows of every record: it exists, and is to the last byte what was written."""
    records = promised.get("records", {})
    present = {name for name in RECORDS if (directory / name).is_file()}
    needed = {PAGE} | (_OF_A_RUN if RUN in present else set())
    wrong = sorted((needed - records.keys()) | (records.keys() - set(RECORDS)))
    rows = [checked(CERTIFICATE, "records", "those of a run", wrong or "those of a run")]
    for name in RECORDS if not wrong else ():
        if name not in records:
            continue
        if name not in present:
            rows.append(checked(name, "exists", "yes", "no", passed=False))
            continue
        found, accepted = digest(directory / name), records[name]
        rows += digest_rows(name, found if found in accepted else accepted[-1], directory / name, found)
    return rows


def record_rows_to_come(directory: Path) -> list[Row]:
    """The rows that `record_rows` makes of a run as soon as its page is written: all records are what was written."""
    written = [name for name in RECORDS if name == PAGE or (directory / name).is_file()]
    rows = [checked(CERTIFICATE, "records", "those of a run", "those of a run")]
    return rows + [checked(n, check, "as written", "as written") for n in written for check in _CHECKS_OF_A_RECORD]


def _intact(directory: Path) -> dict[str, Any] | None:
    """The certificate; None where there is none, or it is not what was written."""
    try:
        content = (directory / CERTIFICATE).read_bytes()
        certificate = json.loads(content)
        intact = seal_row(CERTIFICATE, content)["passed"] and isinstance(certificate["promised"], dict)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return certificate if intact else None


def _promise(directory: Path, certificate: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    promised = {**certificate["promised"], "records": {name: records[name] for name in RECORDS if name in records}}
    write_json(directory / CERTIFICATE, sealed({**certificate, "promised": promised}))


def _digest_of(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
