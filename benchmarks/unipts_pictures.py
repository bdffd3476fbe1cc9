"""Pictures for docs/methods/unipts.md and pot.md, drawn by `python -m benchmarks.unipts` from what it measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from allot.sources.synthetic import Fractals
from benchmarks.fcpts_pictures import BLUE, GREY, INK, RED, STYLE, curves, save
from benchmarks.runs import Found

NETS = ("digits-resnet20", "glyph-resnet20", "glyph-mobilenetv2", "glyph-vit")
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
SHOWN = {
    "unipts": (BLUE, "-", "o"),
    "fcpts": (RED, "-", "s"),
    "erk + unipts": (INK, "--", "^"),
    "uniform + unipts": (GREY, "--", "v"),
    "pot": (INK, ":", "x"),
}


def draw(found: Found, directory: Path) -> None:
    """Write fractals.png, and unipts-scores.svg and unipts-ranking.svg where their runs are there."""
    images = Fractals((3, 64, 64))
    grid = torch.cat([torch.cat([images[6 * i + j][0] for j in range(6)], 2) for i in range(2)], 1)
    plt.imsave(directory / "fractals.png", ((grid + 2) / 4).clamp(0, 1).movedim(0, -1).numpy())
    mpl.use("svg")
    mpl.rcParams |= STYLE
    if any(f"{net} 0.95 unipts 0" in found for net in NETS):
        figure, places = plt.subplots(1, len(NETS), figsize=(11, 3.4), sharey=True, layout="constrained")
        for axes, net in zip(places, NETS, strict=True):
            _scores(axes, net, found)
        places[0].set_ylabel("test top-1, %")
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        save(figure, directory / "unipts-scores.svg")
    ranked = [net for net in NETS if f"{net} 0.98 rank" in found]
    if ranked:
        figure, table = plt.subplots(
            len(ranked), 2, figsize=(9, 3.1 * len(ranked)), layout="constrained", squeeze=False
        )
        for row, net in zip(table, ranked, strict=True):
            for axes, fitness in zip(row, ("one-shot", "short repair"), strict=True):
                _ranking(axes, net, fitness, found)
        save(figure, directory / "unipts-ranking.svg")


def _scores(axes: Axes, net: str, found: Found) -> None:
    curves(axes, found, net, [(f"{100 * sparsity:.0f}", str(sparsity)) for sparsity in SPARSITIES], SHOWN)
    axes.set_xlabel("weights gone, %")
    axes.set_ylim(0, 100)


def _ranking(axes: Axes, net: str, fitness: str, found: Found) -> None:
    told = found[f"{net} 0.98 rank"]
    best = min(told, key=lambda name: told[name][fitness])
    for name, row in told.items():
        chosen = name == best
        axes.plot(row[fitness], 100 * row["score"], "o", color=RED if chosen else INK, markersize=5)
        axes.annotate(name, (row[fitness], 100 * row["score"]), xytext=(5, 2), textcoords="offset points", fontsize=7)
    axes.margins(x=0.2)
    axes.set_title(f"{net}: {fitness}", fontsize=9)
    axes.set_xlabel("loss on held-out calibration samples (red: the lowest)")
    axes.set_ylabel("test top-1 after the repair, %")
