"""Rows of a certificate: what was promised, what was found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready content with the SHA-256 of its own text: a changed byte is found."""
    own = {key: value for key, value in content.items() if key != "sha256"}
    return {**own, "sha256": hashlib.sha256(json.dumps(own, indent=2).encode()).hexdigest()}


def seal_row(file: str, text: str) -> Row:
    """Whether a text is what `sealed` made of it.

    Raises:
        ValueError, TypeError, AttributeError: it is no JSON object.
    """
    whole = text == json.dumps(sealed(json.loads(text)), indent=2) + "\n"
    return checked(file, "untouched", "yes", "yes" if whole else "no")
