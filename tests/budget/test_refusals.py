"""What a budget refuses, and what it offers instead."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import BudgetError, InvalidBudget, UsageError

NEAREST = "Nearest that can be met: "


def nearest(error: BudgetError) -> Budget:
    return Budget.parse(str(error).split(NEAREST)[1].rstrip("."))


@pytest.mark.parametrize(
    "value", [0, 1, 1.5, -0.1, math.nan, math.inf, True, False, "0%", "100%", "150%", "1k", "half", "", "0.9.1", "nan"]
)
def test_a_sparsity_out_of_range_is_refused_by_name_and_value(value):
    with pytest.raises(BudgetError, match=r"sparsity=.*like 0\.9 or 90%, is accepted") as refused:
        Budget(sparsity=value)
    assert str(value) in str(refused.value)


@pytest.mark.parametrize("kind", ["params", "macs", "bytes"])
@pytest.mark.parametrize("value", [0, -5, 0.5, 2.5, True, "0%", "100%", "5x", "5 M B", math.nan, math.inf, "-3k", "1e"])
def test_an_amount_out_of_range_is_refused_by_name_and_value(kind, value):
    with pytest.raises(BudgetError, match=f"{kind}=.*is accepted") as refused:
        Budget(**{kind: value})
    assert str(value) in str(refused.value)


@pytest.mark.parametrize("value", ["1e999999999", "1e-999999999", "0e999999999"])
def test_an_absurd_exponent_is_refused_at_once(value):
    with pytest.raises(BudgetError, match="out of range"):
        Budget(params=value)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("params", "20k", 20_000),
        ("params", "20000", 20_000),
        ("params", 1e4, 10_000),
        ("params", "0.5M", 500_000),
        ("params", " 5 k ", 5_000),
        ("macs", "5M", 5_000_000),
        ("macs", "1.5G", 1_500_000_000),
        ("bytes", "300kB", 300_000),
        ("bytes", "3MB", 3_000_000),
        ("bytes", "2MiB", 2 << 20),
        ("bytes", "2kib", 2 << 10),
        ("bytes", "512b", 512),
        ("params", np.int64(1000), 1000),
    ],
)
def test_units_are_read(kind, text, expected):
    terms = (Term("a", 10**9, macs=10**10, dense_bytes=10**10, value_bytes=4),)
    (limit,) = Budget(**{kind: text}).on(terms, full_bytes=10**10).limits
    assert limit.ceiling == expected


def test_units_of_bytes_are_for_bytes():
    with pytest.raises(BudgetError, match="unknown unit 'MB'"):
        Budget(params="3MB")


@pytest.mark.parametrize("value", [np.float32(0.9), np.float64(0.9), 0.9, "0.9", "90%", ".9", "9e-1"])
def test_every_way_to_write_nine_tenths_is_the_same_budget(value):
    (limit,) = Budget(sparsity=value).on((Term("a", 1000),)).limits
    assert limit.ceiling == 100


def test_words_make_a_budget():
    assert Budget.parse("sparsity=0.9") == Budget(sparsity="0.9")
    expected = Budget(macs="50%", bytes="3MB")
    assert Budget.parse("macs=50%, bytes=3MB") == Budget.parse("macs=50%", "bytes = 3MB") == expected
    assert Budget.parse("macs=50% and bytes=3MB") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity", "write KIND=VALUE"),
        ("", "write KIND=VALUE"),
        ("sparsity=", "write KIND=VALUE"),
        ("sparsity=0.9,", "write KIND=VALUE"),
        ("sparsty=0.9", "did you mean 'sparsity'"),
        ("sparsity=0.9,sparsity=0.8", "given twice"),
    ],
)
def test_words_that_make_no_budget_are_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


def test_an_empty_budget_is_refused():
    with pytest.raises(BudgetError, match="empty budget"):
        Budget()
    with pytest.raises(BudgetError, match="empty budget"):
        Budget.parse()


@pytest.mark.parametrize("wished", [{}, {"a": 1.0}])
def test_a_budget_without_a_model_says_so(wished):
    for ask in (Budget(sparsity=0.9).counts, Budget(sparsity=0.9).project):
        with pytest.raises(BudgetError, match="not tied to a model"):
            ask(wished)


def test_an_empty_scope_is_refused():
    with pytest.raises(BudgetError, match="nothing in scope"):
        Budget(sparsity=0.9).on(())


def test_macs_need_to_be_measured():
    with pytest.raises(UsageError, match="example input"):
        Budget(macs="50%").on((Term("a", 10),))


def test_bounds_that_cross_name_the_layer():
    with pytest.raises(BudgetError, match=r"a: .*at least 6 and at most 5 of 10"):
        Term("a", 10, lower=6, upper=5)
    with pytest.raises(BudgetError, match="a: 0 weights"):
        Term("a", 0, lower=0)


@pytest.mark.parametrize(
    ("wished", "message"),
    [
        ({"a": 1.0}, "missing b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "unknown c"),
        ({"a": 1.0, "c": 1.0}, "unknown c; missing b"),
        ({"a": 1.0, "b": -0.1}, "density of b is -0.1"),
        ({"a": 1.0, "b": math.nan}, "density of b is nan"),
        ({"a": 1.0, "b": math.inf}, "density of b is inf"),
        ({"a": 1.0, "b": "0.5"}, "density of b is '0.5'"),
        ({"a": 1.0, "b": None}, "density of b is None"),
    ],
)
def test_a_wish_that_does_not_fit_names_the_layer(wished, message):
    budget = Budget(sparsity=0.5).on((Term("a", 10), Term("b", 10)))
    with pytest.raises(UsageError, match=message):
        budget.counts(wished)


def test_many_differing_layers_are_not_all_listed():
    budget = Budget(sparsity=0.5).on(tuple(Term(f"layer{i}", 10) for i in range(20)))
    with pytest.raises(UsageError, match=r"\(and 15 more\)"):
        budget.counts({})


@pytest.mark.parametrize(
    "given", [0.9, np.float32(0.9), "0.9", ".9", "90%", "90 %", {"sparsity": 0.9}, {"Sparsity": "90%"}, "Sparsity=0.9"]
)
def test_numbers_dicts_and_capitals_are_budgets(given):
    (limit,) = Budget.of(given).on((Term("a", 1000),)).limits
    assert (limit.kind, limit.ceiling) == ("sparsity", 100)


@pytest.mark.parametrize(
    "given",
    [1.5, 0, 1, True, None, [0.9], "9", "100%", "1.5", "0.9,macs=50%", {}, {"speed": 2}, {"macs": None}, 1j, {1: 2}],
)
def test_what_is_no_budget_is_wrong_usage(given):
    with pytest.raises(InvalidBudget) as refused:
        Budget.of(given)
    assert isinstance(refused.value, UsageError) and refused.value.exit_code == 2


@pytest.mark.parametrize("wished", [1.7e308, 1e300, 5e-324, 1e308])
def test_wishes_near_the_largest_float_are_proportions_like_others(wished):
    budget = Budget(sparsity=0.5).on((Term("a", 10), Term("b", 1000), Term("c", 7)))
    expected = budget.counts({"a": 1.0, "b": 1.0, "c": 0.0})
    assert budget.counts({"a": wished, "b": wished, "c": 0.0}) == expected
    with pytest.raises(UsageError, match="density of a is 1"):
        budget.counts({"a": 10**400, "b": 1.0, "c": 0.0})


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 3, 16])),
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(st.sampled_from(["params", "macs", "bytes", "sparsity"]), st.floats(1e-6, 0.999999), min_size=1),
)
def test_every_budget_that_is_offered_is_met(drawn, shares):
    """Bounds that leave one count only among them: floors, caps and several limits move together."""
    terms = tuple(
        Term(
            f"layer{i}", step * n, *sorted((step * (low % (n + 1)), step * (high % (n + 1)))), step, 7 * n + low,
            dense_bytes=4 * step * n, value_bytes=4,
        )
        for i, (n, low, high, step) in enumerate(drawn)
    )  # fmt: skip
    budget = Budget(**{kind: share if kind == "sparsity" else f"{100 * share:.5f}%" for kind, share in shares.items()})
    try:
        budget.on(terms, fixed_bytes=50, full_bytes=5000)
    except BudgetError as error:
        offered = nearest(error).on(terms, fixed_bytes=50, full_bytes=5000)
        assert offered.meets(offered.counts({term.name: 1.0 for term in terms}))
        assert offered.asked.keys() == shares.keys()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=4),
    st.floats(0.0001, 0.9999),
)
def test_a_sparsity_out_of_reach_names_one_that_is_met_exactly(drawn, sparsity):
    bounds = [(total, *sorted((low % (total + 1), high % (total + 1)))) for total, low, high in drawn]
    terms = tuple(Term(f"layer{i}", *bound) for i, bound in enumerate(bounds))
    least, most = sum(term.lower for term in terms), sum(term.upper for term in terms)
    wished = {term.name: 1.0 for term in terms}
    try:
        budget = Budget(sparsity=sparsity).on(terms)
    except BudgetError as error:
        offered = nearest(error).on(terms)
        kept = sum(offered.counts(wished).values())
        assert kept == offered.limits[0].ceiling
        assert kept in (least, most)
    else:
        assert sum(budget.counts(wished).values()) == budget.limits[0].ceiling


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=4),
    st.sets(st.sampled_from(["params", "macs", "bytes", "sparsity"]), min_size=1),
    st.integers(1, 10**5),
)
def test_limits_below_the_floors_name_a_budget_that_can_be_met(drawn, kinds, limit):
    terms = tuple(
        Term(
            f"layer{i}", total, 1 + low % total, -1, 1, 7 * total + low,
            dense_bytes=4 * total, value_bytes=4,
        )
        for i, (total, low) in enumerate(drawn)
    )  # fmt: skip
    budget = Budget(**{kind: "0.99" if kind == "sparsity" else limit for kind in kinds})
    try:
        budget.on(terms, fixed_bytes=50, full_bytes=10**9)
    except BudgetError as error:
        offered = nearest(error)
        assert offered.asked.keys() == kinds
        bound = offered.on(terms, fixed_bytes=50, full_bytes=10**9)
        assert bound.fits(bound.counts({term.name: 1.0 for term in terms}))


def test_a_layer_that_must_stay_whole_is_offered_a_sparsity_that_keeps_it_whole():
    terms = (Term("a", 1),)
    with pytest.raises(BudgetError, match=NEAREST) as refused:
        Budget(sparsity=0.9).on(terms)
    assert nearest(refused.value).on(terms).counts({"a": 1.0}) == {"a": 1}


def test_fixed_bytes_alone_can_be_too_much():
    terms = (Term("a", 100, dense_bytes=400, value_bytes=4),)
    with pytest.raises(BudgetError, match=f"{NEAREST}bytes=5006"):
        Budget(bytes=1000).on(terms, fixed_bytes=5000, full_bytes=5400)
