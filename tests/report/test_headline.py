from __future__ import annotations

import json
from typing import Any

import pytest

from allot.report.headline import Headline, headline, headline_line

PLAIN: dict[str, Any] = {
    "sparsity": 0.9, "budget": [{"kind": "sparsity"}], "macs": None, "latency": None, "exports": [], "scores": None,
    "bytes": {"dense": None, "file": None}, "fidelity": [], "whole": {"weights": {"dense": 1000, "sparse": 102}},
}  # fmt: skip


def export(verdict: str, faster: float | None = None) -> dict[str, Any]:
    milliseconds = {"dense": faster, "sparse": 1.0} if faster else None
    return {"form": "slim", "milliseconds": milliseconds, "faster": faster, "verdict": verdict}


def top1(dense: float, sparse: float) -> dict[str, Any]:
    return {"metric": "top1", "dense": dense, "sparse": sparse}


def test_everything_that_was_measured_is_one_sentence():
    measured = {
        **PLAIN, "scores": top1(0.933, 0.929), "bytes": {"dense": 1_107_816, "file": 160_200},
        "fidelity": [{"stage": "anew", "step": 1, "kl": 0.01, "agreement": 0.981}],
        "exports": [export("computes as dense")],
    }  # fmt: skip
    assert headline(measured) == (
        "90 % of weights removed; top-1 93.3 -> 92.9 on held-out data; agrees with the dense net on 98.1 %; "
        "1.1 MB -> 0.16 MB; not faster here"
    )


def test_what_was_not_measured_is_left_out():
    assert headline(PLAIN) == "90 % of weights removed"
    assert Headline.of(PLAIN).grade == ""


@pytest.mark.parametrize(
    ("scores", "text", "grade"),
    [
        (top1(0.933, 0.94), "top-1 93.3 -> 94.0 on held-out data", "close"),
        (top1(0.933, 0.88), "top-1 93.3 -> 88.0 on held-out data, 5.3 points lost", "loss"),
        (top1(0.933, 0.1), "top-1 93.3 -> 10.0 on held-out data, 83.3 points lost", "far"),
        ({**top1(20.0, 19.0), "metric": "psnr", "values": {}}, "psnr 20 -> 19 on held-out data, 5 % worse", "loss"),
        (
            {**top1(0.5, 0.9), "metric": "mse", "values": {}, "lower_is_better": ["mse"]},
            "mse 0.5 -> 0.9 on held-out data (lower is better), 80 % worse",
            "far",
        ),
        (
            {**top1(0.4, 0.38), "perplexity": {"dense": 12.0, "sparse": 15.0}},
            "perplexity 12 -> 15 on held-out data, 25 % worse",
            "loss",
        ),
        ({**top1(20.0, float("nan")), "values": {}}, "top-1 20 -> nan on held-out data, not finite", "far"),
    ],
)
def test_a_loss_is_named_and_graded(scores: dict[str, Any], text: str, grade: str):
    found = Headline.of({**PLAIN, "scores": scores})
    assert (found.score, found.grade) == (text, grade)


def test_a_loss_stands_out_in_a_terminal():
    styles = [str(headline_line({**PLAIN, "scores": top1(0.9, score)}).style) for score in (0.9, 0.86, 0.3)]
    assert styles == ["bold", "bold yellow", "bold red"]
    assert headline_line(PLAIN).plain == headline(PLAIN)


def test_a_scope_that_is_half_of_the_model_is_not_passed_off_as_all_of_it():
    half = {**PLAIN, "whole": {"weights": {"dense": 1000, "sparse": 550}}}
    assert headline(half) == "90 % of weights in scope (45 % of all weights) removed"


def test_a_budget_on_macs_names_them_first():
    limited = {**PLAIN, "budget": [{"kind": "macs"}], "macs": {"dense": 1000, "sparse": 500}}
    assert headline(limited) == "50 % of MACs and 90 % of weights removed"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([export("faster", 1.83)], "1.8x as fast here"),
        ([export("no faster", 1.01)], "not faster here"),
        ([export("slower", 0.5)], "slower here (0.5x as fast)"),
        ([export("unclear", 1.2)], "speed unclear here"),
        ([], ""),
    ],
)
def test_speed_is_what_was_measured_here(rows: list[dict[str, Any]], text: str):
    assert Headline.of({**PLAIN, "exports": rows}).speed == text


@pytest.mark.parametrize(
    ("dense", "small", "text"),
    [
        (330_000_000, 44_100_000, "330 MB -> 44 MB"),
        (5_120, 900, "5.1 kB -> 0.9 kB"),
        (1_000, 1_200, "1 kB -> 1.2 kB, not smaller"),
    ],
)
def test_both_sizes_have_the_unit_of_the_dense_file(dense: int, small: int, text: str):
    assert Headline.of({**PLAIN, "bytes": {"dense": dense, "file": small}}).bytes == text


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"error": 0.0312}, "relative error 0.0312 from the dense net"),
        ({"kl": None, "agreement": 0.1}, "outputs are not finite"),
    ],
)
def test_outputs_that_are_no_classes_have_a_distance(entry: dict[str, Any], text: str):
    assert Headline.of({**PLAIN, "fidelity": [{"stage": "bn", "step": 1, **entry}]}).fidelity == text


def test_the_report_of_a_run_has_a_headline(runs):
    for name, removed in (("fcpts", "70 % of weights"), ("dsa", "% of MACs and")):
        assert removed in headline(json.loads((runs[name] / "report.json").read_text()))
