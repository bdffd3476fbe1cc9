"""Runs side by side: which differ in nothing but their seeds, what sets the others apart, and what each came to."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allot.budget.units import meaning
from allot.report.needed import needed
from allot.report.table import speed
from allot.run.recipes import RECIPES
from allot.run.store import flatten_keys

Report = Mapping[str, Any]
Labelled = Sequence[tuple[str, Report]]
Facets = dict[str, str]


@dataclass(frozen=True)
class Same:
    """Runs that differ in nothing but their seeds.

    Attributes:
        name: of the series: what sets it apart from the others shown.
        series: its number.
        budget: as it was asked for.
        runs: their reports.
    """

    name: str
    series: int
    budget: str
    runs: tuple[Report, ...]

    @property
    def metric(self) -> str | None:
        """What they were scored by; None: they were not."""
        return _metric(self.runs[0])

    @property
    def scores(self) -> list[float]:
        """One a seed: of runs with the same seed their mean. What is not finite is left out."""
        by_seed: dict[Any, list[float]] = {}
        for run in self.runs:
            if run["scores"] and math.isfinite(run["scores"]["sparse"]):
                by_seed.setdefault(run["seed"], []).append(run["scores"]["sparse"])
        return [statistics.mean(some) for some in by_seed.values()]

    @property
    def score(self) -> float | None:
        """The mean over seeds."""
        return statistics.mean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds, where there are several."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def mean(self, of: Callable[[Report], float | None]) -> float | None:
        """The mean of what some of them tell."""
        found = [value for run in self.runs if (value := of(run)) is not None]
        return statistics.mean(found) if found else None

    @property
    def verdict(self) -> str | None:
        """Whether they were measured to be "faster" or "slower": only where all agree; None: none was timed."""
        found = {word for run in self.runs if (word := speed(run)["verdict"])}
        return None if not found else found.pop() if len(found) == 1 else "no faster"

    @property
    def said(self) -> str:
        """Name, budget and score, in words."""
        if self.score is None:
            return f"{self.name}, {self.budget}: no score"
        seeds = f" ± {self.spread:.4f}, {len(self.scores)} seeds" if self.spread is not None else ""
        return f"{self.name}, {self.budget}: {self.score:.4f}{seeds}"

    @property
    def most(self) -> tuple[str, float] | None:
        """The layer, or group of channels, that keeps most of what it had, and how much, on average."""
        densities: dict[str, list[float]] = {}
        for run in self.runs:
            for row in run["groups"] or run["layers"]:
                densities.setdefault(row["name"], []).append(row["density"])
        means = {name: statistics.mean(some) for name, some in densities.items()}
        return max(means.items(), key=lambda item: (item[1], item[0])) if means else None


def alike(reports: Labelled) -> list[Same]:
    """The runs by what they share; series, and budgets in each, in the order in which they come first.

    Raises:
        UsageError: a report that lacks something.
    """
    facets, asked = [], []
    for label, report in reports:
        with needed(label):
            facets.append(facets_of(report))
            asked.append(meaning({row["kind"]: row["asked"] for row in report["budget"]}))
    series = list({json.dumps(some, sort_keys=True): some for some in facets}.values())
    named = names(series)
    found: dict[Any, list[Report]] = {}
    for some, budget, (_, report) in zip(facets, asked, reports, strict=True):
        found.setdefault((series.index(some), budget), []).append(report)
    ordered = sorted(found.items(), key=lambda item: item[0][0])  # stable: budgets stay as they came
    return [Same(named[i], i, budget_of(runs[0]), tuple(runs)) for (i, _), runs in ordered]


def once(reports: Labelled) -> list[tuple[str, Report]]:
    """Without a run that is there already, under this name or, as a copy, under another."""
    found: dict[str, tuple[str, Report]] = {}
    labels: set[str] = set()
    for label, report in reports:
        if label not in labels:
            found.setdefault(json.dumps(report, sort_keys=True), (label, report))
        labels.add(label)
    return list(found.values())


def budget_of(report: Report) -> str:
    """As it was asked for."""
    return ", ".join(f"{row['kind']}={row['asked']}" for row in report["budget"])


def macs_left(report: Report) -> float | None:
    """As a share of the dense model's."""
    macs = report["macs"]
    return macs["sparse"] / macs["dense"] if macs and macs["dense"] else None


def times(report: Report) -> float | None:
    """How many times as fast as dense it was measured."""
    found: float | None = speed(report)["speedup"]
    return found


_CHAIN = ("allocate", "score", "pattern", "repair")
_DEEP = ("hyperparameters", "digest", "dense score")  # said only where nothing else tells two series apart


def facets_of(report: Report) -> Facets:
    """Everything that decided a run but budget and seed, by name, as JSON; what was left alone is not there."""
    scores = report["scores"] or {}
    found: dict[str, Any] = {key: str(report[key]) for key in ("model", "method", "allocate", "score", "pattern")}
    found |= {"repair": [str(name) for name in report["repair"]], **flatten_keys(report.get("settings", {}))}
    found |= {"metric": scores.get("metric"), "test samples": scores.get("samples"), "dense score": scores.get("dense")}
    return {key: json.dumps(value, sort_keys=True) for key, value in found.items() if value not in (None, {}, [], "")}


def names(series: Sequence[Facets]) -> list[str]:
    """What to call each: its method, and whatever else sets it apart from the others."""

    def apart(keys: Sequence[str]) -> int:
        return len({tuple(some.get(key) for key in ("method", *keys)) for some in series})

    every = [key for key in dict.fromkeys(key for some in series for key in some) if key != "method"]
    differing = [key for key in every if len({some.get(key) for some in series}) > 1]
    news = [key for key in differing if key.partition(".")[0] not in _DEEP and len({*_news(series, key)}) > 1]
    shown = ["model"] if "model" in news else news  # of several models much else differs: no more than tells them apart
    for key in differing:
        if apart([*shown, key]) > apart(shown):
            shown.append(key)
    return [", ".join(_words(some, shown)) for some in series]


def _news(series: Sequence[Facets], key: str) -> Iterator[str | None]:
    """The values of a facet that are news: a recipe brings its own parts, and only parts of a chain have options."""
    for facets in series:
        value, method = facets.get(key, "[]" if key == "repair" else None), json.loads(facets["method"])
        if key in _CHAIN and method in RECIPES:
            own = getattr(RECIPES[method], key)
            usual = json.dumps(list(own) if isinstance(own, tuple) else own)
            yield None if value == usual else value
        elif key == "allocate" and value == facets["method"]:
            yield None
        elif key.startswith("options.") and key.split(".")[1] not in _parts(facets):
            continue
        else:
            yield value


def _parts(facets: Facets) -> set[str]:
    return {*(json.loads(facets[key]) for key in ("method", "allocate")), *json.loads(facets.get("repair", "[]"))}


def _words(facets: Facets, shown: Sequence[str]) -> Iterator[str]:
    model = f"{json.loads(facets['model'])}: " if "model" in shown else ""
    yield model + json.loads(facets["method"])
    for key in shown:
        if key == "repair":
            yield f"repair {'+'.join(json.loads(facets.get(key, '[]'))) or 'none'}"
        elif key in facets and key != "model":
            value = json.loads(facets[key])
            said = value if isinstance(value, str) else json.dumps(value)
            yield f"{key.removeprefix('options.').removeprefix('hyperparameters.')} {said}"


def _metric(report: Report) -> str | None:
    return report["scores"]["metric"] if report["scores"] else None
