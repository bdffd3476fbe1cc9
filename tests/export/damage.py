"""Files that were changed after the run, and what `verify` says of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from allot.export.certificate.certificate import verify

TIMED = ("run.json", "report.html")
DAMAGES = ("removed", "empty", "half", "longer", "nonsense")


def passed(path: Path) -> bool:
    """The verdict, which has to follow from rows that have every column."""
    found = verify(path)
    assert found["passed"] == all(row["passed"] for row in found["rows"])
    assert all(set(row) == {"file", "check", "promised", "found", "passed"} for row in found["rows"])
    return bool(found["passed"])


def any_flipped_bit_fails(run: Path, name: str, times: int) -> None:
    """`verify` finds each of so many random bits; the file is as it was afterwards."""
    whole = (run / name).read_bytes()
    generator = random.Random(1)
    for _ in range(times):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (run / name).write_bytes(damaged)
        assert not passed(run)
    (run / name).write_bytes(whole)
    assert passed(run)


def timeless(run: Path) -> bytes:
    """The certificate of a run without the digests of files that hold times: run.json, and the page."""
    content = json.loads((run / "certificate.json").read_bytes())
    assert content.pop("sha256") and {len(content["promised"]["records"].pop(name)) for name in TIMED} == {1}
    return json.dumps(content).encode()


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "removed":
        path.unlink()
    else:
        content = {"empty": b"", "half": whole[: len(whole) // 2], "longer": whole + b"x", "nonsense": b"[1, 2]"}
        path.write_bytes(content[how])
