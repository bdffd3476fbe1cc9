"""Charts put points where their values are, and say which values these are."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import allot
from allot.report import trajectories
from allot.report.charts import Line, Mark, histogram, lines, marks
from contract.cases import CASES
from report.pages import report


def ticks(drawn: str) -> tuple[list[str], list[str]]:
    """The labels of x and of y."""
    x = re.findall(r'y="216" text-anchor="middle">([^<]+)<', drawn)
    return x, re.findall(r'y="[\d.]+" text-anchor="end">([^<]+)<', re.sub('<text class="end".*?</text>', "", drawn))


def points(drawn: str) -> list[tuple[float, float]]:
    return [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', drawn)[1].split()]


def test_charts_put_points_where_their_values_are():
    (a, b), (c, d) = points(lines([Line("up", [(0, 0.0), (10, 1.0)])], "x", "y"))
    assert a < c and b > d  # more is to the right and higher
    assert lines([], "x", "y") == lines([Line("none", [(0, float("nan"))])], "x", "y") == marks([], "x", "y") == ""
    bars = histogram([0.0, 1.0, 2.0], [4, 2], [0, 2], "w")
    tall = [float(height) for height in re.findall(r'class="before"[^>]+height="([\d.]+)"', bars)]
    assert len(tall) == 2 and tall[0] == pytest.approx(2 * tall[1], abs=0.2) and bars.count('class="after"') == 1
    error = marks([Mark("m", 1.0, 0.5, 0.1, 0), Mark("n", 2.0, 0.7, 0.0, 0)], "x", "y")
    assert error.count("<circle") == 2 and error.count('class="spread"') == 1


@pytest.mark.parametrize(
    ("low", "high"),
    [(1, 1 + 1e-9), (0.931, 0.934), (1e6, 1e6 + 3), (-1e-7, 1e-7), (40, 1107), (12_345, 98_765), (0, 1), (3, 3),
     (0, 0), (1e17, 1e17), (-5, 1e6)],
)  # fmt: skip
def test_labels_of_an_axis_are_those_of_its_values(low: float, high: float):
    drawn = lines([Line("a", [(low, low), (high, high)])], "x", "y")
    sizes = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    for labels in ticks(drawn):
        assert len(set(labels)) == len(labels) >= 2
        values = [float(label.rstrip("kMG")) * sizes[label[-1] if label[-1] in "kMG" else ""] for label in labels]
        steps = [b - a for a, b in itertools.pairwise(values)]
        assert min(steps) == pytest.approx(max(steps), rel=1e-3)  # not one is rounded away
        room = 0.13 * (high - low) or max(1.0, 2e-9 * abs(low))
        assert low - room <= values[0] and values[-1] <= high + room


def test_small_values_have_labels_without_exponents():
    for labels in ticks(lines([Line("loss", [(0, 2e-5), (9, 8e-5)])], "step", "loss")):
        assert labels and not [label for label in labels if "e" in label]
    assert ticks(lines([Line("loss", [(0, 0.0), (9, 8e-5)])], "step", "loss"))[1][:2] == ["0", "0.00002"]


def test_what_is_used_of_a_limit_is_drawn_from_nought():
    drawn = lines([Line("a", [(0, 0.98), (5, 1.0)])], "step", "used", limit=1.0, base=0.0)
    assert ticks(drawn)[1][0] == "0" and "1" in ticks(drawn)[1]
    level = float(re.search(r'class="limit"[^>]+y1="([\d.]+)"', drawn)[1])
    bottom = max(float(at) for at in re.findall(r'class="grid"[^>]+y2="([\d.]+)"', drawn))
    (_, first), (_, last) = points(drawn)
    assert last == level and (bottom - first) == pytest.approx(0.98 * (bottom - level), abs=0.2)


def test_points_stand_clear_of_the_frame():
    drawn = marks([Mark("m", 80, 0.5, 0, 0), Mark("n", 95, 0.7, 0, 0)], "x", "y")
    left = float(re.search(r'class="grid" x1="([\d.]+)" x2="462"', drawn)[1])
    at = [float(x) for x in re.findall(r'circle cx="([\d.]+)"', drawn)]
    assert min(at) > left + 10 and max(at) < 462 - 10


def test_the_lines_that_end_highest_and_lowest_have_their_names():
    some = [Line(f"layer {i}", [(0, 0.5), (9, end)]) for i, end in enumerate((0.3, 0.9, 0.1, 0.5))]
    named = re.findall('class="end"[^>]+>([^<]+)<', lines(some, "step", "density"))
    assert named == ["layer 1", "layer 2"]
    assert 'class="end"' not in lines(some[:1], "step", "loss") + lines(some, "x", "y", ends=False)
    long = lines([Line("a" * 50 + ".weight", [(0, 1)]), Line("<b>", [(0, 0)])], "x", "y")
    assert "…" in long and ".weight</text>" in long and "&lt;b&gt;</text>" in long


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts as the lines that they are of."""
    monkeypatch.setattr(
        trajectories, "lines", lambda some, *labels, **settings: {line.name: line.points for line in some}
    )


@pytest.mark.usefixtures("drawn")
def test_paths_of_densities_are_shares_of_what_a_layer_has(runs: dict[str, Path]):
    told: dict[str, Any] = report(runs["fcpts"])
    total = {row["name"]: row["total"] for row in told["layers"]}
    found: Any = trajectories.density_chart(told)
    trajectory = told["diagnostics"]["fcpts"]["trajectory"]
    assert found.keys() == total.keys() and len(trajectory) > 1
    for name, path in found.items():
        assert path == [(entry["step"], entry["kept"][name] / total[name]) for entry in trajectory]
    channels = report(runs["dsa"])
    shown, dsa = trajectories.density_chart(channels), channels["diagnostics"]["dsa"]
    assert [shown[name][-1] for name in dsa["groups"]] == [
        (dsa["densities"][-1][0], d) for d in dsa["densities"][-1][1]
    ]
    assert trajectories.density_chart(report(runs["erk"])) == {}


@pytest.mark.usefixtures("drawn")
def test_what_is_spent_is_a_share_of_the_limit_of_that_step(runs: dict[str, Path]):
    lines = [json.loads(line) for line in (runs["fcpts"] / "steps.jsonl").read_text().splitlines()]
    steps = [step for step in lines if step["stage"] == "allocate"]
    assert trajectories.budget_chart(trajectories.read_steps(runs["fcpts"])) == {
        "sparsity": [(s["step"], s["cost.sparsity"] / s["limit.sparsity"]) for s in steps if "cost.sparsity" in s]
    }
    ((stage, loss),) = trajectories.loss_charts(trajectories.read_steps(runs["fcpts"]))
    assert (stage, loss["allocate"]) == ("allocate", [(s["step"], s["loss"]) for s in steps if "loss" in s])


def test_a_histogram_holds_every_weight_of_both_models():
    """Also where the largest weights are the ones that went."""
    case = CASES["with batch norm"]
    model = case.make()
    result = allot.prune(model, None, "sparsity=0.7", method="erk", score="random", repair="none")
    dense, sparse = model.state_dict(), result.state_dict()
    shrunk = 0
    for name, bins in result.report()["histograms"].items():
        assert sum(bins["dense"]) == torch.count_nonzero(dense[name])
        assert sum(bins["sparse"]) == torch.count_nonzero(sparse[name])
        assert bins["edges"][-1] == -bins["edges"][0] == pytest.approx(dense[name].abs().max().item(), abs=1e-6)
        shrunk += bool(sparse[name].abs().max() < dense[name].abs().max())
    assert shrunk
