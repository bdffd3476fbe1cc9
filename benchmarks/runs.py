"""Runs that a benchmark measures, several at a time, kept in a file from which an interrupted command goes on."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from allot.store import write

Found = dict[str, dict[str, Any]]


def measured(
    cells: Iterable[tuple[str, Sequence[Any]]], measure: Callable[..., dict[str, Any]], cache: Path, workers: int
) -> Found:
    """What `measure(*arguments)` gives for every (key, arguments), from the file where it is there."""
    found: Found = json.loads(cache.read_text()) if cache.exists() else {}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(measure, *arguments): key for key, arguments in cells if key not in found}
        for i, job in enumerate(as_completed(jobs), 1):
            found[jobs[job]] = job.result()
            logging.info("%d of %d: %s: %s", i, len(jobs), jobs[job], found[jobs[job]].get("score"))
            rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found))
            write(cache, "{\n" + rows + "\n}\n")
    return found


def cell(scores: Sequence[float], *, signed: bool = False, digits: int = 1) -> str:
    """Mean ± standard deviation."""
    text = f"{statistics.mean(scores):{'+' if signed else ''}.{digits}f}"
    return f"{text} ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else text


def fill(page: Path, mark: str, lines: Sequence[str]) -> None:
    """Replace what stands in `page` between `<!-- mark -->` and `<!-- end -->`, where it has such a place."""
    before, found, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    if found:
        page.write_text(before + found + "\n".join(lines) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2])
