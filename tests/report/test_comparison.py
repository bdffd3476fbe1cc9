"""Several runs side by side: what differs in nothing but the seed is one; what differs in more is told apart."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

import allot
from allot.report.comparison import comparison_page
from allot.report.seed_groups import choices_of, seed_groups, series_names, without_copies
from contract.cases import CASES
from report.pages import SCORES, Seen, browsed, in_a_browser, report

NAN = float("nan")


@pytest.fixture(scope="module")
def told(runs: dict[str, Path]) -> dict[str, Any]:
    """A report of a run that was scored."""
    settings = {"samples": 16, "hyperparameters": {"allocate": {"steps": 8}}, "digest": "a"}
    return {**report(runs["erk"]), "scores": SCORES, "model": "net", "settings": settings}


def scored(told: dict[str, Any], sparse: float, **other: Any) -> dict[str, Any]:
    """The report of another run; keys with dots go into settings, scores and the like."""
    made = copy.deepcopy({**told, "scores": {**told["scores"], "sparse": sparse}})
    for key, value in other.items():
        first, _, rest = key.partition("__")
        if rest:
            made[first] = {**made[first], rest: value}
        else:
            made[first] = value
    return made


def asked(told: dict[str, Any], sparsity: str) -> list[dict[str, Any]]:
    return [{**told["budget"][0], "asked": sparsity}]


def summaries(page: str) -> list[list[str]]:
    """The rows of all rankings, one after the other."""
    rows = Seen(page).rows
    width = next(len(row) for row in rows if row[0] == "method and budget")
    return [row for row in rows if len(row) == width and row[0] != "method and budget"]


def test_runs_that_differ_in_the_seed_are_one_point_with_a_spread(told: dict[str, Any]):
    found = [0.8, 0.83, 0.79]
    page = comparison_page([(f"run {seed}", scored(told, score, seed=seed)) for seed, score in enumerate(found)])
    mean, spread = statistics.mean(found), statistics.stdev(found)
    ((name, score, change, removed, *_),) = summaries(page)
    assert change == f"{100 * (mean - 0.9):+.2f} points"
    assert score == f"{100 * mean:.1f} % ± {100 * spread:.2f}3 seeds" and name == "erk, sparsity=0.7"
    assert removed == f"{100 * told['sparsity']:.1f} %"
    (same,) = seed_groups([(str(seed), scored(told, score, seed=seed)) for seed, score in enumerate(found)])
    assert same.caption == f"erk, sparsity=0.7: {mean:.4f} ± {spread:.4f}, 3 seeds"
    other = scored(told, 0.9, sparsity=0.5, budget=asked(told, "0.5"))
    page = comparison_page([("a", scored(told, 0.8)), ("b", scored(told, 0.81, seed=1)), ("other", other)])
    assert page.count("<circle") == 2 * 3 and page.count('class="spread"') == 3  # three charts
    seen = Seen(page)
    assert not seen.open and seen.text.count("bars: one standard deviation") == 3 and "-10.00" in seen.text
    assert "standard deviation" not in comparison_page([("a", scored(told, 0.8)), ("other", other)])


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"score": "random"}, "score random"),
        ({"pattern": "2:4"}, "pattern 2:4"),
        ({"repair": []}, "repair none"),
        ({"allocate": "lamp", "method": "lamp"}, "lamp"),
        ({"method": "uniform", "allocate": "uniform", "score": "random"}, "uniform, score random"),
        ({"model": "other"}, "other: erk"),
        ({"settings__samples": 7}, "samples 7"),
        ({"settings__options": {"variance": {"limit": 3}}}, "variance.limit 3"),
        ({"settings__hyperparameters": {"allocate": {"steps": 9}}}, "allocate.steps 9"),
        ({"settings__digest": "abc"}, "digest abc"),
        ({"settings__data": "zoo:other"}, "data zoo:other"),
        ({"settings__test": "folder:test"}, "test folder:test"),
        ({"settings__device": "cuda"}, "device cuda"),
        ({"scores__samples": 11}, "test samples 11"),
        ({"scores__dense": 0.95}, "dense score 0.95"),
        ({"scores__metric": "token_top1"}, "metric token_top1"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_told_apart(told: dict[str, Any], other: Any, word: str):
    pair = [("a", scored(told, 0.8)), ("b", scored(told, 0.1, **other))]
    first, second = summaries(comparison_page(pair))
    assert "±" not in first[1] + second[1] and "seeds" not in first[1] + second[1]
    assert word in second[0] and first[0] != second[0]
    assert word not in first[0]


def test_a_name_says_no_more_than_what_differs(told: dict[str, Any]):
    fcpts = {"method": "fcpts", "allocate": "fcpts", "repair": ["bn"], "settings__hyperparameters": {"x": 1}}
    assert [same.name for same in seed_groups([("a", scored(told, 0.8)), ("b", scored(told, 0.8, **fcpts))])] == [
        "erk", "fcpts",
    ]  # fmt: skip
    short = {**fcpts, "settings__options": {"fcpts": {"steps": 6}}}
    assert [same.name for same in seed_groups([("a", scored(told, 0.8)), ("b", scored(told, 0.8, **short))])] == [
        "erk", "fcpts",
    ]  # fmt: skip
    pair = seed_groups([("a", scored(told, 0.8, score="wanda")), ("b", scored(told, 0.8, **fcpts))])
    assert [same.name for same in pair] == ["erk, score wanda", "fcpts, score magnitude"]


def test_series_that_differ_have_names_that_differ(told: dict[str, Any]):
    choices = {
        "method": ["erk", "fcpts", "custom"], "score": ["magnitude", "random"], "settings__samples": [None, 64],
        "repair": [[], ["bn"], ["bn", "variance"]], "settings__digest": ["a", "b"],
        "settings__hyperparameters": [{}, {"x": {"y": 1}}],
    }  # fmt: skip
    every = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    drawn = random.Random(0)
    for _ in range(30):
        some = [choices_of(scored(told, 0.8, **one)) for one in drawn.sample(every, drawn.randint(1, 12))]
        distinct = {json.dumps(chosen, sort_keys=True): chosen for chosen in some}
        assert len(set(series_names(list(distinct.values())))) == len(distinct)


@pytest.mark.parametrize("label", ["a", "a copy"])
def test_a_run_that_is_given_twice_counts_once(told: dict[str, Any], label: str):
    pair = [("a", scored(told, 0.8)), (label, scored(told, 0.8))]
    assert len(without_copies(pair)) == 1
    page = comparison_page([*pair, ("b", scored(told, 0.7, seed=1))])
    assert "2 runs side by side" in page and "2 seeds" in page
    assert len(Seen(page).table("score, dense")) == 3


def test_a_seed_that_was_run_twice_is_one_seed(told: dict[str, Any]):
    again = scored(told, 0.6, seconds={"allocate": 9})
    (same,) = seed_groups([("a", scored(told, 0.8)), ("b", again), ("c", scored(told, 0.5, seed=1))])
    assert same.scores == pytest.approx([0.7, 0.5]) and "2 seeds" in same.caption
    (alone,) = seed_groups([("a", scored(told, 0.8)), ("b", again)])
    assert alone.spread is None and "seed" not in alone.caption


def test_one_budget_in_other_words_is_one_budget(told: dict[str, Any]):
    words = ["0.9", "0.90", "90%"]
    (same,) = seed_groups([(text, scored(told, 0.8, seed=i, budget=asked(told, text))) for i, text in enumerate(words)])
    assert same.budget == "sparsity=0.9" and len(same.runs) == 3


def test_metrics_do_not_share_an_axis(told: dict[str, Any]):
    pair = [
        ("a", scored(told, 0.8)),
        ("b", scored(told, 0.7, sparsity=0.6, budget=[{**told["budget"][0], "asked": "0.6"}])),
    ]
    text = [(label + "t", {**run, "scores": {**run["scores"], "metric": "token_top1"}}) for label, run in pair]
    page = comparison_page([*pair, *text])
    assert page.count("<svg") == 6 and page.count("<circle") == 12
    seen = Seen(page).text
    assert seen.count("Score (top1)") == seen.count("Score (token_top1)") == 3
    assert "90.0 % top1" in seen and "90.0 % token_top1" in seen
    best = re.findall(r"The highest score is that of erk, metric (\w+) at sparsity=0.7 \(80.0 %\)", seen)
    assert best == ["top1", "token_top1"]  # each metric by itself


def test_a_score_that_is_no_number_spoils_no_mean(told: dict[str, Any]):
    page = comparison_page([(str(s), scored(told, sparse, seed=s)) for s, sparse in enumerate((0.8, NAN, 0.7))])
    ((_, score, *_),) = summaries(page)
    assert score.startswith("75.0 % ±") and "2 seeds" in score and "nan" in page
    page = comparison_page([(str(s), scored(told, NAN, seed=s)) for s in range(2)])
    assert summaries(page)[0][1] == "not a number"
    unscored = {**told, "scores": None}
    seen = Seen(comparison_page([("a", unscored), ("b", {**unscored, "seed": 1})]))
    assert "None of these runs was scored" in seen.text and not seen.open


def test_the_dense_score_is_a_level_where_all_runs_have_it(told: dict[str, Any]):
    pair = [("a", scored(told, 0.8)), ("b", scored(told, 0.8, method="other"))]
    assert comparison_page(pair).count('class="limit"') == 3
    pair[1][1]["scores"]["dense"] = 0.7
    assert 'class="limit"' not in comparison_page(pair)


def test_the_layer_that_keeps_most_is_that_of_all_seeds(told: dict[str, Any]):
    names = [row["name"] for row in told["layers"]][:3]
    kept = ([0.9, 0.8, 0.1], [0.1, 0.8, 0.2])
    runs = []
    for seed, densities in enumerate(kept):
        layers = [{**row, "density": d} for row, d in zip(told["layers"], densities, strict=False)]
        runs.append((str(seed), scored(told, 0.8, seed=seed, layers=layers)))
    assert summaries(comparison_page(runs))[0][-1] == f"{names[1]}, 80.0 %"


def test_what_failed_is_named_with_its_reason(told: dict[str, Any]):
    failed = [{"method": "<b>", "budget": "bytes=10", "seed": seed, "error": "10 & more"} for seed in (0, 2)]
    seen = Seen(comparison_page([("a", told), ("b", {**told, "seed": 1})], failed=failed))
    assert "<b>, bytes=10, seeds 0, 2: 10 & more" in seen.text
    assert "Runs that failed" not in comparison_page([("a", told)])


@pytest.mark.parametrize("minutes", [None, 5.0])
def test_a_saved_run_says_all_that_decided_it(minutes: float | None, tmp_path: Path):
    case = CASES["with batch norm"]
    found = []
    for name, steps, seed in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        result = allot.prune(
            case.make(), case.inputs(8), "sparsity=0.5", method="fcpts", options={"fcpts": {"steps": steps}},
            seed=seed, save_to=tmp_path / name, max_minutes=minutes,
        )  # fmt: skip
        found.append((name, report(tmp_path / name)))
        assert result.report()["settings"] == found[-1][1]["settings"]
    assert [(same.name, len(same.runs)) for same in seed_groups(found)] == [
        ("fcpts, fcpts.steps 3", 2),
        ("fcpts, fcpts.steps 4", 1),
    ]
    assert ("hyperparameters" in found[0][1]["settings"]) is (minutes is None)  # a cut depends on the machine


PLACED = """
  const rows = [...document.querySelectorAll(".cards tbody tr")].map(row => row.getBoundingClientRect());
  const beyond = cell => cell.getBoundingClientRect().right > WIDTH;
  const seen = [...document.querySelectorAll(".cards tbody td")].filter(beyond);
  const clipped = [...document.querySelectorAll(".wide")].filter(box => box.scrollWidth > box.clientWidth + 1).length;
  const head = document.querySelector(".cards th"); head.click();
  const chart = document.querySelector("svg").getBoundingClientRect().top, wide = document.documentElement.scrollWidth;
  return {bottom: rows.at(-1).bottom, chart, hidden: seen.length, clipped, wide};"""


@in_a_browser
@pytest.mark.parametrize(("width", "tall"), [(375, 1100), (1440, 1000)])
def test_score_size_speed_and_the_widest_layer_of_six_runs_are_in_the_first_screen(
    told: dict[str, Any], width: int, tall: int, tmp_path: Path
):
    six = [
        (f"{method}/sparsity={some}/seed-0", scored(told, 0.8, method=method, budget=asked(told, some)))
        for some, method in itertools.product(("0.8", "0.9", "0.95"), ("erk", "fcpts"))
    ]
    found, said = browsed(comparison_page(six), tmp_path, width=width, probe=PLACED.replace("WIDTH", str(width)))
    assert found["bottom"] <= tall and found["bottom"] < found["chart"]
    assert found["hidden"] == 0 and found["wide"] <= max(width, 500) and "CONSOLE" not in said
    assert width == 375 or found["clipped"] == 0
