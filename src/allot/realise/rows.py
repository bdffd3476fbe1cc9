"""Rows of a certificate: what was promised, what was found."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def checked(file: str, check: str, promised: Any, found: Any, *, passed: bool | None = None) -> Row:
    """One check; passed where what was found is what was promised, unless said."""
    return {
        "file": file,
        "check": check,
        "promised": promised,
        "found": found,
        "passed": bool(promised == found if passed is None else passed),
    }


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
