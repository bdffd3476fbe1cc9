"""A budget is met to the last unit, whatever the layers, bounds and wishes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from allot.budget.allocation import Allocation
from allot.budget.budget import Budget
from allot.budget.costs import REAL_PRICES, Term, breakpoints, mask_bits

quick = settings(max_examples=60, deadline=None)
SIZES = st.one_of(st.integers(1, 12), st.integers(1, 10**6))
WISHES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-9, 0.1]))
SPARSITIES = st.one_of(
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.decimals("0.0001", "0.9999", places=4).map(str),
    st.decimals("0.01", "99.99", places=2).map(lambda percent: f"{percent}%"),
)


@st.composite
def layers(draw, *, free=False):
    """Terms with MACs and bytes, and a wish for each; `free` leaves all of them from 0 weights to whole."""
    terms, wished = [], {}
    for i in range(draw(st.integers(1, 6))):
        total = draw(SIZES)
        lower, upper = sorted((draw(st.integers(0, total)), draw(st.integers(0, total))))
        if free or draw(st.booleans()):
            lower, upper = 0, total
        name = f"layer{i}"
        macs = draw(st.one_of(st.integers(0, 50).map(lambda uses, n=total: uses * n), st.integers(0, 10**8)))
        size = draw(st.sampled_from([2, 4, 8]))
        terms.append(
            Term(
                name, total, lower, upper, 1, macs,
                dense_bytes=size * total, value_bytes=size,
            )
        )  # fmt: skip
        wished[name] = draw(WISHES)
    return tuple(terms), wished


def smallest_mask(total: int, kept: float) -> float:
    """Bits, of every way to write a mask."""
    return min(total, *(kept * (low + 1) + (total - 1) // 2**low + 1 for low in range(70)))


def price(kind: str, term: Term, kept: int) -> Fraction:
    """What `kept` weights cost, written down a second time."""
    if kind == "macs":
        return Fraction(kept * term.macs, term.total)
    if kind == "bytes":
        return Fraction(min(term.dense_bytes, math.ceil(smallest_mask(term.total, kept) / 8) + kept * term.value_bytes))
    return Fraction(kept)


def real_price(kind: str, term: Term, kept: float) -> float:
    """The same of a real number of weights: a mask may end within a byte."""
    if kind == "bytes":
        return min(term.dense_bytes, smallest_mask(term.total, kept) / 8 + kept * term.value_bytes)
    return float(price(kind, term, Fraction(kept)))


def cost(kind: str, terms: tuple[Term, ...], kept: dict[str, int], fixed: int = 0) -> Fraction:
    return sum((price(kind, term, kept[term.name]) for term in terms), Fraction(fixed if kind == "bytes" else 0))


def within_bounds(terms: tuple[Term, ...], kept: dict[str, int]) -> bool:
    return all(term.lower <= kept[term.name] <= term.upper for term in terms)


def as_fraction(sparsity: float | str) -> Fraction:
    text = str(sparsity)
    return Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)


def share_between(terms: tuple[Term, ...], kind: str, part: Fraction, fixed: int = 0) -> int:
    """A limit between what the floors and what the caps cost."""
    least = cost(kind, terms, {term.name: term.lower for term in terms}, fixed)
    most = cost(kind, terms, {term.name: term.upper for term in terms}, fixed)
    return max(math.ceil(least), math.floor(least + part * (most - least)), 1)


@quick
@given(layers(free=True), SPARSITIES)
def test_sparsity_is_met_to_the_weight(drawn, sparsity):
    terms, wished = drawn
    total = sum(term.total for term in terms)
    kept = Budget(sparsity=sparsity).on(terms).counts(wished)
    assert sum(kept.values()) == round((1 - as_fraction(sparsity)) * total)
    assert within_bounds(terms, kept)


@quick
@given(layers(), st.fractions(0, 1))
def test_params_are_met_to_the_weight_with_floors_and_caps(drawn, part):
    terms, wished = drawn
    limit = share_between(terms, "params", part)
    kept = Budget(params=limit).on(terms).counts(wished)
    assert sum(kept.values()) == min(limit, sum(term.upper for term in terms))
    assert within_bounds(terms, kept)


@quick
@given(layers(), st.fractions(0, 1), st.sampled_from(["macs", "bytes", "params"]))
def test_a_limit_is_never_passed_and_not_one_more_weight_fits(drawn, part, kind):
    terms, wished = drawn
    limit = share_between(terms, kind, part, fixed=777)
    kept = Budget(**{kind: limit}).on(terms, fixed_bytes=777, full_bytes=10**9).counts(wished)
    spent = cost(kind, terms, kept, 777)
    assert within_bounds(terms, kept)
    assert spent <= limit
    for term in terms:
        if kept[term.name] < term.upper:
            more = price(kind, term, kept[term.name] + 1) - price(kind, term, kept[term.name])
            assert spent + more > limit


@quick
@given(layers(), st.fractions(0, 1), st.fractions(0, 1), st.fractions(0, 1))
def test_several_limits_hold_at_once_and_one_of_them_is_used_up(drawn, some, others, rest):
    terms, wished = drawn
    kinds = {"params": some, "macs": others, "bytes": rest}
    limits = {kind: share_between(terms, kind, part) for kind, part in kinds.items()}
    kept = Budget(**limits).on(terms, full_bytes=10**9).counts(wished)
    assert within_bounds(terms, kept)
    assert all(cost(kind, terms, kept) <= limit for kind, limit in limits.items())
    for term in terms:
        if kept[term.name] < term.upper:
            more = {**kept, term.name: kept[term.name] + 1}
            assert any(cost(kind, terms, more) > limit for kind, limit in limits.items())


@quick
@given(layers(), st.fractions(0, 1), st.sampled_from(["macs", "bytes", "params"]))
def test_counts_of_their_own_allocation_are_the_same_counts(drawn, part, kind):
    terms, wished = drawn
    budget = Budget(**{kind: share_between(terms, kind, part)}).on(terms, full_bytes=10**9)
    kept = budget.counts(wished)
    assert budget.counts(Allocation.of(kept, {term.name: term.total for term in terms})) == kept


@quick
@given(layers(), st.fractions(0, 1), st.randoms(use_true_random=False))
def test_the_order_of_layers_does_not_matter(drawn, part, random):
    terms, wished = drawn
    limit = share_between(terms, "macs", part)
    shuffled = list(terms)
    random.shuffle(shuffled)
    there = Budget(macs=limit).on(terms)
    here = Budget(macs=limit).on(tuple(shuffled))
    assert here.counts({term.name: wished[term.name] for term in shuffled}) == there.counts(wished)


@quick
@given(layers(), st.fractions(0, 1), st.sampled_from(["macs", "bytes", "params"]))
def test_projected_densities_use_up_the_limit_in_real_numbers(drawn, part, kind):
    terms, wished = drawn
    limit = share_between(terms, kind, part)
    budget = Budget(**{kind: limit}).on(terms, full_bytes=10**9)
    projected = budget.project(wished)
    kept = {term.name: projected[term.name] * term.total for term in terms}
    spent = sum(real_price(kind, term, kept[term.name]) for term in terms)
    most = sum(real_price(kind, term, term.upper) for term in terms)
    assert all(term.lower - 1e-6 <= kept[term.name] <= term.upper + 1e-6 for term in terms)
    assert spent == pytest.approx(min(limit, most), rel=1e-9, abs=1e-6)


@quick
@given(layers(), st.fractions(0, 1))
def test_projected_densities_are_in_proportion_to_the_wish_but_for_bounds(drawn, part):
    terms, wished = drawn
    projected = Budget(params=share_between(terms, "params", part)).on(terms).project(wished)
    prices = []
    for term in terms:
        kept = projected[term.name] * term.total
        if wished[term.name] > 1e-6 and term.lower + 1e-6 < kept < term.upper - 1e-6:
            prices.append(projected[term.name] / wished[term.name])
    assert all(one == pytest.approx(prices[0], rel=1e-6) for one in prices)


@quick
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), SPARSITIES)
def test_counts_are_the_largest_remainders(sizes, sparsity):
    terms = tuple(Term(f"layer{i}", n, lower=0) for i, n in enumerate(sizes))
    kept = Budget(sparsity=sparsity).on(terms).counts({term.name: 1.0 for term in terms})
    target = round((1 - as_fraction(sparsity)) * sum(sizes))
    exact = {term.name: Fraction(target * term.total, sum(sizes)) for term in terms}
    hamilton = {name: math.floor(x) for name, x in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (hamilton[name] - exact[name], name))
    for name in by_remainder[: target - sum(hamilton.values())]:
        hamilton[name] += 1
    assert kept == hamilton


@pytest.mark.parametrize("share", ["10%", "12.5%", "50%", "99.9%"])
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_percentage_is_a_share_of_the_dense_model(kind, share):
    terms = (Term("a", 1000, macs=7000), Term("b", 501, macs=501))
    full = {"params": 1501, "macs": 7501}[kind]
    (limit,) = Budget(**{kind: share}).on(terms).limits
    assert limit.ceiling == math.floor(Fraction(share[:-1]) * full / 100)


def test_a_percentage_of_bytes_is_a_share_of_the_dense_file():
    terms = (Term("a", 1000, dense_bytes=4000, value_bytes=4),)
    budget = Budget(bytes="25%").on(terms, fixed_bytes=300, full_bytes=4300)
    assert [limit.ceiling for limit in budget.limits] == [1075]
    kept = budget.counts({"a": 1.0})["a"]
    assert (
        300 + math.ceil(smallest_mask(1000, kept) / 8) + 4 * kept == 1075
    )  # 170 weights, two low bits of each position


@settings(deadline=None)
@given(total=SIZES, share=st.floats(0, 1))
@example(total=25, share=0.25)
@example(total=565, share=0.25)
def test_a_mask_is_the_smallest_of_all_and_near_the_least_possible(total, share):
    kept = int(share * total)
    assert mask_bits(total, kept) == smallest_mask(total, kept)
    least = (math.lgamma(total + 1) - math.lgamma(kept + 1) - math.lgamma(total - kept + 1)) / math.log(2)
    if kept <= total / 4:
        assert mask_bits(total, kept) <= least + 0.76 * kept + 4.6  # as much at 141 of 565


@settings(deadline=None)
@given(layers=layers(free=True), share=st.floats(0.01, 0.99))
def test_bytes_are_linear_between_breakpoints(layers, share):
    for term in layers[0]:
        at = sorted(breakpoints(term))
        for low, high in itertools.pairwise(at):
            middle = low + share * (high - low)
            line = (1 - share) * REAL_PRICES["bytes"](term, low) + share * REAL_PRICES["bytes"](term, high)
            if low >= 1:  # of less than one weight, positions have no bits to speak of
                assert REAL_PRICES["bytes"](term, middle) == pytest.approx(line, rel=1e-9)


def test_a_layer_that_is_smaller_dense_is_kept_whole():
    term = Term("a", 8, dense_bytes=32, value_bytes=4)  # 8 weights cost no more than 7.75
    assert Budget(bytes=32).on((term,), full_bytes=32).counts({"a": 1.0}) == {"a": 8}
    assert Budget(bytes=31).on((term,), full_bytes=32).counts({"a": 1.0}) == {"a": 7}


def test_layers_of_a_billion_weights_are_exact_too():
    terms = tuple(Term(f"layer{i}", 10**9 + i, lower=1) for i in range(5))
    kept = Budget(sparsity="0.3333333333").on(terms).counts({term.name: 0.1 * i + 0.1 for i, term in enumerate(terms)})
    total = sum(term.total for term in terms)
    assert sum(kept.values()) == round((1 - Fraction("0.3333333333")) * total)


def test_a_layer_wished_away_takes_what_full_layers_cannot():
    terms = (Term("gone", 100), Term("full", 10))
    assert Budget(params=50).on(terms).counts({"gone": 0.0, "full": 1.0}) == {"gone": 40, "full": 10}


def test_a_wish_of_zeros_means_equal_shares():
    terms = (Term("a", 100), Term("b", 100))
    assert Budget(params=50).on(terms).counts({"a": 0.0, "b": 0.0}) == {"a": 25, "b": 25}


def test_layers_keep_whole_steps():
    terms = (Term("a", 64, lower=16, upper=48, step=16), Term("b", 64, lower=16, upper=64, step=16))
    kept = Budget(params=71).on(terms).counts({"a": 1.0, "b": 1.0})
    assert sum(kept.values()) == 64
    assert all(count % 16 == 0 for count in kept.values())


@pytest.mark.parametrize("limits", [{"macs": 45}, {"macs": 45, "params": 39}])
def test_the_rest_of_the_scarcest_limit_goes_to_the_most_expensive_weights_that_fit(limits):
    terms = (Term("cheap", 20, macs=20), Term("dear", 10, macs=30), Term("dearest", 10, macs=100))
    kept = Budget(**limits).on(terms).counts({"cheap": 0.2, "dear": 0.4, "dearest": 0.29})  # 4, 4 and 2.9 weights
    assert kept == {"cheap": 4, "dear": 7, "dearest": 2}  # 9 MACs are left, and one of the dearest costs 10


def classic_erk(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """The loop of RigL (google-research/rigl, sparse_utils.py): layers that would pass 1 leave as dense, repeat."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        c = left / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        over = {name for name in shapes if name not in dense and c * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else c * raw[name] for name in shapes}
        # the original lets only the largest go; both end at the same set
        dense |= {max(over, key=lambda name: raw[name])}


@quick
@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
        min_size=2,
        max_size=8,
    ),
    st.floats(0.05, 0.9),
)
def test_erk_under_caps_is_the_classic_loop_over_dense_layers(drawn, density):
    shapes = {f"layer{i}": shape for i, shape in enumerate(drawn)}
    terms = tuple(Term(name, math.prod(shape), lower=0) for name, shape in shapes.items())
    budget = Budget(params=max(1, round(density * sum(term.total for term in terms)))).on(terms)
    exact = budget.limits[0].ceiling / budget.total
    if exact >= 1:
        return
    projected = budget.project({name: sum(shape) / math.prod(shape) for name, shape in shapes.items()})
    expected = classic_erk(shapes, exact)
    assert all(projected[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9) for name in shapes)


def test_rows_say_what_was_asked_and_achieved():
    terms = (Term("a", 100, macs=200), Term("b", 100, macs=100))
    budget = Budget(sparsity=0.9, macs="50%").on(terms)
    kept = budget.counts({"a": 1.0, "b": 1.0})
    sparsity, macs = budget.rows(kept)
    assert sparsity == {"kind": "sparsity", "asked": "0.9", "limit": 0.9, "achieved": 0.9, "met": True}
    assert macs["limit"] == 150 and macs["achieved"] == 30 and macs["met"]
    assert not budget.rows({"a": 100, "b": 100})[0]["met"]


def test_macs_that_are_no_multiple_of_the_weights_are_counted_exactly():
    terms = (Term("a", 3, macs=10), Term("b", 7, macs=22))
    budget = Budget(macs=20).on(terms)
    assert budget.cost("macs", {"a": 1, "b": 1}) == math.ceil(Fraction(10, 3) + Fraction(22, 7))
    fits = {
        (a, b)
        for a in range(1, 4)
        for b in range(1, 8)
        if Fraction(10 * a, 3) + Fraction(22 * b, 7) <= 20
    }  # fmt: skip
    kept = budget.counts({"a": 0.5, "b": 0.5})
    assert (kept["a"], kept["b"]) in fits
    assert (kept["a"] + 1, kept["b"]) not in fits and (kept["a"], kept["b"] + 1) not in fits
