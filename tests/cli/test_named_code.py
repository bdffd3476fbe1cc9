"""No file of a run directory names code that a command then runs: the command line names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cli.command import MLP, SAMPLES, done, refused, run

EVIL = "from pathlib import Path\nfrom cli.factories import *\nPath('ran').touch()\n"
KEYS = ("model", "data", "test", "metric", "outputs")


@pytest.fixture
def sent():
    """A run directory as somebody may send it: wherever a place can stand, it names code that leaves a trace."""
    done(f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --budget sparsity=0.5 --repair none --out RUN")
    Path("evil.py").write_text(EVIL)
    places = {"model": "evil.py:mlp", "data": "evil.py:samples", "test": "evil:samples"}
    places |= {"metric": "evil.py:mlp", "outputs": "evil.py:mlp", "options": {"distill": {"outputs": "evil.py:mlp"}}}
    content = json.loads(Path("RUN/run.json").read_text())
    content["recipe"] |= places
    Path("RUN/run.json").write_text(json.dumps(content))
    Path("RUN/recipe.yaml").write_text(yaml.safe_dump(content["recipe"]))
    return places


@pytest.mark.parametrize(
    "line",
    [
        "evaluate RUN",
        f"evaluate RUN --model {MLP}",
        f"evaluate RUN --data {SAMPLES}",
        f"evaluate RUN --model {MLP} --data {SAMPLES}",
        "export RUN --to bitmask",
        f"export RUN --to bitmask --model {MLP}",
        f"export RUN --to program --data {SAMPLES}",
        "verify RUN",
        "report RUN",
        "report RUN RUN",
        "prune --recipe RUN/recipe.yaml --out B",
        f"prune {MLP} --recipe RUN/recipe.yaml --out B",
        f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --recipe RUN/recipe.yaml --out B",
        "plan --recipe RUN/recipe.yaml --budget sparsity=0.5",
        "sweep --recipe RUN/recipe.yaml --budget sparsity=0.5 --out S",
        "search --recipe RUN/recipe.yaml --max-drop 1pt --out S",
        f"prune {MLP} --budget sparsity=0.5 --repair none --allocate RUN --out B",
    ],
)
def test_code_that_a_run_directory_names_is_not_run(sent, line):
    outcome = run(line)
    assert outcome.code in (0, 2, 4) and "Traceback" not in outcome.err
    assert not Path("ran").exists()


def test_the_error_names_the_key_the_code_and_the_option(sent):
    assert "RUN names code as its model (evil.py:mlp)" in (said := refused("evaluate RUN"))
    assert "give --model evil.py:mlp --data evil.py:samples if you trust it" in said
    assert "as its test (evil:samples)" in (said := refused(f"evaluate RUN --model {MLP}")) and "give --data" in said
    assert "give --metric" in refused(f"evaluate RUN --model {MLP} --data {SAMPLES}")
    assert "give --data evil.py:samples" in refused(f"export RUN --to bitmask --model {MLP}")
    assert "give evil.py:mlp as MODEL" in refused("prune --recipe RUN/recipe.yaml --out B")
    given = f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --recipe RUN/recipe.yaml --out B --metric evil.py:left"
    assert "give --outputs evil.py:mlp" in refused(given)
    assert "give --set options.distill.outputs=evil.py:mlp" in refused(f"{given} --outputs cli.factories:mlp")


def test_code_of_the_command_line_is_run():
    done(f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --budget sparsity=0.5 --repair none --out RUN")
    assert done(f"evaluate RUN --model {MLP} --data {SAMPLES} --json").json["samples"] == 40
    assert done(f"export RUN --to bitmask --model {MLP} --data {SAMPLES} --json").json["error"] == 0
    assert "no run directory" in refused(f"evaluate {MLP} --model {MLP} --data {SAMPLES}")


def test_a_recipe_outside_of_a_run_directory_names_code_as_ever():
    Path("mine.yaml").write_text(f"model: {MLP}\ndata: {SAMPLES}\nbudget: sparsity=0.5\nrepair: none\n")
    done("prune --recipe mine.yaml --out RUN")
    Path("mine.yaml").rename("RUN/recipe.yaml")
    assert "copy the recipe to another directory" in refused("prune --recipe RUN/recipe.yaml --out B")


@pytest.mark.parametrize("recipe", [[], "x", {"model": ["zoo:digits-resnet20"]}, {"model": {"a": 1}}, {"input": -1}])
def test_a_recorded_recipe_of_another_form_is_one_line(recipe):
    Path("RUN").mkdir()
    Path("RUN/run.json").write_text(json.dumps({"state": "done", "recipe": recipe}))
    refused(f"evaluate RUN --data {SAMPLES}")


def test_a_table_of_a_sweep_names_runs_inside_of_it():
    done(f"prune {MLP} --budget sparsity=0.5 --repair none --out RUN")
    Path("SWEEP").mkdir()
    for place in ("../RUN", str(Path("RUN").resolve())):
        Path("SWEEP/results.json").write_text(json.dumps({"cells": [{"run": place}]}))
        assert "is no run of that sweep" in refused("report SWEEP")
