"""The README's first picture, what goes in and what comes out: `python -m benchmarks.explained RUN`.

The figures are those of the run's report.json: every bar is a layer, as wide as its share of the weights (by the square
root, so that small ones can be seen), filled as far as the layer keeps its weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1010, 320
BARS = (310, 670)  # from left to right
TOP, BOTTOM = 84, 244
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  text { font: 15px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 17px; }
  .quiet { fill: #59636e; font-size: 14px; }
  .large { font-weight: 600; font-size: 24px; }
  .dense { fill: #e6eaef; }
  .kept { fill: #0f766e; }
  .arrow { stroke: #59636e; stroke-width: 2; fill: none; marker-end: url(#head); }
  #head path { fill: #59636e; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d; }
    text { fill: #f0f6fc; }
    .quiet { fill: #9198a1; }
    .dense { fill: #2a313c; }
    .kept { fill: #2dd4bf; }
    .arrow { stroke: #9198a1; }
    #head path { fill: #9198a1; }
  }
"""


def lines_of(x: int, rows: Sequence[tuple[str, str]]) -> str:
    """Lines of text below each other, each with its class."""
    y, parts = TOP - 30, []
    for kind, text in rows:
        y += 8 if kind == "large" else 0
        parts.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>')
        y += 32 if kind == "large" else 26
    return "\n".join(parts)


def bars(layers: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each layer, in network order."""
    weights = [math.sqrt(layer["total"]) for layer in layers]
    unit = (BARS[1] - BARS[0]) / sum(weights)
    x, height, parts = float(BARS[0]), BOTTOM - TOP, []
    for layer, weight in zip(layers, weights, strict=True):
        width, kept = max(1.0, unit * weight - 2), height * layer["kept"] / layer["total"]
        about = f"{layer['name']}: keeps {layer['kept']:,} of {layer['total']:,}"
        parts.append(
            f'<g><title>{escape(about)}</title><rect class="dense" x="{x:.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{height}"/><rect class="kept" x="{x:.1f}" y="{BOTTOM - kept:.1f}" width="{width:.1f}" '
            f'height="{kept:.1f}"/></g>'
        )
        x += unit * weight
    return "\n".join(parts)


def drawing(report: Mapping[str, Any]) -> str:
    """The picture of a run whose model was scored."""
    scores, size, calibration = report["scores"], report["bytes"], report["settings"]["samples"]
    removed = f"{100 * report['sparsity']:.0f} %"
    before = [
        ("title", "You have"),
        ("quiet", "a trained model"),
        ("large", f"top-1 {100 * scores['dense']:.1f}"),
        ("quiet", f"{report['total']:,} weights, {size['dense'] / 1e6:.2f} MB"),
        ("quiet", f"{calibration} inputs without labels"),
        ("quiet", f"a budget: {removed} of the weights gone"),
    ]
    after = [
        ("title", "You get"),
        ("quiet", "a sparse model"),
        ("large", f"top-1 {100 * scores['sparse']:.1f}"),
        ("quiet", f"{report['kept']:,} weights, {size['file'] / 1e6:.2f} MB"),
        ("quiet", "the budget met exactly,"),
        ("quiet", "in files that were opened again"),
    ]
    label = "allot shares the budget out over the layers, and repairs what is left"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">
<style>{STYLE}</style>
<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">
<path d="M0,0 L8,4 L0,8 z"/></marker></defs>
<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10"/>
{lines_of(28, before)}
<path class="arrow" d="M262,164 H294"/>
<text class="title" x="{BARS[0]}" y="{TOP - 30}">allot shares the budget out</text>
{bars(report["layers"])}
<text class="quiet" x="{BARS[0]}" y="{BOTTOM + 24}">every bar a layer, filled as far as it keeps its weights,</text>
<text class="quiet" x="{BARS[0]}" y="{BOTTOM + 44}">which are then refitted to answer like the dense model</text>
<path class="arrow" d="M686,164 H718"/>
{lines_of(750, after)}
</svg>
"""


def main() -> None:
    """Draw the picture of a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explained", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a model that was scored, by --test for example")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/explained.svg"))
    asked = parser.parse_args()
    asked.out.write_text(drawing(json.loads((asked.run / "report.json").read_text())))


if __name__ == "__main__":
    main()
