"""What each layer, or group of channels, keeps, what one weight or channel more costs, and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from allot.budget.units import unit
from allot.report.charts import histogram
from allot.report.layers import macs_kept

Report = Mapping[str, Any]
Row = dict[str, Any]

# what an allocator reports of every layer: the scale that values are divided by, and a sentence about them
_SIGNALS: dict[str, tuple[Any, str]] = {
    "gain": (
        max,
        "Gain: by how much one {unit} more in a layer would lower the loss, as a share of the largest gain of all "
        "layers ({scale} a {unit}). Equal gains mean that no weight would be worth more in another layer.",
    ),
    "sensitivity": (
        statistics.median,
        "Sensitivity: how much the loss depends, for each {unit}, on the weights that would be removed next; 1 is the "
        "median of all layers. {method} moves weights to layers of high sensitivity until all layers have the same.",
    ),
}


def kept_rows(report: Report) -> list[Row]:
    """Layers, or groups of channels, as report.json has them, with gain, sensitivity, MACs left and histogram.

    `gain` is relative to the largest of all, `sensitivity` to the median; null where the allocator reports none.
    """
    signals = {key: _relative(report, key)[0] for key in _SIGNALS}
    return [
        {
            **row,
            **{key: values.get(row["name"]) for key, values in signals.items()},
            "macs_left": macs_kept(row),
            "histogram": _histogram(report, row["name"]),
        }
        for row in report["groups"] or report["layers"]
    ]


def explanation(report: Report) -> dict[str, Any]:
    """The words of the table of these rows: `{item, unit, one_price, sentences}`.

    `item` is "weight" or "channel", `unit` what a price counts, `one_price` whether one item more costs the same
    everywhere; the sentences say how densities were decided and what prices, gains and sensitivities mean.
    """
    item = "channel" if report["groups"] else "weight"
    kind = report.get("priced", report["budget"][0]["kind"])
    prices = sorted((row["price"], row["name"]) for row in report["groups"] or report["layers"])
    one_price = not prices or prices[0][0] == prices[-1][0]
    allocator, how = report["allocate"], report.get("how", "")
    sentences = [f"How {allocator} allocates the budget: {how}" if how else f"The budget was allocated by {allocator}."]
    if prices:
        (low, cheap), (high, dear) = ((_amount(price, kind), name) for price, name in (prices[0], prices[-1]))
        costs = f"{low} in {cheap}, the cheapest, and {high} in {dear}, the dearest."
        sentences.append(f"One {item} more would cost {f'the same everywhere ({low}).' if one_price else costs}")
    for key, (_, sentence) in _SIGNALS.items():
        values, scale = _relative(report, key)
        if values:
            sentences.append(sentence.format(unit=_singular(kind), scale=f"{scale:.1e}", method=allocator))
    return {"item": item, "unit": unit(kind), "one_price": one_price, "sentences": sentences}


def number(value: float) -> str:
    """With three digits, or whole.

    >>> number(1234.5), number(0.012345)
    ('1,234', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _amount(price: float, kind: str) -> str:
    return f"{number(price)} {_singular(kind) if price == 1 else unit(kind)}"


def _singular(kind: str) -> str:
    return unit(kind).removesuffix("s") if kind != "latency" else "ns"


def _relative(report: Report, key: str) -> tuple[dict[str, float], float]:
    """(layer -> the signal that the allocator reports over the scale of all layers, the scale)."""
    signal = report["diagnostics"].get(report["allocate"], {}).get(key) or {}
    values = {name: value for name, value in signal.items() if math.isfinite(value)}
    scale = _SIGNALS[key][0](map(abs, values.values())) if values else 0.0
    return ({name: value / scale for name, value in values.items()}, scale) if scale else ({}, 0.0)


def _histogram(report: Report, name: str) -> str:
    bins = report["histograms"].get(name) or report["histograms"].get(f"{name}.weight")
    return histogram(bins["edges"], bins["dense"], bins["sparse"], f"weight of {name}") if bins else ""
