"""Rows of a certificate: a promised value, the value found, and whether the check passed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def checked(file: str, check: str, promised: Any, found: Any, *, passed: bool | None = None) -> Row:
    """One check; by default it passed if the found value is the promised one.

    >>> checked("model.safetensors", "kept", 10, 9)["passed"]
    False
    """
    passed = bool(promised == found if passed is None else passed)
    return {"file": file, "check": check, "promised": promised, "found": found, "passed": passed}


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digest_rows(
    name: str, promised: Mapping[str, Any], path: Path, found: Mapping[str, Any] | None = None
) -> list[Row]:
    """Size and SHA-256 of a file, compared with the promised ones; `found`: those of the file, if they are known."""
    found = digest(path) if found is None else found
    return [
        checked(name, "bytes on disk", promised["bytes"], found["bytes"]),
        checked(name, "sha256", promised["sha256"], found["sha256"]),
    ]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready content with the SHA-256 of its text, which detects a changed byte."""
    unsealed = {key: value for key, value in content.items() if key != "sha256"}
    return {**unsealed, "sha256": hashlib.sha256(json.dumps(unsealed, indent=2).encode()).hexdigest()}


def seal_row(file: str, content: bytes) -> Row:
    """Whether a file is, to the last byte, what `write_json` wrote of something `sealed`.

    Raises:
        ValueError, TypeError, AttributeError: the content is no JSON object.
    """
    unchanged = content == (json.dumps(sealed(json.loads(content)), indent=2) + "\n").encode()
    return checked(file, "untouched", "yes", "yes" if unchanged else "no")
