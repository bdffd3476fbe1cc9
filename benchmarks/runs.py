"""Runs that a benchmark measures, several at a time, kept in a file from which an interrupted command goes on."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import allot
from allot.errors import UsageError
from allot.run.driver import Progress
from allot.run.store import write
from allot.sources import zoo

Found = dict[str, dict[str, Any]]
SEEDS = (0, 1, 2)
POT = "weight-moments,layerwise,bn,bias"
CHAINS: dict[str, dict[str, Any]] = {  # what a row of a table is called -> arguments of `allot.prune`
    **{name: {"method": name} for name in ("erk", "pot", "fcpts", "unipts")},
    "uniform+pot": {"allocate": "uniform", "repair": POT},
    "uniform+fcpts": {"method": "fcpts", "options": {"fcpts": {"start": "uniform", "distance": 0.0}}},  # learns nothing
}


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


def values(found: Found, net: str, name: str, what: str = "score", scale: float = 100) -> list[float]:
    """What was measured in the runs `NET NAME SEED`, one a seed."""
    return [scale * found[key][what] for seed in SEEDS if (key := f"{net} {name} {seed}") in found]


def dense(net: str) -> str:
    """Top-1 and nll of a net of the zoo as it comes."""
    score = allot.evaluate(zoo.model(net), zoo.data(net, "test"))
    return f"{100 * score.score:.1f} (nll {score.nll:.2f})"


def table(found: Found, rows: Mapping[str, str], nets: Sequence[str]) -> list[str]:
    """Top-1 and nll of every net, the mean of top-1 over nets; rows that are measured on every net."""
    lines = []
    for shown, name in rows.items():
        scores = [values(found, net, name) for net in nets]
        if all(scores):
            nll = [values(found, net, name, "nll", 1) for net in nets]
            cells = [f"{cell(a)} · {cell(b, digits=2)}" for a, b in zip(scores, nll, strict=True)]
            mean = statistics.mean(statistics.mean(some) for some in scores)
            few = min(map(len, scores))
            seeds = "" if few == len(SEEDS) else f" ({few} of {len(SEEDS)} seeds)"
            lines.append(f"| {shown}{seeds} | {' | '.join(cells)} | {mean:.1f} |")
    heading = [f"| top-1 · nll | {' | '.join(nets)} | mean top-1 |", "|---|" + "--:|" * (len(nets) + 1)]
    return heading + lines if lines else []


def chains_of(
    names: Iterable[str], known: Mapping[str, Mapping[str, Any]], default: Mapping[str, Any], more: Iterable[str] = ()
) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `allot.prune`; a name is known, or ALLOCATOR+REPAIRS, or REPAIRS with the default's rest.

    Args:
        more: further ones as NAME=JSON.
    Raises:
        UsageError: text that is no NAME=JSON.

    >>> chains_of(["uniform+admm"], {}, {"allocate": "erk"}, ['x={"method": "pot"}'])
    {'uniform+admm': {'allocate': 'uniform', 'repair': 'admm'}, 'x': {'method': 'pot'}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        allocate, plus, repair = name.rpartition("+")
        found[name] = dict(known.get(name) or {**default, **({"allocate": allocate} if plus else {}), "repair": repair})
    for text in more:
        name, _, given = text.partition("=")
        try:
            found[name] = dict(json.loads(given))
        except ValueError as error:
            raise UsageError(f'--chain {text!r}: NAME={{"repair": "admm"}} is accepted ({error}).') from error
    return found


def counting() -> tuple[dict[str, list[int]], Callable[[Progress], None]]:
    """(stage -> [samples forward, backward], an `on_step` that fills it)."""
    pushed: dict[str, list[int]] = {}

    def count(progress: Progress) -> None:
        some = pushed.setdefault(progress.stage, [0, 0])
        for i, word in enumerate(("forward", "backward")):
            some[i] += int(progress.metrics[word])

    return pushed, count
