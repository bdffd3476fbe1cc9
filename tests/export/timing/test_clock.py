"""Two nets timed side by side: how many times as fast, how sure that is, and what it is called."""

from __future__ import annotations

import pytest

from allot.export.timing import clock
from allot.export.timing.clock import Speedup, side_by_side, verdict


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a clock says that runs move on."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return now


def test_dense_over_sparse_is_how_many_times_as_fast(seconds: list[float]):
    some = {"dense": [4.0, 6.0, 8.0, 4.0], "sparse": [2.0, 2.0, 2.0, 4.0]}
    taken = {name: iter([second for own in each for second in (9.0, own)]) for name, each in some.items()}

    def run(name: str) -> None:
        seconds[0] += next(taken[name])

    found = side_by_side(lambda: run("dense"), lambda: run("sparse"), seconds=0, least=4)
    assert (found.dense, found.sparse, found.faster) == (5.0, 2.0, 2.5)
    assert found.spread == (1.75, 3.25)  # the inner half of 1, 2, 3, 4


@pytest.mark.parametrize(
    ("times", "spread", "word", "pays"),
    [
        (1.5, (1.2, 1.8), "faster", True),
        (1.5, (0.9, 1.8), "unclear", False),
        (1.04, (1.01, 1.1), "no faster", False),
        (0.97, (0.5, 2.0), "no faster", False),
        (0.5, (0.4, 0.7), "slower", False),
        (0.9, (0.7, 1.2), "unclear", False),
    ],
)
def test_a_verdict_is_given_where_three_rounds_of_four_agree(
    times: float, spread: tuple[float, float], word: str, pays: bool
):
    found = Speedup(times, 1.0, spread)
    assert (found.verdict, found.pays) == (word, pays)


@pytest.mark.parametrize(
    ("times", "word"), [(1.05, "faster"), (1.049, "no faster"), (0.96, "no faster"), (0.95, "slower")]
)
def test_small_differences_have_no_name(times: float, word: str):
    assert verdict(times) == word


def test_slow_nets_are_called_once_a_round_for_three_rounds(seconds: list[float]):
    calls = {"dense": 0, "sparse": 0}

    def run(name: str) -> None:
        calls[name] += 1
        seconds[0] += 2.0 if name == "dense" else 1.0

    found = side_by_side(lambda: run("dense"), lambda: run("sparse"), most=5.0)
    assert calls == {"dense": 3, "sparse": 3} and found.faster == 2.0


def test_fast_nets_are_timed_as_long_as_ever_whatever_the_most(seconds: list[float]):
    calls: list[str] = []

    def run(name: str) -> None:
        calls.append(name)
        seconds[0] += 0.0625

    side_by_side(lambda: run("dense"), lambda: run("sparse"), most=5.0)
    limited = list(calls)
    calls.clear()
    side_by_side(lambda: run("dense"), lambda: run("sparse"))
    assert limited == calls and len(calls) >= 4 * 7
