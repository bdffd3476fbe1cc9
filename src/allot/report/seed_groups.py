"""Runs side by side: which of them differ only in their seeds, the names of the series, and the figures of each."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2

from allot.budget.units import meaning
from allot.errors import UsageError
from allot.network.trees import flatten_keys
from allot.report.table import speed
from allot.run.recipes import RECIPES

Report = Mapping[str, Any]
Labelled = Sequence[tuple[str, Report]]
Choices = dict[str, str]


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seeds.

    Attributes:
        name: of the series: its method, and the choices that set it apart from the other series.
        series: the number of the series.
        budget: as the user wrote it.
        runs: their reports.
    """

    name: str
    series: int
    budget: str
    runs: tuple[Report, ...]

    @property
    def metric(self) -> str | None:
        """The metric of the scores; None where the runs were not scored."""
        scores = self.runs[0]["scores"]
        return scores["metric"] if scores else None

    @property
    def scores(self) -> list[float]:
        """One score a seed: of runs with the same seed their mean. Scores that are not finite are left out."""
        by_seed: dict[Any, list[float]] = {}
        for run in self.runs:
            if run["scores"] and math.isfinite(run["scores"]["sparse"]):
                by_seed.setdefault(run["seed"], []).append(run["scores"]["sparse"])
        return [statistics.mean(scores) for scores in by_seed.values()]

    @property
    def score(self) -> float | None:
        """The mean over seeds."""
        return statistics.mean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds, where there are several."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def mean(self, figure: Callable[[Report], float | None]) -> float | None:
        """The mean of a figure over the runs that have it."""
        values = [value for run in self.runs if (value := figure(run)) is not None]
        return statistics.mean(values) if values else None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as dense the runs were measured, on average."""
        return self.mean(lambda run: speed(run)["speedup"])

    @property
    def verdict(self) -> str | None:
        """Whether they were measured to be "faster" or "slower": only where all agree; None: none was timed."""
        verdicts = {verdict for run in self.runs if (verdict := speed(run)["verdict"])}
        return "no faster" if len(verdicts) > 1 else next(iter(verdicts), None)

    @property
    def caption(self) -> str:
        """Name, budget and score, in words."""
        if self.score is None:
            return f"{self.name}, {self.budget}: no score"
        seeds = f" ± {self.spread:.4f}, {len(self.scores)} seeds" if self.spread is not None else ""
        return f"{self.name}, {self.budget}: {self.score:.4f}{seeds}"

    @property
    def densest(self) -> tuple[str, float] | None:
        """The layer, or group of channels, with the highest density, and this density, on average."""
        densities: dict[str, list[float]] = {}
        for run in self.runs:
            for row in run["groups"] or run["layers"]:
                densities.setdefault(row["name"], []).append(row["density"])
        means = {name: statistics.mean(values) for name, values in densities.items()}
        return max(means.items(), key=lambda item: (item[1], item[0])) if means else None


def seed_groups(reports: Labelled) -> list[SeedGroup]:
    """The runs in groups; series, and the budgets of each, in the order in which they come first.

    Raises:
        UsageError: a report that lacks something.
    """
    choices, budgets = [], []
    for label, report in reports:
        with reading_report(label):
            choices.append(choices_of(report))
            budgets.append(meaning({row["kind"]: row["asked"] for row in report["budget"]}))
    series = list({json.dumps(chosen, sort_keys=True): chosen for chosen in choices}.values())
    names = series_names(series)
    groups: dict[Any, list[Report]] = {}
    for chosen, budget, (_, report) in zip(choices, budgets, reports, strict=True):
        groups.setdefault((series.index(chosen), budget), []).append(report)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])  # stable: budgets stay as they came
    return [SeedGroup(names[i], i, budget_of(runs[0]), tuple(runs)) for (i, _), runs in ordered]


def without_copies(reports: Labelled) -> list[tuple[str, Report]]:
    """The reports, each once: a run may be given twice, under one label or, as a copy, under another."""
    by_label: dict[str, Report] = {}
    for label, report in reports:
        by_label.setdefault(label, report)
    by_content: dict[str, tuple[str, Report]] = {}
    for label, report in by_label.items():
        by_content.setdefault(json.dumps(report, sort_keys=True), (label, report))
    return list(by_content.values())


@contextmanager
def reading_report(run: object) -> Iterator[None]:
    """While open, a value that report.json of `run` lacks, or holds in another form, is one clear error.

    Raises:
        UsageError: there is such a value.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.UndefinedError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"report.json of {run} does not hold what a report needs ({what}).") from error


def budget_of(report: Report) -> str:
    """The budget as the user wrote it."""
    return ", ".join(f"{row['kind']}={row['asked']}" for row in report["budget"])


def macs_left(report: Report) -> float | None:
    """The MACs of the sparse model as a share of the dense model's."""
    macs = report["macs"]
    return macs["sparse"] / macs["dense"] if macs and macs["dense"] else None


_CHAIN = ("allocate", "score", "pattern", "repair")
_LAST = ("hyperparameters", "digest", "dense score")  # shown only where no other choice tells two series apart


def choices_of(report: Report) -> Choices:
    """Everything that decided a run except budget and seed, by name, as JSON; without what the user did not set."""
    scores = report["scores"] or {}
    values: dict[str, Any] = {key: str(report[key]) for key in ("model", "method", "allocate", "score", "pattern")}
    values |= {"repair": [str(name) for name in report["repair"]], **flatten_keys(report.get("settings", {}))}
    values |= {"metric": scores.get("metric"), "test samples": scores.get("samples")}
    values["dense score"] = scores.get("dense")
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items() if value not in (None, {}, [], "")}


def series_names(series: Sequence[Choices]) -> list[str]:
    """The name of each series: its method, and the choices that set it apart from the others."""

    def distinct(keys: Sequence[str]) -> int:
        return len({tuple(choices.get(key) for key in ("method", *keys)) for choices in series})

    keys = dict.fromkeys(key for choices in series for key in choices if key != "method")
    differing = [key for key in keys if len({choices.get(key) for choices in series}) > 1]
    telling = [key for key in differing if key.partition(".")[0] not in _LAST and len({*_unusual(series, key)}) > 1]
    shown = ["model"] if "model" in telling else telling  # several models differ in much else: the model is enough
    for key in differing:
        if distinct([*shown, key]) > distinct(shown):
            shown.append(key)
    return [", ".join(_name_parts(choices, shown)) for choices in series]


def _unusual(series: Sequence[Choices], key: str) -> Iterator[str | None]:
    """The values of a choice, None for a usual one: a recipe brings its parts, only parts of a chain have options."""
    for choices in series:
        value, method = choices.get(key, "[]" if key == "repair" else None), json.loads(choices["method"])
        if key in _CHAIN and method in RECIPES:
            yield None if value == json.dumps(getattr(RECIPES[method], key)) else value
        elif key == "allocate" and value == choices["method"]:
            yield None
        elif not key.startswith("options.") or key.split(".")[1] in _parts_of_chain(choices):
            yield value


def _parts_of_chain(choices: Choices) -> set[str]:
    return {*(json.loads(choices[key]) for key in ("method", "allocate")), *json.loads(choices.get("repair", "[]"))}


def _is_usual_repair(choices: Choices) -> bool:
    recipe = RECIPES.get(json.loads(choices["method"]))
    return recipe is not None and json.loads(choices.get("repair", "[]")) == list(recipe.repair)


def _name_parts(choices: Choices, shown: Sequence[str]) -> Iterator[str]:
    model = f"{json.loads(choices['model'])}: " if "model" in shown else ""
    yield model + json.loads(choices["method"])
    for key in shown:
        if key == "repair":
            if _is_usual_repair(choices):
                continue
            yield f"repair {'+'.join(json.loads(choices.get(key, '[]'))) or 'none'}"
        elif key in choices and key != "model":
            value = json.loads(choices[key])
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{key.removeprefix('options.').removeprefix('hyperparameters.')} {text}"
