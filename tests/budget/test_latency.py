"""Budgets of time: tables are read as they were measured, grow with every side, and are shared out like any budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.budget.latency import Latency, LayerTimes, monotone
from allot.errors import BudgetError, UsageError
from allot.methods.training.channel_costs import Costs
from allot.pruning.setup import make_problem
from allot.run.patterns import parse
from network.coupling.nets import net, picture

TABLE = LayerTimes("a", (2, 4, 8), (3, 9), ((1.0, 4.0), (2.0, 6.0), (6.0, 20.0)), out=0, places=5)


@pytest.mark.parametrize(
    ("sides", "wanted"),
    [
        ((2, 3), 1.0), ((4, 9), 6.0), ((8, 3), 6.0),  # on the grid
        ((3, 3), 1.5), ((2, 6), 2.5), ((6, 6), (2 + 6 + 6 + 20) / 4),  # halfway between two and four points
        ((1, 3), 0.5), ((10, 3), 8.0),  # beyond it, the last stretch goes on
    ],
)  # fmt: skip
def test_a_table_is_what_was_measured_on_its_points_and_bilinear_between(sides: Any, wanted: float):
    assert TABLE.at(sides)[0] == pytest.approx(wanted)


@pytest.mark.parametrize("sides", [(2.5, 4.0), (5.0, 8.0), (7.9, 3.1)])
def test_slopes_are_those_of_finite_differences(sides: tuple[float, float]):
    latency = Latency("torch", 1, (TABLE,), 7.0, 2.0, 0.5, 100, slow=1.5)
    total, slopes = latency.of({"a": sides})
    assert total == pytest.approx(1.5 * (7 + 2 * TABLE.at(sides)[0] + 0.5 * 5 * sides[0]))
    h = 1e-6
    for d in (0, 1):
        more = tuple(side + h * (i == d) for i, side in enumerate(sides))
        assert slopes["a"][d] == pytest.approx((latency.of({"a": more})[0] - total) / h, rel=1e-4)


tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(st.floats(0, 1e9), min_size=width, max_size=width), min_size=1, max_size=4)
)


@settings(max_examples=80, deadline=None)
@given(tables)
def test_a_table_is_made_to_grow_along_both_sides(times: list[list[float]]):
    made = monotone(times)
    assert all(a <= b for row in made for a, b in itertools.pairwise(row))
    assert all(a <= b for column in zip(*made, strict=True) for a, b in itertools.pairwise(column))
    assert monotone([list(row) for row in made]) == made  # one that grows already stays as it is
    spread = [value for row in times for value in row]
    assert min(spread) <= made[0][0] and made[-1][-1] <= max(spread)


def products(
    model: nn.Module, scope: Any, groups: Any, extents: Sequence[Any], terms: Any, example: Any, limit: str
) -> Latency:
    """Tables by which a layer takes as long as its weight has places: time is then what params are, but for base."""
    layers = []
    for extent in (e for e in extents if e.counted):
        rest = extent.size(dict.fromkeys([t.name for t in terms], 0)) if not any(d[1] for d in extent.dims) else 1
        kernel = rest
        for fixed, _ in extent.dims[2:]:
            kernel *= fixed
        top = [fixed + sum(each * next(t.total for t in terms if t.name == g) for g, each in held)
               for fixed, held in extent.dims[:2]]  # fmt: skip
        rows, columns = ((1, side) if side > 1 else (1,) for side in top)
        times = tuple(tuple(float(r * c * kernel) for c in columns) for r in rows)
        layers.append(LayerTimes(extent.name, rows, columns, times, 0, 0))
    dense = sum(layer.times[-1][-1] for layer in layers)
    return Latency("torch", 1, tuple(layers), 0.0, 1.0, 0.0, round(dense))


def on(name: str, budget: str, pattern: str = "channels") -> Any:
    return make_problem(net(name), Budget.parse(budget), parse(pattern), example=picture(1), latency=products)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "grouped conv"])
@pytest.mark.parametrize("budget", ["latency=60%", "latency=60%,bytes=80%", "macs=70% and latency=80%"])
def test_time_is_used_up_and_never_exceeded(name: str, budget: str):
    problem = on(name, budget)
    kept = problem.budget.counts({term.name: 1.0 for term in problem.budget.terms})
    assert problem.budget.meets(kept) and all(row["met"] for row in problem.budget.rows(kept))
    for term in problem.budget.terms:
        if kept[term.name] < term.upper:
            assert not problem.budget.fits({**kept, term.name: kept[term.name] + 1})


def test_where_time_is_what_weights_are_both_budgets_share_out_alike():
    by_time, by_weights = on("resnet", "latency=50%"), on("resnet", "params=50%")
    wished = {term.name: 0.3 + 0.1 * i for i, term in enumerate(by_time.budget.terms)}
    kept = by_time.budget.counts(wished)
    assert kept == by_weights.budget.counts(wished)
    assert by_time.budget.cost("latency", kept) == by_weights.budget.cost("params", kept)


def test_the_gradient_of_time_is_that_of_finite_differences():
    problem = on("mobilenet", "latency=50%,macs=60%")
    costs = Costs(problem)
    alpha = torch.linspace(0.31, 0.83, len(problem.scope.groups), dtype=torch.float64)
    for i, (value, gradient) in enumerate(costs(alpha)):
        for k in range(len(alpha)):
            step = torch.zeros_like(alpha)
            step[k] = 1e-6
            assert float(gradient[k]) == pytest.approx((costs(alpha + step)[i][0] - value) / 1e-6, rel=1e-4, abs=1e-9)


def test_tables_survive_json():
    latency = Latency("onnx:8", 8, (TABLE,), -3.5, 2.0, 0.5, 100, 0.1, 1.25)
    assert Latency.from_json(latency.to_json()) == latency
    for broken in ({}, [], None, {**latency.to_json(), "layers": [{}]}, {**latency.to_json(), "base": "x"}):
        with pytest.raises(UsageError, match="no table of latencies"):
            Latency.from_json(broken)


@pytest.mark.parametrize(
    ("asked", "nanoseconds"), [("5ms", 5_000_000), ("300us", 300_000), ("0.002s", 2_000_000), ("80ns", 80)]
)
def test_times_are_read_as_people_write_them(asked: str, nanoseconds: int):
    budget = Budget(latency=asked).with_terms((Term("a", 10),))
    assert budget.to_json() == {"latency": asked}
    assert [limit.ceiling for limit in budget.limits] == [nanoseconds]


@pytest.mark.parametrize("asked", ["5", "5 weeks", "0ms", "-1ms", "120%", "0%", "fast", "5kB", "0.5ns"])
def test_what_is_no_time_is_refused_with_what_would_be(asked: str):
    with pytest.raises(BudgetError, match="A time, 5ms or 300us, or a share above 0% and below 100% is accepted"):
        Budget(latency=asked)


def test_single_weights_have_no_time_to_share_out():
    with pytest.raises(BudgetError, match="--pattern channels"):
        make_problem(net("resnet"), Budget(latency="50%"), parse("unstructured"), example=picture(1))


def test_what_no_net_can_meet_names_a_time_that_can_be():
    with pytest.raises(BudgetError, match="Nearest that can be met") as caught:
        on("resnet", "latency=10ns")
    nearest = str(caught.value).rpartition("met: ")[2].rstrip(".")
    assert nearest.endswith("us")
    problem = on("resnet", nearest)
    assert problem.budget.meets(problem.budget.counts({term.name: 1.0 for term in problem.budget.terms}))
