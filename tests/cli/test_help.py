"""The help, and what is said before torch is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from allot import METHODS, RECIPES, SCORES
from allot.cli import names
from allot.cli.verbs import VERBS
from allot.export.export import EVERY
from allot.methods import ALLOCATORS, REPAIRS
from allot.run.scores import CHANNEL_SCORES
from allot.sources import zoo
from cli.command import MLP, NET, done, refused, run

PANELS = ["What is pruned", "Budget and guarantees", "Method", "Data", "Speed and memory", "Output"]
NO_TORCH = """
import sys
from importlib.abc import MetaPathFinder

class Refused(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("torch was imported")

sys.meta_path.insert(0, Refused())
from allot.cli.main import main
for line in sys.argv[1].split("|"):
    sys.argv[1:] = line.split()
    try:
        main()
    except SystemExit as ended:
        print(f"\\n[{line}] ended with {ended.code}", flush=True)
"""


def without_torch(*lines: str) -> str:
    """What the lines print, in a process that cannot import torch."""
    command = [sys.executable, "-c", NO_TORCH, "|".join(lines)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def test_help_and_what_is_wrong_with_names_and_places_need_no_torch():
    Path("letter.txt").write_text("dear")
    wrong = {
        f"prune {NET} --budget much": "much",
        f"prune {NET} --budget 0.9 --method bset": "did you mean 'best'?",
        f"prune {NET} --budget 0.9 --allocate lampp": "did you mean 'lamp'?",
        f"prune {NET} --budget 0.9 --score magnitud": "did you mean 'magnitude'?",
        f"prune {NET} --budget 0.9 --repair bn,varianc": "did you mean 'variance'?",
        f"prune {NET} --budget 0.9 --out letter.txt": "letter.txt is a file",
        f"prune {NET} --budget 0.9 --weights none.pt": "none.pt: no such file",
        f"prune {NET} --budget 0.9 --data npz:none.npz": "none.npz: no such file",
        f"prune {NET} --budget 0.9 --data zoo:digit": "did you mean 'digits'?",
        f"prune {NET} --budget 0.9 --max-drop much": "max_drop",
        "prune zoo:digits-resnet2 --budget 0.9": "did you mean 'digits-resnet20'?",
        "prune net.py:make --budget 0.9": "No such file",
        "prune": "no MODEL",
        "prnue": "Did you mean 'prune'?",
        "prune --budgte 0.9": "--budget",
        f"plan {NET} --budget 0.9 --save none/plan.json": "there is no folder none",
    }
    right = ["", "--help", "-h", "--version", *(f"{verb} -h" for verb in VERBS)]
    shown = without_torch(*right, *wrong)
    for line in right:
        assert f"[{line}] ended with 0" in shown
    for line, told in wrong.items():
        before, ending, _ = shown.partition(f"[{line}] ended with 2")
        assert ending, f"{line}\n{shown}"
        assert told in before.rpartition("ended with")[2], line


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("width", [80, 120])
def test_every_verb_shows_three_examples_that_fit_a_line(verb: str, width: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = done(f"{verb} --help").out
    assert shown == done(f"{verb} -h").out and max(map(len, shown.splitlines())) <= width
    examples = [line.strip() for line in shown.partition("Examples:")[2].splitlines() if line.strip()]
    assert len(examples) == 3 and all(line.startswith("allot ") for line in examples)
    assert any(line.startswith(f"allot {verb}") for line in examples)


def test_the_examples_are_lines_that_the_verbs_can_read(monkeypatch: pytest.MonkeyPatch):
    for verb in VERBS.values():
        for example in verb.examples:
            error = run(f"{example} --nonsense").err
            assert "No such option: --nonsense" in error, example


def test_the_options_of_prune_stand_in_panels_by_subject():
    titles = re.findall(r"─ ([A-Z][\w ]+) ─", done("prune --help").out)
    assert [title for title in titles if title not in ("Arguments", "Options")] == PANELS
    assert "[none]" in done("prune --help").out  # a default, and no markup


def test_bare_allot_shows_the_help_and_ends_with_0():
    outcome = run("")
    assert (outcome.code, outcome.err) == (0, "") and outcome.out.strip() == done("--help").out.strip()


@pytest.mark.parametrize("verb", ["prune", "plan", "sweep", "search", "advise"])
@pytest.mark.parametrize("words", ["", "--weights none.pt", "--set x", "--set seed=[", "--input wide"])
def test_a_missing_model_is_said_before_anything_else(verb: str, words: str):
    if "--set" in words and verb == "advise":
        return
    error = refused(f"{verb} {words}")
    assert error.startswith("error: no MODEL") and f"allot {verb} --help" in error
    assert "no MODEL" in refused("prune --seed one --budget much")


def test_a_recipe_may_name_the_model():
    Path("recipe.yaml").write_text(f"model: {NET}\nbudget: 0.5\n")
    done("plan --recipe recipe.yaml")
    Path("recipe.yaml").write_text("seed: one\n")
    assert "no MODEL" in refused("plan --recipe recipe.yaml")


def test_names_are_read_from_the_tables_that_the_methods_stand_in():
    assert (names.allocator_names(), names.repair_names()) == (list(ALLOCATORS), list(REPAIRS))
    assert METHODS.keys() == ALLOCATORS.keys() | REPAIRS.keys()
    assert {METHODS[name].role for name in ALLOCATORS} == {"allocate"}
    assert {METHODS[name].role for name in REPAIRS} == {"repair"}
    assert set(names.score_names()) == SCORES.keys() | CHANNEL_SCORES.keys()
    assert names.method_names() == list(RECIPES)
    assert names.models() == sorted(f"zoo:{name}" for name in zoo.MODELS)


def test_the_forms_of_an_export_are_all_named():
    shown = " ".join(done("export --help").out.replace("│", " ").split())
    assert all(form in shown for form in EVERY)


def test_the_shell_completes_verbs_and_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_ALLOT_COMPLETE", "complete_bash")
    for words, wanted in (
        ("allot pr", "prune"), ("allot prune --method be", "best"), ("allot prune zoo:dig", "zoo:digits-resnet20")
    ):  # fmt: skip
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert wanted in run("").out.split(), words


# The run directory of a command that names none


def place_of(words: str) -> str:
    known = [str(path) for path in Path().glob("runs/*")]
    outcome = done(f"prune {MLP} --repair none --json {words}")
    place = outcome.json["run"]
    assert place in known or f"run directory: {place}\n" in outcome.err
    return place


def test_a_run_without_a_place_is_named_after_model_method_and_budget():
    assert place_of("--budget sparsity=0.5") == "runs/factories-mlp-erk-sparsity-0.5"
    assert place_of("--budget params=50% --method lamp --input 6") == "runs/factories-mlp-lamp-params-50pct"
    assert place_of("--budget params=50% --allocate uniform") == "runs/factories-mlp-uniform-params-50pct"


def test_the_same_command_finds_its_run_again_and_another_one_leaves_it_alone():
    first = place_of("--budget 0.5")
    before = {path.name: path.read_bytes() for path in Path(first).iterdir()}
    assert place_of("--budget 0.5") == first
    assert place_of("--budget 0.5 --seed 3") == f"{first}-2"
    assert place_of("--budget 0.5 --seed 3") == f"{first}-2"
    Path(f"{first}-3").mkdir()
    (Path(f"{first}-3") / "letter.txt").write_text("dear")
    assert place_of("--budget 0.5 --seed 4") == f"{first}-4"
    assert {path.name: path.read_bytes() for path in Path(first).iterdir()} == before


def test_an_unfinished_run_without_a_place_resumes():
    place = Path(place_of("--budget 0.5"))
    content = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps({**content, "state": "stopped"}))
    assert place_of("--budget 0.5") == str(place)
    assert json.loads((place / "run.json").read_text())["state"] == "done"
