"""What each layer, or group of channels, keeps, what that costs, and why it is so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from allot.budget.units import unit
from allot.report.charts import histogram

Report = Mapping[str, Any]
Row = dict[str, Any]


def kept_rows(report: Report) -> list[Row]:
    """Layers, or groups of channels, as report.json has them, and what is known of why they keep what they keep.

    `gain` is relative to the largest of all, `sensitivity` to their median; null where the allocator tells none.
    """
    gain, _ = _told(report, "gain", _largest)
    sensitivity, _ = _told(report, "sensitivity", _middle)
    found = []
    for row in report["groups"] or report["layers"]:
        name = row["name"]
        more = {"gain": gain.get(name), "sensitivity": sensitivity.get(name), "macs_left": _macs_left(row)}
        found.append({**row, **more, "histogram": _histogram(report, name)})
    return found


def layer_rows(report: Report) -> list[Row]:
    """The layers behind groups of channels; empty where the layers themselves were pruned."""
    return [{**row, "macs_left": _macs_left(row)} for row in report["layers"]] if report["groups"] else []


def words_of(report: Report) -> dict[str, Any]:
    """What a table of these rows says.

    `{one, unit, alike, sentences}`: what is kept one by one ("weight" or "channel"), what a price counts, whether one
    more costs the same everywhere, and sentences that say how it was decided and what prices mean.
    """
    one = "channel" if report["groups"] else "weight"
    kind = report.get("priced", report["budget"][0]["kind"])
    rows = report["groups"] or report["layers"]
    prices = sorted((row["price"], row["name"]) for row in rows)
    alike = not prices or prices[0][0] == prices[-1][0]
    said = [_how(report), _prices(prices, one, kind, alike=alike)]
    for key, of, word in (("gain", _largest, _GAIN), ("sensitivity", _middle, _SENSITIVITY)):
        values, scale = _told(report, key, of)
        if values:
            said.append(word.format(unit=_single(kind), scale=f"{scale:.1e}", method=report["allocate"]))
    return {"one": one, "unit": unit(kind), "alike": alike, "sentences": [sentence for sentence in said if sentence]}


_GAIN = (
    "Gain: by how much the loss would fall for one {unit} more there, as a share of the largest of all layers ({scale} "
    "a {unit}); where nothing is left to win by moving weights about, all are equal."
)
_SENSITIVITY = (
    "Sensitivity: how much the loss depends on what lies at the edge of being removed there, for each {unit}; 1 is the "
    "middle one of all layers. {method} moves weights to where it is high until it is the same everywhere."
)


def _how(report: Report) -> str:
    how = report.get("how", "")
    return f"How {report['allocate']} shares the budget out: {how}" if how else f"Shares: {report['allocate']}."


def _prices(prices: Sequence[tuple[float, str]], one: str, kind: str, *, alike: bool) -> str:
    if not prices:
        return ""
    (low, cheap), (high, dear) = prices[0], prices[-1]
    if alike:
        return f"One {one} more would cost the same everywhere ({_amount(low, kind)}): none is dearer than another."
    cheapest, dearest = (
        f"{_amount(low, kind)} in {cheap}, the cheapest",
        f"{_amount(high, kind)} in {dear}, the dearest",
    )
    return f"At the end, one {one} more would cost {cheapest}, and {dearest}."


def number(value: float) -> str:
    """With three digits, or whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _amount(price: float, kind: str) -> str:
    return f"{number(price)} {_single(kind) if price == 1 else unit(kind)}"


def _single(kind: str) -> str:
    return unit(kind).removesuffix("s") if kind != "latency" else "ns"


def _largest(values: Sequence[float]) -> float:
    return max(map(abs, values))


def _middle(values: Sequence[float]) -> float:
    return statistics.median(map(abs, values))


def _told(report: Report, key: str, of: Any) -> tuple[dict[str, float], float]:
    """(what the allocator tells of each layer over `of` all of them, that itself)."""
    told = report["diagnostics"].get(report["allocate"], {})
    values = {name: value for name, value in (told.get(key) or {}).items() if math.isfinite(value)}
    scale = of(list(values.values())) if values else 0.0
    return ({name: value / scale for name, value in values.items()}, scale) if scale else ({}, 0.0)


def _macs_left(row: Report) -> int | None:
    macs = row.get("macs")
    return None if macs is None else round(macs * row["kept"] / row["total"])


def _histogram(report: Report, name: str) -> str:
    bins = report["histograms"].get(name) or report["histograms"].get(f"{name}.weight")
    return histogram(bins["edges"], bins["dense"], bins["sparse"], f"weight of {name}") if bins else ""
