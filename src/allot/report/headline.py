"""The headline of a run: what it removed and what that cost, in one sentence, from the data of report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.text import Text

from allot.report.fidelity import fidelity
from allot.report.scores import is_far_off, is_share, lower_is_better
from allot.report.table import speed

Report = Mapping[str, Any]
Grade = Literal["close", "loss", "far", ""]

LOSS = 0.02  # points of a share, or the share of any other score, from which a loss is named in words
_NAMES = {"top1": "top-1"}
_SPEEDS = {
    "faster": "{:.2g}x as fast here",
    "slower": "slower here ({:.2g}x as fast)",
    "unclear": "speed unclear here",
}
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


@dataclass(frozen=True)
class Headline:
    """The clauses of the sentence; one whose figure was not measured is empty.

    Attributes:
        warning: that the model looks untrained, if it does.
        removed: share of the weights, and of the MACs where these were limited.
        score: dense and sparse on held-out data; a loss from `LOSS` on is named.
        fidelity: how near the outputs are to the dense model's, on inputs that nothing trained on.
        bytes: of the dense file and of the small one.
        speed: beside the dense model, as measured here.
        grade: of the score: "close", a "loss" from `LOSS` on, or "far" from dense; empty where it was not scored.
    """

    warning: str
    removed: str
    score: str
    fidelity: str
    bytes: str
    speed: str
    grade: Grade

    @classmethod
    def of(cls, report: Report) -> Headline:
        """The headline of a report, which is the content of report.json."""
        score, grade = _score(report.get("scores"))
        warning = "the model looks untrained" if report.get("untrained") else ""
        return cls(warning, _removed(report), score, _fidelity(report), _bytes(report["bytes"]), _speed(report), grade)

    def __str__(self) -> str:
        clauses = (self.warning, self.removed, self.score, self.fidelity, self.bytes, self.speed)
        return "; ".join(clause for clause in clauses if clause)


def headline(report: Report) -> str:
    """One sentence about a run, with what was measured and nothing else; a loss is named.

    Args:
        report: the content of report.json.

    >>> report = {"sparsity": 0.9, "budget": [], "latency": None, "exports": [], "scores": None}
    >>> headline({**report, "bytes": {"dense": 1_107_816, "file": 160_200}})
    '90 % of weights removed; 1.1 MB -> 0.16 MB'
    """
    return str(Headline.of(report))


def headline_line(report: Report) -> Text:
    """The headline for a terminal: yellow where the score lost something, red where it is far from dense."""
    found = Headline.of(report)
    return Text(str(found), style={"loss": "bold yellow", "far": "bold red"}.get(found.grade, "bold"))


def _removed(report: Report) -> str:
    whole, macs = report.get("whole") or {}, report.get("macs")
    clauses = [_removed_of("weights", report["sparsity"], whole.get("weights"))]
    if macs and any(row["kind"] == "macs" for row in report["budget"]):
        clauses.insert(0, _removed_of("MACs", 1 - macs["sparse"] / macs["dense"], whole.get("macs")))
    return f"{' and '.join(clauses)} removed"


def _removed_of(name: str, in_scope: float, whole: Mapping[str, int] | None) -> str:
    """The share of what is in scope; of the whole model too, where that is another whole number of percent."""
    of_model = 1 - whole["sparse"] / whole["dense"] if whole and whole["dense"] else in_scope
    if round(100 * of_model) == round(100 * in_scope):
        return f"{_percent(in_scope)} of {name}"
    return f"{_percent(in_scope)} of {name} in scope ({_percent(of_model)} of all {name})"


def _percent(share: float) -> str:
    """A share with as many decimals as keep what is nearly nothing, or nearly all, from being called so.

    >>> _percent(0.9), _percent(0.8988), _percent(0.99996), _percent(1.0)
    ('90 %', '89.9 %', '99.996 %', '100 %')
    """
    digits = 1
    while digits < 6 and round(100 * share, digits) in (0, 100) and share not in (0, 1):
        digits += 1
    return f"{round(100 * share, digits):.{digits}f}".rstrip("0").rstrip(".") + " %"


def _score(scores: Mapping[str, Any] | None) -> tuple[str, Grade]:
    if scores is None:
        return "", ""
    name, dense, sparse = _NAMES.get(scores["metric"], scores["metric"]), scores["dense"], scores["sparse"]
    lower, note = lower_is_better(scores), ""
    grade: Grade = "far" if is_far_off(scores) else "close"
    if perplexity := scores.get("perplexity"):
        name, dense, sparse, lower = "perplexity", perplexity["dense"], perplexity["sparse"], True
        grade = "far" if is_far_off({"metric": name, **perplexity, "lower_is_better": [name]}) else "close"
    share = is_share(scores) and not perplexity
    loss = (sparse - dense if lower else dense - sparse) / (1 if share else abs(dense) or 1)
    if not math.isfinite(loss):
        note = ", not finite"
    elif loss >= LOSS:
        grade = "loss" if grade == "close" else grade
        note = f", {100 * loss:.1f} points lost" if share else f", {_percent(loss)} worse"
    figures = (f"{100 * value:.1f}" if share else f"{value:,.4g}" for value in (dense, sparse))
    text = f"{name} {' -> '.join(figures)} on held-out data"
    return f"{text}{' (lower is better)' if lower and not perplexity else ''}{note}", grade


def _fidelity(report: Report) -> str:
    close = fidelity(report)
    if close is None:
        return ""
    if close.value is None:
        return "outputs are not finite"
    if close.agreement:
        return close.agreement.replace("agrees on", "agrees with the dense net on")
    return f"{close.distance} from the dense net"


def _bytes(size: Mapping[str, int | None]) -> str:
    dense, small = size["dense"], size["file"]
    if not dense or not small:
        return ""
    unit, factor = next((unit, factor) for unit, factor in _UNITS if dense >= factor)
    figures = (f"{value / factor:{'.0f' if value >= 10 * factor else '.2g'}} {unit}" for value in (dense, small))
    return f"{' -> '.join(figures)}{'' if small < dense else ', not smaller'}"


def _speed(report: Report) -> str:
    measured = speed(report)
    if measured["verdict"] is None:
        return ""
    return _SPEEDS.get(measured["verdict"], "not faster here").format(measured["speedup"] or 0.0)
