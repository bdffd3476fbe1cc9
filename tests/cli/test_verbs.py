"""What every verb prints and returns when all is well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

import pytest
import torch

from allot import METHODS, RECIPES, load
from allot.cli import methods
from allot.cli.option_words import WORDS, words_of
from allot.export.files.formats import save_tensors
from allot.methods import VARIANTS
from allot.pruning.assemble import options_of
from cli.command import FACTORIES, MLP, NET, SAMPLES, done, refused, run

REPORT = {
    "allot", "model", "method", "pattern", "seed", "budget", "kept", "total", "sparsity", "macs", "bytes", "layers",
    "skipped", "weights", "scores", "seconds", "images",
}  # fmt: skip


@pytest.fixture
def pruned(tmp_path_factory):
    """A copy of one run; where a run lies does not matter."""
    made = tmp_path_factory.getbasetemp() / "verbs" / "RUN"
    if not made.exists():
        done(f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --budget sparsity=0.5 --out {made}")
    shutil.copytree(made, "RUN")
    return "RUN"


def test_prune_prints_the_report_and_the_run_as_one_json_object():
    scored = "--test cli.factories:answered"  # where the net is at chance, a warning says so
    outcome = done(f"prune {MLP} --data {SAMPLES} {scored} --budget sparsity=0.5 --method erk --out RUN --json")
    said = outcome.json
    assert outcome.err == ""
    assert said.pop("run") == "RUN"
    with open("RUN/report.json") as file:
        assert said == json.load(file)
    assert said.keys() >= REPORT
    assert said["model"] == MLP and said["method"] == "erk" and said["pattern"] == "unstructured" and said["seed"] == 0
    assert (said["kept"], said["total"], said["sparsity"]) == (80, 160, 0.5)
    assert [set(row) for row in said["budget"]] == [{"kind", "asked", "limit", "achieved", "met"}]
    assert said["macs"] == {"dense": 160, "sparse": 80}
    assert said["bytes"].keys() == {"dense", "file", "with_ideal_mask"}
    assert [set(row) for row in said["layers"]] == [{"name", "shape", "kept", "total", "density", "macs", "price"}] * 2
    assert said["skipped"] == {"0.bias": "bias", "2.bias": "bias"}
    assert {"metric", "dense", "sparse"} <= said["scores"].keys() and said["scores"]["metric"] == "top1"
    assert said["images"].keys() == {"forward", "backward"}
    assert all(isinstance(seconds, float) for seconds in said["seconds"].values())


def test_prune_without_labelled_data_has_no_scores():
    assert (
        done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method erk --out RUN --json").json["scores"] is None
    )


def test_the_first_line_at_the_end_is_the_headline(pruned):
    from_prune = done(f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --budget sparsity=0.5 --out RUN").err.splitlines()
    from_report = done("report RUN").err.splitlines()
    (line,) = [line for line in from_prune if "50 % of weights removed; top-1 " in line]
    assert from_report[0] == line and from_prune.index(line) < from_prune.index(from_report[1])


def test_prune_shows_people_tables_on_standard_error_and_nothing_on_standard_output():
    outcome = done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method erk --out RUN")
    assert outcome.out == ""
    assert (
        "sparsity=0.5" in outcome.err
        and "checks of the re-opened files passed" in outcome.err
        and "run directory: RUN" in outcome.err
    )


def test_a_finished_run_is_shown_again_and_not_made_again(pruned):
    again = done(f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --budget sparsity=0.5 --out RUN --json").json
    assert again.pop("run") == "RUN"
    with open("RUN/report.json") as file:
        assert again == json.load(file)


def test_plan_needs_no_data_and_says_what_prune_would_keep():
    said = done(f"plan {NET} --budget sparsity=0.9 --json").json
    keys = {"model", "method", "pattern", "budget", "kept", "total", "layers", "skipped", "weights", "whole"}
    assert said.keys() == keys and said["budget"][0]["met"] is True
    done(f"prune {NET} --budget sparsity=0.9 --repair none --out RUN")
    assert said["layers"] == done("report RUN --json").json["layers"]
    shown = done(f"plan {NET} --budget sparsity=0.9")
    assert shown.out == "" and "classify.weight" in shown.err


def test_plan_counts_macs_on_data_where_the_model_says_nothing_about_its_inputs():
    said = done(f"plan {MLP} --data {SAMPLES} --budget macs=50% --json").json
    assert said["budget"][0]["achieved"] == 80
    assert done(f"plan {MLP} --input 6 --budget macs=50% --json").json["layers"] == said["layers"]


def test_evaluate_prints_metric_score_and_samples(pruned):
    for target in (MLP, f"{pruned} --model {MLP}"):
        said = done(f"evaluate {target} --data {SAMPLES} --json").json
        assert said.keys() == {"metric", "score", "samples"}
        assert said["metric"] == "top1" and said["samples"] == 40 and 0 <= said["score"] <= 1
    shown = done(f"evaluate {MLP} --data {SAMPLES}")
    assert shown.out == "" and "on 40 samples" in shown.err


def test_evaluate_says_where_a_model_or_a_run_is_at_chance(pruned, monkeypatch):
    monkeypatch.setattr("allot.run.evaluate.Score.at_chance", False)
    assert "chance" not in done(f"evaluate {MLP} --data {SAMPLES}").err
    monkeypatch.setattr("allot.run.evaluate.Score.at_chance", True)
    assert "note: the model looks untrained (its top1 of " in done(f"evaluate {MLP} --data {SAMPLES}").err
    said = done(f"evaluate RUN --model {MLP} --data {SAMPLES} --json")
    assert "is that of chance; `allot report` shows" in said.err and said.json["metric"] == "top1"


def test_evaluate_of_a_run_is_the_score_in_its_report(pruned):
    said = done(f"evaluate RUN --model {MLP} --data {SAMPLES} --json").json
    assert said["score"] == done("report RUN --json").json["scores"]["sparse"]


def test_evaluate_of_a_zoo_run_needs_no_data_option():
    made = done(f"prune {NET} --data {NET} --samples 64 --repair bn --budget sparsity=0.5 --out RUN --json").json
    said = done("evaluate RUN --json").json
    assert said == {"metric": "top1", "score": made["scores"]["sparse"], "samples": made["scores"]["samples"]}
    assert done(f"evaluate {NET} --data {NET} --split validation --json").json["score"] > 0.9


def test_evaluate_takes_no_other_weights_for_a_run(pruned):
    assert "leave --weights out" in refused(f"evaluate RUN --data {SAMPLES} --weights x.safetensors")


@pytest.mark.parametrize("factory", ["generator", "loader"])
def test_data_factories_may_return_a_generator_or_a_loader(factory):
    done(f"prune {MLP} --data cli.factories:{factory} --budget sparsity=0.5 --method erk --out RUN")
    expected = done(f"evaluate RUN --model {MLP} --data {SAMPLES} --json").json
    assert done(f"evaluate RUN --model {MLP} --data cli.factories:{factory} --json").json == expected


def test_verify_prints_whether_it_passed_and_every_row(pruned):
    said = done("verify RUN --json").json
    assert said.keys() == {"passed", "rows"} and said["passed"] is True and said["rows"]
    assert all(row.keys() == {"file", "check", "promised", "found", "passed"} for row in said["rows"])
    for file in ("model.safetensors", "model.bitmask.safetensors"):
        assert done(f"verify RUN/{file} --json").json["passed"] is True
    short, whole = done("verify RUN").err, done("verify RUN --all").err
    summary = f"all {len(said['rows'])} checks passed"
    assert summary in short and summary in whole and "promised" in whole and "promised" not in short
    counted = [int(count) for count in re.findall(r"(\d+) of \1 *$", short, re.MULTILINE)]
    assert sum(counted) == len(said["rows"]) == len(re.findall(r"pass *$", whole, re.MULTILINE))


def test_verify_ends_with_4_when_a_file_was_changed(pruned, tmp_path):
    path = tmp_path / "RUN" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = run("verify RUN --json")
    assert outcome.code == 4 and outcome.json["passed"] is False
    assert outcome.err.startswith("error: RUN/model.safetensors: sha256: promised") and outcome.err.count("\n") == 1
    path.write_bytes(content[:50])
    assert run("verify RUN").code == 4


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_error_of_verify_names_the_file_that_is_wrong(pruned, tmp_path):
    done(f"export RUN --model {MLP} --data {SAMPLES} --to program --out away.pt2")
    flip(tmp_path / "away.pt2.probe.safetensors")
    assert refused_json("verify away.pt2 --json").startswith("error: away.pt2.probe.safetensors: untouched: promised")
    flip(tmp_path / "RUN" / "model.bitmask.safetensors.probe.safetensors")  # a run ends with this export
    assert "error: RUN/model.bitmask.safetensors.probe.safetensors: " in refused_json("verify RUN --json")


def refused_json(line):
    outcome = run(line)
    assert outcome.code == 4 and outcome.json["passed"] is False and outcome.err.count("\n") == 1
    return outcome.err


def test_a_long_name_is_cut_and_markup_is_text(tmp_path):
    name = "[bold]" + "x" * 5000 + "[/nothing]"
    about = {"layers": {name: [[2], 2]}, "aliases": {}, "asked": {"sparsity": "[/red]"}, "limits": {"sparsity": 1}}
    save_tensors(tmp_path / "long.safetensors", {"a": torch.ones(2)}, "plain", about)
    said = run("verify long.safetensors").err.splitlines()[-1]
    assert said.startswith("error: long.safetensors: layers present: promised all, found [bold]xxx") and len(said) < 400
    save_tensors(tmp_path / "markup.safetensors", {name: torch.ones(2)}, "plain", about)
    outcome = run("verify markup.safetensors")
    assert outcome.code == 4 and "sparsity=[/red]: promised at most 1 kept, found 2 kept" in outcome.err


def test_report_shows_one_run_or_several_side_by_side(pruned):
    one = done("report RUN --json").json
    assert one.keys() >= REPORT | {"run"}
    several = done("report RUN RUN --json").json
    assert several == {"runs": [one, one]}
    assert done("report RUN RUN").err.count("RUN") == 2


def test_methods_lists_every_method_and_tells_about_one():
    said = done("methods --json").json
    assert said["methods"].keys() == METHODS.keys() and said["recipes"].keys() == RECIPES.keys()
    assert all(name in done("methods").err for name in METHODS)
    one = done("methods variance --json").json
    assert one["role"] == "repair" and one["options"]["limit"] == 10.0
    assert "--set options.variance.limit=10.0" in done("methods variance").err


def test_a_recipe_tells_its_parts():
    assert "--allocate global-normalised --repair weight-moments,layerwise,bn,bias" in done("methods pot").err
    assert done("methods pot --json").json["allocate"] == "global-normalised"
    llm = done("methods llm").err.replace("\n", " ")
    options = "--set options.admm.iterations=10 --set options.admm.refinement=4"
    assert f"--allocate uniform --repair admm --pattern rows {options} (--score wanda" in llm


def test_a_method_lists_options_flat_as_a_recipe_says_them():
    options = done("methods distill --json").json["options"]
    assert {
        "steps": 250,
        "loss": None,
        "outputs": None,
        "blocks": [],
        "every": 5,
        "ramp": 1.0,
    }.items() <= options.items()
    assert not options.keys() & {"training", "schedule"}
    shown = done("methods auto").err
    assert "--set options.auto.steps=40\n" in shown and "--set options.auto.among=" in shown
    assert "--set options.fcpts.start=erk\n" in done("methods fcpts").err


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_offers_to_set_is_accepted_as_it_stands(name):
    shown = [line.strip() for line in done(f"methods {name}").err.splitlines() if line.startswith("  --set ")]
    part = "--allocate" if METHODS[name].role == "allocate" else "--method uniform --repair"
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 {part} {name} --out RUN"
    line += "".join(f" --set '{setting.removeprefix('--set ')}'" for setting in shown)
    said = done(line + (f" --set options.{name}.steps=2" if any(".steps=" in setting for setting in shown) else ""))
    assert "pass" in said.err


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_about_itself_keeps_its_lines(name):
    assert done(f"methods {name} --json").json["text"] in done(f"methods {name} --paper").err


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described_in_plain_words_with_a_line_for_every_option(name, monkeypatch):
    monkeypatch.setattr(methods.people, "_width", 80)
    shown, described = done(f"methods {name}").err, done(f"methods {name} --json").json
    assert described["plain"] in shown and "Args:" not in shown and "Differences" not in shown
    lines = shown.splitlines()
    for option in described["options"]:
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"  --set options.{name}.{option}=")]
        assert lines[at + 1].startswith(" " * 8) and "see --paper" not in lines[at + 1]
        assert all(len(line) <= 80 for line in lines[at + 1 : at + 3] if line.startswith(" " * 8))


def test_no_two_methods_have_the_same_description():
    summaries = {name: row["summary"] for name, row in done("methods --json").json["methods"].items()}
    assert len(set(summaries.values())) == len(summaries)
    assert not VARIANTS.keys() - METHODS.keys()


def test_every_option_of_a_method_is_explained_and_no_other():
    options = {option for method in METHODS.values() for option in options_of(method)}
    assert WORDS.keys() <= options
    assert all(";" in words for words in WORDS.values())  # what it is; when to change it


def test_an_option_without_words_is_explained_by_its_class():
    assert words_of(Mine(3), "size") == "how many of them, 1 or more"
    assert words_of(Mine(3), "other") == "see --paper"


@dataclass(frozen=True)
class Mine:
    """A method.

    Args:
        size: how many of them, 1
            or more. And so on.
    """

    size: int


@pytest.mark.parametrize("verb", ["prune", "plan", "evaluate", "verify", "report", "methods"])
def test_every_verb_explains_all_its_options(verb):
    text = done(f"{verb} --help").out
    assert text.strip().startswith(f"Usage: allot {verb}") and "--json" in text
    entries = [line.strip("│ ") for line in text.splitlines() if line.startswith("│ --")]
    assert entries and all(line.count("  ") >= 2 for line in entries)


def test_help_names_the_defaults():
    text = " ".join(done("prune --help").out.replace("│", " ").split())
    for default in (
        "[best; of a language model llm; without data erk]",
        "[unstructured]",
        "[magnitude]",
        "[512]",
        "[64]",
        "[0]",
        "[1]",
    ):
        assert default in text


def test_allot_alone_shows_the_verbs():
    outcome = run("")
    assert outcome.code == 0 and outcome.err == "" and "prune" in outcome.out and "Usage: allot" in outcome.out
    assert "prune" in done("--help").out


def test_version_is_one_line():
    assert done("--version").out == f"allot {metadata.version('allot')}\n"


def test_options_may_come_in_any_order():
    first = done(f"plan {NET} --budget sparsity=0.9 --method lamp --json").out
    assert done(f"plan --json --method lamp --budget sparsity=0.9 {NET}").out == first
    assert done(f"plan --method=lamp --json {NET} --budget=sparsity=0.9").out == first


def test_the_module_is_the_command_and_a_reader_that_leaves_early_is_no_error(tmp_path):
    line = f"{sys.executable} -m allot plan {FACTORIES}:mlp --budget sparsity=0.5 --json"
    piped = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -c 1"], capture_output=True, text=True, check=False
    )
    assert piped.stdout == "{" and piped.stderr == ""


def test_a_reader_that_leaves_the_help_early_is_no_error():
    line = f"{sys.executable} -m allot prune --help | true"
    piped = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, check=False)
    assert (piped.returncode, piped.stderr) == (0, "")


def test_what_a_run_holds_is_a_plain_state_dict(pruned):
    state = load(pruned)
    assert state.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert sum(int(torch.count_nonzero(state[name])) for name in ("0.weight", "2.weight")) == 80
