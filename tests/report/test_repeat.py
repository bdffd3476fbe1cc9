"""The command on a page makes the same run again, and its Python loads the result."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch

from allot.report.repeat import load_snippet, repeat_command
from cli.command import done
from report.pages import Seen, report


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


MLP = "cli.factories:mlp --data cli.factories:samples"


@pytest.mark.parametrize(
    "choices",
    [
        "--budget sparsity=0.5 --method erk",
        "--budget sparsity=0.6 --allocate lamp --repair bias --score random --seed 3 --samples 24 --exclude 0.weight",
        "--budget params=60% --method fcpts --set options.fcpts.steps=3 --min-density 2.weight=0.2 --batch-norm frozen",
        "--budget macs=50% --method uniform --pattern channels --repair none --floor 2 --max-drop 20pt "
        "--test cli.factories:samples",
    ],
)
def test_the_command_of_a_page_makes_the_same_run_again(choices: str):
    done(f"prune {MLP} {choices} --out 'a run'")
    first = report(Path("a run"))
    command = repeat_command(first, out="again")
    page = Seen(Path("a run/report.html").read_text()).text
    assert repeat_command(first) in page and "allot verify 'a run'" in page
    done(shlex.join(shlex.split(command.replace("\\\n", ""))[1:]))
    second = report(Path("again"))
    for key in ("budget", "layers", "kept", "method", "allocate", "score", "repair", "seed", "settings", "scores"):
        assert second[key] == first[key], key
    assert Path("again/model.safetensors").read_bytes() == Path("a run/model.safetensors").read_bytes()


def test_the_python_of_a_page_loads_the_sparse_weights():
    done(
        "prune zoo:digits-resnet20 --data zoo:digits-resnet20 --budget sparsity=0.9 --method erk --repair none --out R"
    )
    snippet = load_snippet(report(Path("R")), "R")
    assert snippet in Seen(Path("R/report.html").read_text()).text
    names: dict[str, torch.nn.Module] = {}
    exec(snippet, names)
    kept = sum(int((names["model"].get_parameter(row["name"]) != 0).sum()) for row in report(Path("R"))["layers"])
    assert kept == report(Path("R"))["kept"]


def test_a_run_made_in_python_has_no_command(runs: dict[str, Path]):
    assert repeat_command(report(runs["erk"])) == ""
    assert "was made in Python" in (runs["erk"] / "report.html").read_text()
    assert "load_slim" in (runs["dsa"] / "report.html").read_text()
