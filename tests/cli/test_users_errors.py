"""Whatever the user's model or data raise ends the command with one line that names the place, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.command import MLP, SAMPLES, run

PRUNE = "prune {} --data cli.factories:{} --budget sparsity=0.5 --repair distill --set options.distill.steps=9 --out R"


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        ("mlp", "bad_sample", ["RuntimeError: disk read failed", "factories.py:", "in __getitem__", "sample 40"]),
        ("mlp", "bad_sample_in_a_worker", ["RuntimeError: disk read failed", "factories.py:", "in __getitem__"]),
        ("mlp", "dying_worker", ["worker", "exited unexpectedly"]),
        ("mlp", "leaving_sample", ["SystemExit", "in __getitem__"]),
        ("mlp", "scalar", ["one number (3.0)"]),
        ("midway", "samples", ["RuntimeError: out of coffee", "factories.py:", "in forward"]),
    ],
)
def test_what_raises_ends_in_one_line_that_names_the_place(model: str, data: str, says: list[str]):
    outcome = run(PRUNE.format(f"cli.factories:{model}", data))
    assert outcome.code == 2 and outcome.out == ""
    *_, line = outcome.err.splitlines()
    assert line.startswith("error: ") and all(part in line for part in says), line
    assert "Traceback" not in outcome.err and not list(Path().iterdir())


@pytest.mark.parametrize(
    "line",
    [
        "evaluate cli.factories:midway --data cli.factories:bad_sample",
        f"evaluate {MLP} --data cli.factories:bad_sample",
        f"prune {MLP} --budget sparsity=0.5 --data {SAMPLES} --test cli.factories:bad_sample --out R",
        f"sweep {MLP} --budget sparsity=0.5 --data cli.factories:bad_sample --seeds 1 --out R",
        f"search {MLP} --max-drop 5pt --data cli.factories:bad_sample --test {SAMPLES} --out R",
        "plan cli.factories:midway --budget macs=50% --data cli.factories:bad_sample --samples 64",
    ],
)
def test_every_verb_ends_so(line: str):
    outcome = run(line)
    assert outcome.code == 2 and "Traceback" not in outcome.err and outcome.err.splitlines()[-1].startswith("error: ")
    assert not list(Path().iterdir())


def test_debug_shows_the_traceback_wherever_it_stands():
    line = PRUNE.format("cli.factories:midway", "samples")
    for words in (f"--debug {line}", f"{line} --debug"):
        outcome = run(words)
        assert outcome.code == 2 and "Traceback" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("error: RuntimeError: out of coffee")
