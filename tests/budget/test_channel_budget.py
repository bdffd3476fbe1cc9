"""Budgets of channels: never exceeded, used up to the last channel, and what they say is what slim nets hold."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from allot import prune
from allot.budget.budget import Budget
from allot.budget.channels import ChannelBudget, Extent, channel_terms
from allot.budget.costs import Term
from allot.errors import BudgetError, PatternError, UsageError
from allot.export.files import formats as files
from allot.network.channels import ChannelPlan, slimmed
from allot.network.layers import Rules
from allot.pruning.setup import make_problem
from allot.run.patterns import Channels
from network.coupling.nets import filled, net, picture

quick = settings(max_examples=60, deadline=None)
WISHES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-9, 0.1]))

Named = list[tuple[str, int, int, int]]  # name, channels, fewest, most


@st.composite
def models(draw: Any, *, bounded: bool = True) -> tuple[Named, tuple[Extent, ...], int]:
    """Groups, tensors that hold them, and the step in which channels go."""
    step = draw(st.sampled_from([1, 1, 2, 4]))
    named: Named = []
    for i in range(draw(st.integers(1, 4))):
        total = draw(st.integers(step + 1, 20))
        lower, upper = 1, total
        if bounded and draw(st.booleans()):
            lower = draw(st.integers(1, total // step * step))
            upper = draw(st.sampled_from([total, *range(-(-lower // step) * step, total)]))
        named.append((f"group{i}", total, lower, upper))
    names = [name for name, *_ in named]
    extents = []
    for i in range(draw(st.integers(1, 5))):
        dims = []
        for _ in range(draw(st.integers(1, 2))):
            held = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
            fixed = draw(st.integers(0 if held else 1, 3))
            dims.append((fixed, tuple((name, draw(st.integers(1, 3))) for name in held)))
        uses = draw(st.one_of(st.integers(0, 50).map(Fraction), st.fractions(0, 9, max_denominator=7)))
        extents.append(Extent(f"tensor{i}", draw(st.sampled_from([1, 9])), tuple(dims), uses, counted=i < 4))
    return named, tuple(extents), step


def price(kind: str, extents: tuple[Extent, ...], kept: dict[str, int], header: int = 100) -> Fraction:
    """The cost, written down a second time."""
    cost = Fraction(header if kind == "bytes" else 0)
    for extent in extents:
        size = extent.rest
        for fixed, groups in extent.dims:
            size *= fixed + sum(each * kept[name] for name, each in groups)
        if kind == "bytes":
            cost += 4 * size
        elif extent.counted:
            cost += size * (extent.uses if kind == "macs" else 1)
    return cost


def budget_of(model: tuple[Named, tuple[Extent, ...], int], **asked: Any) -> ChannelBudget:
    named, extents, step = model
    full = {name: total for name, total, *_ in named}
    weights = [
        Term(e.name, int(e.size(full)), 0, int(e.size(full)), macs=math.ceil(e.size(full) * e.uses))
        for e in extents
        if e.counted
    ]
    return ChannelBudget(
        Budget(**asked).with_terms(weights, full_bytes=10**9), channel_terms(named, step), extents, 100
    )


@st.composite
def posed(draw: Any, *, bounded: bool = True) -> tuple[Any, ChannelBudget, dict[str, float]]:
    """A model, one to three limits on it that its floors meet, and a wish."""
    model = draw(models(bounded=bounded))
    named, extents, step = model
    terms = channel_terms(named, step)
    least, most = ({t.name: getattr(t, bound) for t in terms} for bound in ("lower", "upper"))
    asked = {}
    for kind in draw(st.lists(st.sampled_from(["params", "macs", "bytes"]), unique=True, min_size=1)):
        low, high = price(kind, extents, least), price(kind, extents, most)
        asked[kind] = max(math.ceil(low + draw(st.fractions(0, 1, max_denominator=100)) * (high - low)), 1)
    return model, budget_of(model, **asked), {name: draw(WISHES) for name in least}


def fits(model: Any, budget: ChannelBudget, kept: dict[str, int]) -> bool:
    return all(price(kind, model[1], kept) <= limit for kind, limit in budget.asked.items())


def next_up(budget: ChannelBudget, name: str, kept: int) -> int | None:
    """The next more channels of a group: a multiple of its step, or all."""
    term = next(term for term in budget.terms if term.name == name)
    return next((k for k in range(kept + 1, term.upper + 1) if k % term.step == 0 or k == term.total), None)


@quick
@given(posed())
def test_counts_never_exceed_a_limit_and_leave_no_room_for_a_channel(drawn):
    model, budget, wished = drawn
    kept = budget.counts(wished)
    assert fits(model, budget, kept)
    for name in kept:
        more = next_up(budget, name, kept[name])
        assert more is None or not fits(model, budget, {**kept, name: more})
    assert budget.meets(kept)


@quick
@given(posed())
def test_counts_stay_in_bounds_and_are_multiples_of_the_step_or_all(drawn):
    (named, _, step), budget, wished = drawn
    kept = budget.counts(wished)
    for name, total, lower, upper in named:
        assert lower <= kept[name] <= upper
        assert kept[name] % step == 0 or kept[name] == total


@quick
@given(posed())
def test_counts_that_are_an_answer_stay_as_they_are(drawn):
    (named, *_), budget, wished = drawn
    kept = budget.counts(wished)
    assert budget.counts({name: kept[name] / total for name, total, *_ in named}) == kept


@quick
@given(posed())
def test_what_is_projected_uses_up_the_tightest_limit(drawn):
    _, budget, wished = drawn
    allocation = budget.project(wished)
    relaxed = {term.name: allocation[term.name] * term.total for term in budget.terms}
    costs = [float(budget.real_cost(limit.kind, relaxed)) / limit.ceiling for limit in budget.limits]
    assert max(costs) <= 1 + 1e-9
    bound = {term.name: term.upper for term in budget.terms}
    full = all(relaxed[name] >= most - 1e-6 for name, most in bound.items())
    least = all(relaxed[term.name] <= term.lower + 1e-6 for term in budget.terms)
    assert max(costs) >= 1 - 1e-6 or full or least


@quick
@given(posed(), st.sampled_from([1.0, 1.5, 4.0, 1e6]))
def test_a_widened_budget_has_room_for_so_many_times_as_much_and_is_used_up(drawn, factor):
    model, budget, wished = drawn
    wide = budget.widened(factor)
    for limit, wider in zip(budget.limits, wide.limits, strict=True):
        fixed = 100 if limit.kind == "bytes" else 0
        everything = math.ceil(price(limit.kind, model[1], {term.name: term.upper for term in budget.terms}))
        assert wider.ceiling == max(limit.ceiling, min(int(fixed + factor * (limit.ceiling - fixed)), everything))
    kept = wide.counts(wished)
    assert wide.meets(kept)
    for name in kept:
        more = next_up(wide, name, kept[name])
        assert more is None or not wide.fits({**kept, name: more})
    if factor == 1:
        assert kept == budget.counts(wished)


@quick
@given(posed(), st.data())
def test_cost_is_what_was_written_down_and_grows_with_every_channel(drawn, data):
    model, budget, _ = drawn
    kept = {name: data.draw(st.integers(1, total)) for name, total, *_ in model[0]}
    for kind in ("params", "macs", "bytes"):
        assert budget.cost(kind, kept) == math.ceil(price(kind, model[1], kept))
        for name, total, *_ in model[0]:
            if kept[name] < total:
                assert budget.cost(kind, {**kept, name: kept[name] + 1}) >= budget.cost(kind, kept)


@quick
@given(posed())
def test_levels_are_every_number_that_a_group_may_have(drawn):
    (named, _, step), budget, _ = drawn
    terms = {term.name: term for term in budget.terms}
    for name, total, lower, upper in named:
        allowed = [k for k in range(lower, upper + 1) if k % step == 0 or k == total]
        assert budget.levels(terms[name], total + 1) == allowed


@quick
@given(models(), st.sampled_from(["params", "macs", "bytes"]))
def test_a_budget_below_the_floors_is_refused_with_the_nearest_that_can_be_met(model, kind):
    named, extents, step = model
    least = {term.name: term.lower for term in channel_terms(named, step)}
    cost = math.ceil(price(kind, extents, least))
    if cost < 2:
        return
    with pytest.raises(BudgetError, match=rf"Nearest that can be met: {kind}={cost}\.") as refused:
        budget_of(model, **{kind: cost - 1})
    nearest = str(refused.value).rpartition("met: ")[2].rstrip(".")
    budget = budget_of(model, **Budget.parse(nearest).asked)
    assert budget.counts(dict.fromkeys(least, 1.0)).keys() == least.keys()


@quick
@given(models(bounded=False), st.integers(1, 99))
def test_the_nearest_sparsity_can_be_met(model, percent):
    named, extents, _ = model
    full = sum(int(e.size({name: total for name, total, *_ in named})) for e in extents if e.counted)
    try:
        budget = budget_of(model, sparsity=f"{percent}%")
    except BudgetError as refused:
        nearest = str(refused).rpartition("met: ")[2].rstrip(".")
        budget = budget_of(model, **Budget.parse(nearest).asked)
    kept = budget.counts({name: 1.0 for name, *_ in named})
    assert budget.cost("sparsity", kept) <= round((1 - Fraction(budget.asked["sparsity"].rstrip("%"))
        / (100 if budget.asked["sparsity"].endswith("%") else 1)) * full)  # fmt: skip
    assert budget.meets(kept)


def test_the_nearest_sparsity_can_be_met_where_nothing_can_go():
    with pytest.raises(BudgetError) as refused:
        on_net("resnet", "sparsity=0.5", rules=Rules(min_density={"*": 1.0}))
    Budget.parse(str(refused.value).rpartition("met: ")[2].rstrip("."))


def test_the_nearest_of_several_limits_names_every_limit():
    with pytest.raises(BudgetError) as refused:
        on_net("resnet", "params=1,macs=1")
    on_net("resnet", str(refused.value).rpartition("met: ")[2].rstrip("."))
    assert set(Budget.parse(str(refused.value).rpartition("met: ")[2].rstrip(".")).asked) == {"params", "macs"}


# on nets


def on_net(name: str, budget: str = "macs=50%", *, step: int = 1, rules: Rules | None = None) -> Any:
    return make_problem(net(name), Budget.parse(budget), Channels(step), example=picture(), rules=rules)


def even(problem: Any) -> dict[str, float]:
    return {term.name: 1.0 for term in problem.budget.terms}


@pytest.mark.parametrize(
    "budget", ["macs=50%", "params=40%", "bytes=75%", "sparsity=0.6", "macs=60%,params=50%,bytes=80%"]
)
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit", "grouped conv", "gated halves"])
def test_several_limits_hold_at_once_on_nets(name, budget):
    try:
        problem = on_net(name, budget)
    except BudgetError as refused:  # tiny nets are mostly header and what stays whole
        nearest = str(refused).rpartition("met: ")[2].rstrip(".")
        problem = on_net(name, nearest)
    kept = problem.budget.counts(even(problem))
    assert problem.budget.meets(kept) and all(row["met"] for row in problem.budget.rows(kept))
    for term in problem.budget.terms:
        more = next_up(problem.budget, term.name, kept[term.name])
        assert more is None or not problem.budget.fits({**kept, term.name: more})


def test_every_allocation_of_a_tiny_net_costs_what_its_slim_model_holds():
    model = filled(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2),
        )
    )  # fmt: skip
    problem = make_problem(model, Budget.parse("macs=50%"), Channels(), example=torch.ones(1, 2, 6, 6))
    groups, budget = problem.scope.groups, problem.budget
    assert [group.total for group in groups] == [3, 4, 3]
    for counts in itertools.product(*(range(1, group.total + 1) for group in groups)):
        kept = {group.name: count for group, count in zip(groups, counts, strict=True)}
        plan = ChannelPlan.of(model, groups, {name: range(count) for name, count in kept.items()})
        slim = slimmed(model, plan)
        weights = {f"{i}.weight": slim[i].weight.numel() for i in (0, 3, 6, 8)}
        uses = {"0.weight": 36, "3.weight": 4, "6.weight": 1, "8.weight": 1}
        assert budget.sizes(kept) == weights and budget.cost("params", kept) == sum(weights.values())
        assert budget.cost("macs", kept) == sum(uses[layer] * size for layer, size in weights.items())
        held = sum(t.numel() * t.element_size() for t in slim.state_dict().values())
        assert budget.cost("bytes", kept) == budget.header + held


def test_more_may_never_be_had_than_the_best_of_all_allocations():
    problem = on_net("gated halves", "macs=40%")
    budget = problem.budget
    kept = budget.counts(even(problem))
    ranges = [range(1, term.total + 1) for term in budget.terms]
    answers = [
        dict(zip(kept, counts, strict=True))
        for counts in itertools.product(*ranges)
        if budget.cost("macs", dict(zip(kept, counts, strict=True))) <= budget.limits[0].ceiling
    ]
    assert kept in answers
    assert not any(all(other[n] >= kept[n] for n in kept) and other != kept for other in answers)


@pytest.mark.parametrize("name", ["resnet", "vit", "tied weights", "instance norm"])
def test_the_saved_slim_file_has_as_many_bytes_as_were_promised(name, tmp_path):
    whole = on_net(name, "bytes=99%").budget
    least, most = (
        whole.cost("bytes", {term.name: getattr(term, bound) for term in whole.terms}) for bound in ("lower", "upper")
    )
    limit = (least + most) // 2
    result = prune(
        net(name), picture(4), f"bytes={limit}", pattern="channels", allocate="uniform", repair="none", seed=1
    )  # fmt: skip
    result.save(tmp_path)
    size = (tmp_path / files.SLIM).stat().st_size
    assert size == result.problem.budget.cost("bytes", result.allocation.kept) <= limit
    assert result.problem.budget.rows(result.allocation.kept)[0]["achieved"] == size


# what is refused


@pytest.mark.parametrize("wished", [{"stem": 1.0}, {}, "more"])
def test_wishes_for_other_groups_are_refused(wished):
    problem = on_net("resnet")
    wished = even(problem) | {"other": 1.0} if wished == "more" else wished
    for use in (problem.budget.counts, problem.budget.project):
        with pytest.raises(UsageError, match=r"other groups of channels: (unknown other|missing )"):
            use(wished)


@pytest.mark.parametrize("step", [0, -1, 1.5, "2", True])
def test_a_step_that_is_no_whole_number_is_refused(step):
    with pytest.raises(PatternError, match="1 or more"):
        Channels(step)


def test_a_model_of_which_nothing_can_go_is_refused():
    with pytest.raises(BudgetError, match="no channels can be removed"):
        make_problem(filled(nn.Sequential(nn.Flatten(), nn.Linear(12, 3))), Budget.parse("macs=50%"), Channels(),
             example=torch.ones(1, 3, 2, 2))  # fmt: skip


def test_channels_without_an_example_are_refused():
    with pytest.raises(UsageError, match="--data or --input"):
        make_problem(net("resnet"), Budget.parse("params=50%"), Channels())


# steps


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_groups_keep_multiples_of_a_step_or_all(step):
    for budget in ("macs=35%", "macs=70%", "macs=95%"):
        problem = on_net("mobilenet", budget, step=step)
        kept = problem.budget.counts(even(problem))
        large = [term for term in problem.budget.terms if term.total > step]
        assert large and all(kept[t.name] % step == 0 or kept[t.name] == t.total for t in large)
        assert problem.budget.meets(kept)


def test_groups_no_larger_than_the_step_keep_any_number():
    (term,) = channel_terms([("heads", 4, 1, 4)], step=8)
    assert (term.lower, term.upper, term.step) == (1, 4, 1)


def test_a_floor_above_the_last_multiple_keeps_all():
    (term,) = channel_terms([("group", 10, 9, 10)], step=4)
    assert (term.lower, term.upper) == (10, 10)


def test_bounds_that_hold_no_multiple_are_refused():
    with pytest.raises(BudgetError, match="group: no multiple of 4 lies between 5 and 7 of its 10 channels"):
        channel_terms([("group", 10, 5, 7)], step=4)


# rules


def bounds(problem: Any) -> dict[str, tuple[int, int]]:
    return {term.name: (term.lower, term.upper) for term in problem.budget.terms}


def test_include_leaves_only_the_groups_that_it_writes():
    problem = on_net("resnet", "macs=90%", rules=Rules(include=("layer2.*",)))
    assert set(bounds(problem)) == {"layer2.conv1", "layer2.conv2"}
    assert problem.scope.skipped["stem"] == "no include rule matches it"


def test_include_knows_a_group_by_each_of_its_writers():
    assert set(bounds(on_net("resnet", "macs=90%", rules=Rules(include=("layer1.conv2",))))) == {"stem"}


@pytest.mark.parametrize("pattern", ["layer1.conv1", "layer1.conv1.weight", "layer1.bn1", "re:layer1[.]conv1"])
def test_exclude_leaves_whole_what_a_layer_writes(pattern):
    problem = on_net("resnet", "macs=90%", rules=Rules(exclude=(pattern,)))
    assert "layer1.conv1" not in bounds(problem)
    assert problem.scope.skipped["layer1.conv1"] == f"excluded by rule {pattern!r}"


def test_exclude_leaves_every_dimension_of_a_layer_whole():
    problem = on_net("resnet", "macs=80%", rules=Rules(exclude=("layer1.conv2",)))
    assert set(bounds(problem)) == {"layer2.conv1", "layer2.conv2"}
    sizes = problem.budget.sizes({term.name: 1 for term in problem.budget.terms})
    assert sizes["layer1.conv2.weight"] == 6 * 6 * 9


def test_densities_and_floors_bound_groups():
    rules = Rules(min_density={"stem": 0.5, "layer2.*": 0.3}, max_density={"layer1.conv1": 0.7}, floor=2)
    assert bounds(on_net("resnet", "macs=60%", rules=rules)) == {
        "stem": (3, 6), "layer1.conv1": (2, 4), "layer2.conv1": (3, 8), "layer2.conv2": (3, 8),
    }  # fmt: skip


def test_a_floor_is_a_share_of_a_group_and_counts_hold_it():
    problem = on_net("resnet", "macs=50%", rules=Rules(floor="50%"))
    assert {lower for lower, _ in bounds(problem).values()} == {3, 4}
    wished = even(problem) | {"layer2.conv1": 0.0}
    assert problem.budget.project(wished)["layer2.conv1"] == 0.5
    assert problem.budget.counts(wished)["layer2.conv1"] >= 4


@pytest.mark.parametrize("field", ["include", "exclude", "min_density", "max_density"])
@pytest.mark.parametrize("pattern", ["nothing", "layer9.*", "re:conv"])
def test_a_pattern_that_means_nothing_is_refused(field, pattern):
    value = (pattern,) if field in ("include", "exclude") else {pattern: 0.5}
    with pytest.raises(UsageError, match=r"matches no group of channels; there are stem"):
        on_net("resnet", rules=Rules(**{field: value}))


@pytest.mark.parametrize("field", ["min_density", "max_density"])
def test_a_bound_on_a_layer_that_only_reads_is_refused(field):
    with pytest.raises(UsageError, match="'fc'"):
        on_net("resnet", rules=Rules(**{field: {"fc": 0.5}}))


def test_rules_that_leave_nothing_are_refused():
    with pytest.raises(BudgetError, match="no channels can be removed"):
        on_net("resnet", rules=Rules(exclude=("*",)))
