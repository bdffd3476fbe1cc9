"""How much worse than dense a score may be: what is accepted, what is refused, and to the last digit."""

from __future__ import annotations

import math

import pytest

from allot import UsageError
from allot.run.max_drop import MaxDrop


@pytest.mark.parametrize(
    ("asked", "dense", "lower", "limit"),
    [
        ("1pt", 0.95, False, 0.94),
        ("0.5 pt", 0.95, False, 0.945),
        ("10%", 0.9, False, 0.81),
        ("0", 0.9, False, 0.9),
        ("2pt", 0.1, True, 0.12),  # an error rate
        ("10%", 20.0, True, 22.0),
        (3, 20.0, True, 23.0),
        ("1.5", 63.2, False, 61.7),
        ("10%", -2.0, False, -2.2),
    ],
)
def test_a_drop_is_points_a_share_of_dense_or_in_the_unit_of_the_score(asked, dense, lower, limit):
    assert MaxDrop.read(asked).limit("score", dense, lower=lower) == pytest.approx(limit)


@pytest.mark.parametrize("asked", ["", "a lot", "-1pt", "1 point", "nan", "inf", "1e999", True, "1pt%"])
def test_what_is_no_drop_is_refused(asked):
    with pytest.raises(UsageError, match=f"max-drop={asked}.*: 1pt .* is accepted"):
        MaxDrop.read(asked)


def test_a_number_that_may_mean_two_things_is_refused_with_both():
    with pytest.raises(UsageError, match=r"top1 is from 0 to 1 \(dense 0.95\).*0.5pt .*or 0.5% "):
        MaxDrop.read("0.5").limit("top1", 0.95)
    with pytest.raises(UsageError, match=r"the dense map is 63.2: 1 \(in its own unit\) or 1% "):
        MaxDrop.read("1pt").limit("map", 63.2)


def test_a_drop_that_allows_everything_and_a_dense_score_that_is_none_are_refused():
    with pytest.raises(UsageError, match=r"max-drop=60pt allows any top1: dense it is 0.5"):
        MaxDrop.read("60pt").limit("top1", 0.5)
    with pytest.raises(UsageError, match="the dense model's r2 is nan"):
        MaxDrop.read("1pt").limit("r2", math.nan)


@pytest.mark.parametrize(
    ("asked", "dense", "sparse", "lower", "met", "text"),
    [
        ("1pt", 0.95, 0.94, False, True, "x fell by 1.00 points, from 0.95 to 0.94; 1pt is allowed"),
        ("1pt", 0.95, 0.927, False, False, "fell by 2.30 points, from 0.95 to 0.927; 1pt is allowed: missed by 1.30"),
        ("1pt", 0.95, 0.96, False, True, "x rose by 1.00 points"),
        ("0pt", 0.95, 0.95, False, True, "x stayed at 0.95; 0pt is allowed"),
        ("10%", 20.0, 24.0, True, False, "x rose by 4, from 20 to 24; 10% is allowed: missed by 2"),
        ("10%", 20.0, 19.0, True, True, "x fell by 1, from 20 to 19"),
        ("1pt", 0.95, math.nan, False, False, "missed by nan"),
    ],
)  # fmt: skip
def test_the_verdict_says_by_how_much(asked, dense, sparse, lower, met, text):
    verdict = MaxDrop.read(asked).verdict("x", dense, sparse, lower=lower)
    assert verdict["met"] is met and text in verdict["text"]
    assert (verdict["kind"], verdict["asked"]) == ("max-drop", asked)


def test_exactly_the_allowed_drop_is_allowed_whatever_rounding_does():
    for total in range(50, 150):
        for right in range(total // 2, total + 1):
            assert MaxDrop.read("10pt").verdict("top1", right / total, right / total - 0.1)["met"]
            assert not MaxDrop.read("10pt").verdict("top1", right / total, right / total - 0.1 - 1e-6)["met"]
