"""The page of `allot advise`: what pays on this machine, the commands for it, and the measured curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allot.report.charts import Line, coloured_lines, legend, lines
from allot.report.frame import template

Report = Mapping[str, Any]

SMALL = 0.01  # of the MACs, below which a layer is no matter for the time of the net


def advice_page(advice: Report) -> str:
    """What pays on this machine, with the measured and predicted curves."""
    channels = Line("channels", [(100 * row["macs"], row["faster"]) for row in advice["channels"]])
    net = Line("net", [(float(d), speedup) for d, speedup in (advice["net"] or {"faster": {}})["faster"].items()])
    large = [row for row in advice["linear"] if row["share"] >= SMALL]
    layers = {row["layer"]: [(float(d), speedup) for d, speedup in row["faster"].items()] for row in large}
    title = f"Channels ({advice['pattern']}, {advice['runtime']}), predicted for the same density in every layer"
    curves = [
        (title, [channels], "MACs left, %"),
        ("Sparse matrices, PyTorch, predicted for the whole net", [net], "density"),
        ("Linear layers as sparse matrices, PyTorch, measured", coloured_lines(layers), "density"),
    ]
    charts = [
        (title, lines(drawn, x, "times as fast", limit=1.0, ends=False), legend(drawn) if len(drawn) > 1 else "")
        for title, drawn, x in curves
        if drawn and len(drawn[0].points) > 1 and any(speedup != 1 for line in drawn for _, speedup in line.points)
    ]
    return template("advice.html").render(advice=advice, charts=charts, large=bool(large), small=SMALL)
