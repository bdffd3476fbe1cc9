"""Pictures for docs/methods/dsa.md, drawn by `python -m benchmarks.dsa` from what it measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from allot.methods.dsa import soft_masks
from benchmarks.fcpts_pictures import BLUE, GREY, INK, RED, STYLE, curves, save
from benchmarks.runs import Found

NETS = ("digits-resnet20", "glyph-resnet20", "glyph-mobilenetv2")
SHARES = (70, 50, 30)
SHOWN = {
    "dsa": (BLUE, "-", "o"),
    "sensitivity": (RED, "-", "s"),
    "global": (INK, "--", "^"),
    "uniform": (GREY, "--", "v"),
}


def draw(found: Found, directory: Path) -> None:
    """Write dsa-masks.svg, and dsa-scores.svg and dsa-densities.svg where their runs are there."""
    mpl.use("svg")
    mpl.rcParams |= STYLE
    figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
    _masks(axes)
    save(figure, directory / "dsa-masks.svg")
    if any(f"{net} 30 dsa 0" in found for net in NETS):
        figure, places = plt.subplots(1, len(NETS), figsize=(10, 3.2), sharey=True, layout="constrained")
        for axes, net in zip(places, NETS, strict=True):
            _scores(axes, net, found)
        places[0].set_ylabel("test top-1, %")
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        save(figure, directory / "dsa-scores.svg")
        shown = [net for net in NETS[1:] if f"{net} 30 dsa 0" in found]
        figure, places = plt.subplots(len(shown), 1, figsize=(9, 2.9 * len(shown)), layout="constrained", squeeze=False)
        for axes, net in zip(places[:, 0], shown, strict=True):
            _densities(axes, net, found)
        save(figure, directory / "dsa-densities.svg")


def _masks(axes: Axes) -> None:
    x = (torch.arange(64, dtype=torch.float64) + 0.5) / 64 * 4 - 2
    for beta, colour in ((1, GREY), (4, RED), (16, BLUE), (64, INK)):
        p, _ = soft_masks(x[None], torch.ones(1, 64, dtype=torch.float64), torch.tensor([0.4]).double(), beta)
        axes.plot(range(64), p[0].numpy(), color=colour, linewidth=1.3, label=f"steepness {beta}")
    axes.set_xlabel("channel, least important first")
    axes.set_ylabel("soft mask p")
    axes.set_title("64 channels of which 40 % are to stay: every curve adds up to 25.6", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _scores(axes: Axes, net: str, found: Found) -> None:
    curves(axes, found, net, [(str(share), str(share)) for share in SHARES], SHOWN)
    axes.set_xlabel("MACs left, %")


def _densities(axes: Axes, net: str, found: Found) -> None:
    width = 0.27
    for i, name in enumerate(("uniform", "sensitivity", "dsa")):
        if (key := f"{net} 30 {name} 0") in found:
            densities = found[key]["density"]
            places = [k + (i - 1) * width for k in range(len(densities))]
            axes.bar(places, list(densities.values()), width, color=SHOWN[name][0], label=name)
            axes.set_xticks(range(len(densities)), list(densities), rotation=35, ha="right", fontsize=7)
    axes.set_ylabel("channels kept")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"{net}, 30 % of the MACs", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=3)
