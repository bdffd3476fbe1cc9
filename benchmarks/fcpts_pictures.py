"""Pictures for docs/methods/fcpts.md, drawn by `python -m benchmarks.fcpts` from what it measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.runs import Found, values

INK, GREY, BLUE, RED = "#1c2733", "#b6bfc9", "#1764ab", "#c4452f"
STYLE = {
    "svg.hashsalt": "allot",  # the same ids, and so the same file, every time
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
MARKED = 5  # layers with a colour and a name of their own


def draw(found: Found, nets: Sequence[str], ablation: Sequence[str], seeds: Sequence[int], directory: Path) -> None:
    """Write fcpts-densities.svg and fcpts-ablation.svg, each if its runs are there."""
    mpl.use("svg")
    mpl.rcParams |= STYLE
    shown = {
        "glyph-resnet20, 95 %, from uniform": "glyph-resnet20 0.95 fcpts from uniform 0",
        "glyph-resnet20, 98 %, from erk": "glyph-resnet20 0.98 fcpts 0",
        "glyph-vit, 98 %, from erk": "glyph-vit 0.98 fcpts 0",
    }
    if all(key in found for key in shown.values()):
        figure, places = plt.subplots(1, len(shown), figsize=(11, 3.8), sharey=True, layout="constrained")
        for axes, (title, key) in zip(places, shown.items(), strict=True):
            _densities(axes, title, found[key])
        places[0].set_ylabel("density (share of the layer kept)")
        save(figure, directory / "fcpts-densities.svg")
    keys = {name: "0.98 fcpts" if name == "fcpts" else f"0.98 ablation {name}" for name in ablation}
    if all(f"{net} {key} {seed}" in found for net in nets for key in keys.values() for seed in seeds):
        figure, places = plt.subplots(1, len(nets), figsize=(11, 3.2), sharey=True, layout="constrained")
        for axes, net in zip(places, nets, strict=True):
            _ablation(axes, net, {n: [100 * found[f"{net} {k} {s}"]["score"] for s in seeds] for n, k in keys.items()})
        save(figure, directory / "fcpts-ablation.svg")


def _densities(axes: Axes, title: str, run: Mapping[str, Any]) -> None:
    """Every layer's density over the steps; those that moved most against the whole in colour."""
    path, total = run["trajectory"], run["total"]
    steps = [row["step"] for row in path]
    whole = [sum(row["kept"].values()) / sum(total.values()) for row in path]
    moved = {
        name: path[-1]["kept"][name] / total[name] - path[0]["kept"][name] / total[name] * whole[-1] / whole[0]
        for name in total
    }
    marked = sorted(moved, key=lambda name: -abs(moved[name]))[:MARKED]
    for name in sorted(total, key=lambda name: name in marked):
        colour = (RED if moved[name] > 0 else BLUE) if name in marked else GREY
        line = [row["kept"][name] / total[name] for row in path]
        axes.plot(steps, line, color=colour, linewidth=1.4 if name in marked else 0.7, drawstyle="steps-post")
    ends = sorted(((path[-1]["kept"][name] / total[name], name) for name in marked), reverse=True)
    height = 10.0
    for density, name in ends:  # labels from the top down, none on another
        height = min(density, height / 1.25)
        axes.annotate(
            f"{name.removesuffix('.weight')} {density:.2g}",
            (steps[-1], height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=RED if moved[name] > 0 else BLUE,
            annotation_clip=False,
        )
    axes.plot(steps, whole, color=INK, linewidth=2, linestyle="--", label="whole model")
    axes.set(title=title, xlabel="step", yscale="log", ylim=(8e-4, 1.15))
    axes.set_yticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower left", fontsize=8)


def _ablation(axes: Axes, net: str, scores: Mapping[str, Sequence[float]]) -> None:
    """A point a variant: mean, and spread over seeds as a bar; the whole method as a line."""
    names = list(scores)[::-1]
    for place, name in enumerate(names):
        mean, spread = statistics.mean(scores[name]), statistics.stdev(scores[name])
        colour = RED if name == "fcpts" else INK
        axes.errorbar(mean, place, xerr=spread, fmt="o", color=colour, capsize=3, markersize=5)
    axes.axvline(statistics.mean(scores["fcpts"]), color=RED, linewidth=0.8, linestyle=":")
    axes.set(title=net, xlabel="top-1 at 98 %, percent")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)


def curves(axes: Axes, found: Found, net: str, points: Sequence[tuple[str, str]], shown: Mapping[str, Any]) -> None:
    """Test scores of a net, mean and standard deviation over seeds.

    Args:
        points: (label on the axis, what stands before a row's name in a run's key), from left to right.
        shown: row -> (colour, line, marker).
    """
    for name, (colour, line, marker) in shown.items():
        scores = [(i, values(found, net, f"{before} {name}")) for i, (_, before) in enumerate(points)]
        if scores := [(i, some) for i, some in scores if some]:
            x = [i for i, _ in scores]
            y = [statistics.mean(some) for _, some in scores]
            error = [statistics.stdev(some) if len(some) > 1 else 0.0 for _, some in scores]
            drawn = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.3}
            axes.errorbar(x, y, error, capsize=2, label=name, **drawn)
    axes.set_xticks(range(len(points)), [label for label, _ in points])
    axes.set_title(net, fontsize=9)


def save(figure: Any, path: Path) -> None:
    """Write and close a figure; no date in it."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
