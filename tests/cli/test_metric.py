"""--metric, --max-drop and search on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.command import MLP, SAMPLES, done, refused, run

METRIC = """
import torch

def quality(outputs, targets):
    return {"margin": outputs.max(1).values.mean(), "loss": torch.nn.functional.cross_entropy(outputs, targets)}

def left(model, data):
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)
"""


@pytest.fixture(autouse=True)
def metric():
    Path("mine.py").write_text(METRIC)


def test_evaluate_prints_every_number_of_a_metric():
    said = done(f"evaluate {MLP} --data {SAMPLES} --metric mine.py:quality --json").json
    assert said["metric"] == "margin" and said["samples"] == 40 and said["lower_is_better"] == ["loss"]
    assert said["values"].keys() == {"margin", "loss"}
    line = done(f"evaluate {MLP} --data {SAMPLES} --metric mine.py:quality").err
    assert f"margin {said['score']:.4g}, loss {said['values']['loss']:.4g} (lower is better) on 40 samples" in line
    assert done(f"evaluate {MLP} --data {SAMPLES} --metric mine.py:left --json").json["score"] == 1


def test_a_run_remembers_its_metric():
    line = f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --metric mine.py:left --budget sparsity=0.5"
    line += " --method erk --out RUN"
    scores = done(f"{line} --json").json["scores"]
    assert (scores["metric"], scores["dense"], scores["sparse"]) == ("left", 1, 0.5)
    line = f"evaluate RUN --model {MLP} --data {SAMPLES}"
    assert "give --metric mine.py:left if you trust it" in refused(line)
    assert done(f"{line} --metric mine.py:left --json").json["score"] == 0.5
    shown = done("report RUN").err
    assert "left on held-out data" in shown and "(-50.0 %)" in shown
    assert "left 1 \u2192 0.5 on held-out data" in Path("RUN/report.html").read_text()


def test_a_metric_that_is_none_is_one_line():
    told = refused(f"evaluate {MLP} --data {SAMPLES} --metric mine.py:nothing")
    assert "metric 'mine.py:nothing'" in told and "nothing" in told
    assert "there is nothing to score" in refused(
        f"prune {MLP} --data {SAMPLES} --metric mine.py:left --budget sparsity=0.5 --out RUN"
    )


def test_a_missed_floor_shows_the_run_and_ends_with_exit_code_4():
    line = f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --metric mine.py:left --budget sparsity=0.5"
    line += " --method erk --out RUN"
    missed = run(f"{line} --max-drop 20pt")
    assert missed.code == 4 and "run directory: RUN" in missed.err
    assert "error: left fell by 50.00 points, from 1 to 0.5; 20pt is allowed: missed by 30.00 points." in missed.err
    told = run(f"{line} --max-drop 20pt --json")
    assert told.code == 4 and told.json["guarantees"][0]["met"] is False
    assert done(f"{line} --max-drop 50pt --json").json["guarantees"][0]["met"] is True
    assert "max-drop 50pt" in done("report RUN").err
    assert "max_drop='some'" in refused(f"{line} --max-drop some")


def test_search_ends_with_the_run_that_was_chosen():
    line = f"search {MLP} --data {SAMPLES} --test {SAMPLES} --metric mine.py:left --max-drop 30pt --runs 3"
    line += " --method erk"
    shown = done(f"{line} --out OUT")
    assert shown.out == "" and "found that keeps the score: sparsity=0.25" in shown.err
    assert "run directory: OUT/sparsity-0.25" in shown.err
    told = done(f"{line} --out OUT --json").json
    assert told["best"] == "sparsity-0.25" and told["out"] == "OUT" and len(told["cells"]) == 3
    assert {**json.loads(Path("OUT/results.json").read_text()), "out": "OUT"} == told
    assert len(done("report OUT --json").json["runs"]) == 3
    assert run(f"{line} --max-drop 1pt --out OUT").code == 4


def test_a_search_that_lacks_something_says_so():
    for line, told in (
        (f"search {MLP} --test {SAMPLES} --out OUT", "a search needs --max-drop"),
        (f"search {MLP} --data {SAMPLES} --max-drop 1pt --out OUT", "give --test DATA"),
        (f"search {MLP} --test {SAMPLES} --max-drop 1pt --out OUT --set budget=sparsity=0.5", "leave budget out"),
        (f"search {MLP} --data {SAMPLES} --test {SAMPLES} --max-drop 1pt --kind bytes --out OUT", "sparsity or macs"),
    ):
        assert told in refused(line)
