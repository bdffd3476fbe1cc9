"""Bad input ends in one line that helps, the right exit code, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from cli.command import FACTORIES, MLP, NET, SAMPLES, done, refused
from cli.factories import mlp

OUT = "--out RUN"


@pytest.fixture(autouse=True)
def nothing_is_written(own_directory, tmp_path):
    yield
    assert not (tmp_path / "RUN").exists()


def pruned(words: str) -> str:
    return f"prune {words} {OUT}"


@pytest.mark.parametrize("value", ["0", "1", "1.5", "nan", "-0.5", "inf", "much", "100%", ""])
@pytest.mark.parametrize("verb", [f"prune {OUT} --repair none", "plan"])
def test_a_sparsity_outside_0_to_1_is_refused(verb, value):
    assert "sparsity=" in refused(f"{verb} {NET} --budget sparsity={value}")


@pytest.mark.parametrize(
    "budget",
    ["speed=2", "9", "x", ",", "sparsity=0.5,Sparsity=0.6", "bytes=3XB", "params=0", "macs=1.5", "macs=100.001%"],
)
def test_a_budget_that_means_nothing_is_refused(budget):
    refused(pruned(f"{NET} --repair none --budget {budget}"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (f"{NET} --method erkk", "did you mean 'erk'?"),
        (f"{NET} --allocate lampp", "did you mean 'lamp'?"),
        (f"{NET} --allocate bn", "unknown allocator 'bn'"),
        (f"{NET} --allocate none.json", "none.json"),
        (f"{NET} --score magnitud", "did you mean 'magnitude'?"),
        (f"{NET} --repair bn,varianc", "did you mean 'variance'?"),
        (f"{NET} --repair erk", "unknown repair 'erk'"),
        (f"{NET} --pattern unstructred", "unknown pattern"),
        ("zoo:digits-resnet2", "did you mean 'digits-resnet20'?"),
        (f"{NET} --data zoo:digit", "did you mean 'digits'?"),
        ("digits-resnet20", "zoo:NAME"),
        ("zoo:", "zoo:NAME"),
        (f"{NET} --data digits", "npz:FILE"),
        (f"{NET} --include nothing.*", "matches no prunable layer"),
        (f"{NET} --exclude re:[", "not a regular expression"),
        (f"{NET} --min-density 0.5", "LAYERS=DENSITY"),
        (f"{NET} --min-density stem=much", "stem"),
        (f"{NET} --seed one", "--seed"),
        (f"{NET} --samples 0 --data {NET}", "samples=0"),
        (f"{NET} --batch-size 0 --data {NET}", "batch_size=0"),
        (f"{NET} --input 1,-16,16", "greater than 0"),
        (f"{NET} --input wide", "input"),
        (f"{NET} --weights random", "has its own"),
        (f"{NET} --test zoo:digits-", "did you mean"),
        (f"{NET}", "--data"),
        ("", "no MODEL"),
        ("cli.factories:with_nan --data cli.factories:samples", "0.weight holds nan"),
    ],
)
def test_names_and_numbers_that_mean_nothing_are_refused(words, told):
    assert told in refused(pruned(f"{words} --budget sparsity=0.9"))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--pattern 4:2", 2),
        ("--pattern 0:4", 2),
        ("--pattern channels:0", 2),
        ("--floor x", 2),
        ("--min-density '*=2'", 2),
        ("--floor 99999999", 3),
        ("--min-density '*=0.5'", 3),
    ],
)
def test_bounds_that_mean_nothing_end_with_2_and_those_that_cannot_be_met_with_3(words, code):
    refused(pruned(f"{NET} --budget sparsity=0.9 --repair none {words}"), code)


def test_what_is_missing_is_named():
    assert "--budget" in refused(pruned(NET))
    assert "--data" in refused(f"prune {NET} --budget sparsity=0.9")  # and no place: it has a default
    assert "--out" in refused(f"search {NET} --data {NET} --max-drop 1pt")
    assert "--data" in refused(f"evaluate {NET}")
    assert "--input" in refused(f"plan {MLP} --budget macs=50%", 2)
    assert "nothing in scope" in refused("plan cli.factories:without_weights --budget sparsity=0.9", 3)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("prun", "Did you mean 'prune'?"),
        ("prune --bugdet sparsity=0.9", "--budget"),
        ("plan --budget", "--budget"),
        ("report", "RUN"),
        ("evaluate", "RUN|MODEL"),
        ("plan a b", "b"),
        ("methods erkk", "did you mean 'erk'?"),
        ("verify nowhere", "nowhere"),
        ("report nowhere", "nowhere is no run directory"),
        ("evaluate nowhere", "zoo:NAME"),
        (f"evaluate {NET} --data {NET} --split tests", "did you mean 'test'?"),
    ],
)
def test_a_command_line_that_means_nothing_is_one_line(line, told):
    assert told in refused(line)


def test_errors_leave_standard_output_empty_with_json_too():
    refused("plan zoo:none --budget sparsity=0.9 --json")
    refused(f"plan {NET} --budget sparsity=2 --json")
    refused("verify none --json")
    refused("prune --json --nonsense")


# Weights


def saved(name: str, state: dict) -> str:
    safetensors.torch.save_file(state, name) if name.endswith(".safetensors") else torch.save(state, name)
    return f"plan {MLP} --budget sparsity=0.5 --weights {name}"


STATE = mlp().state_dict()


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_weights_that_do_not_fit_list_their_keys(ending):
    other = {**STATE, "extra": torch.zeros(2), "0.weight": torch.zeros(16, 7), "2.bias": torch.zeros(4).long()}
    del other["0.bias"]
    error = refused(saved(f"w{ending}", other))
    assert "missing: 0.bias; not in the model: extra; other shape: 0.weight [16, 7] for [16, 6]" in error
    assert "other type: 2.bias int64 for float32" in error


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0, 0.3, 0.95])
def test_a_file_of_weights_that_was_cut_short_is_refused(ending, share):
    line = saved(f"w{ending}", STATE)
    content = Path(f"w{ending}").read_bytes()
    Path(f"w{ending}").write_bytes(content[: int(share * len(content))])
    assert f"w{ending}" in refused(line)


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", "."])
def test_a_file_of_weights_that_is_not_there_is_refused(name):
    refused(f"plan {MLP} --budget sparsity=0.5 --weights {name}")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: Path(path).write_bytes(pickle.dumps(content))])
def test_a_pickled_object_is_refused_and_not_executed(write):
    write({"0.weight": Payload()}, "w.pt")
    error = refused(f"plan {MLP} --budget sparsity=0.5 --weights w.pt")
    assert "pickled objects" in error and "safetensors" in error
    assert not Path("executed").exists()
    torch.load("w.pt", weights_only=False) if write is torch.save else pickle.loads(Path("w.pt").read_bytes())
    assert Path("executed").exists()  # it would have been


def test_a_whole_module_in_a_file_is_refused():
    torch.save(mlp(), "w.pt")
    assert "state_dict()" in refused(f"plan {MLP} --budget sparsity=0.5 --weights w.pt")


@pytest.mark.parametrize("content", [[1, 2], {"0.weight": 3}])
def test_a_file_without_a_state_dict_is_refused(content):
    torch.save(content, "w.pt")
    assert "no state dict" in refused(f"plan {MLP} --budget sparsity=0.5 --weights w.pt")


def test_weights_that_are_not_numbers_are_refused():
    assert "0.bias holds nan" in refused(saved("w.safetensors", {**STATE, "0.bias": torch.full((16,), torch.nan)}))


# Data


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("empty", "empty"),
        ("empty_generator", "empty"),
        ("wide", "[1, 7]"),
        ("number", "returned int"),
        ("raises", "RuntimeError: first second"),
        ("leaves", "SystemExit"),
        ("breaks_off", "ValueError: the disk is gone"),
        ("wants_more", "argument"),
        ("sample", "did you mean 'samples'?"),
    ],
)
def test_data_that_cannot_be_used_is_refused(factory, told):
    assert told in refused(pruned(f"{MLP} --budget sparsity=0.5 --data cli.factories:{factory}"))


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("unlabelled", "labels"),
        ("real_labels", "labels"),
        ("empty", "empty"),
        ("empty_generator", "empty"),
        ("breaks_off", "the disk is gone"),
    ],
)
def test_data_that_cannot_be_scored_on_is_refused(factory, told):
    assert told in refused(f"evaluate {MLP} --data cli.factories:{factory}")


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("cli.factories:ml", "did you mean 'mlp'?"),
        ("cli.factories:number", "returned int: an nn.Module is accepted"),
        ("cli.factories:raises", "failed: RuntimeError: first second"),
        ("cli.factories:leaves", "failed: SystemExit"),
        ("cli.factories:STATE", "unknown factory"),
        ("cli.nowhere:mlp", "No module named 'cli.nowhere'"),
        ("nowhere.py:mlp", "No such file"),
        (f"{FACTORIES}:ml", "did you mean 'mlp'?"),
        (f"{FACTORIES}:", "zoo:NAME"),
        ("broken.py:mlp", "SyntaxError"),
    ],
)
def test_a_model_factory_that_cannot_be_used_is_refused(spec, told):
    Path("broken.py").write_text("def mlp(:\n")
    assert told in refused(f"plan {spec} --budget sparsity=0.5")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "hf:x"])
def test_a_missing_package_is_one_line_that_says_what_to_install(name, monkeypatch):
    package = {"hf": "transformers"}.get(name.partition(":")[0], name.partition(":")[0])
    for loaded in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)

    class Absent:
        def find_spec(self, fullname, path=None, target=None):
            if fullname.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError):
        import_module(package)
    extra = "hf" if package == "transformers" else "vision"
    error = refused(f"plan {name} --budget sparsity=0.5")
    assert f"{package} is not installed: pip install 'allot[{extra}]'" in error


def test_a_broken_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm" in refused("plan timm:resnet18 --budget sparsity=0.5")


# Directories


def test_a_run_of_another_configuration_is_refused_and_left_alone(tmp_path):
    done(f"prune {MLP} --budget sparsity=0.5 --repair none --out OTHER")
    before = {path.name: path.read_bytes() for path in (tmp_path / "OTHER").iterdir()}
    error = refused(f"prune {MLP} --budget sparsity=0.6 --seed 3 --repair none --out OTHER")
    assert "budget.sparsity was 0.5, is 0.6" in error and "seed was 0, is 3" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "OTHER").iterdir()} == before


def test_a_directory_of_other_files_is_refused_and_left_alone():
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for place in ("mine", "mine/letter.txt", "mine/letter.txt/x"):
        refused(f"prune {MLP} --budget sparsity=0.5 --repair none --out {place}")
    assert [path.name for path in Path("mine").iterdir()] == ["letter.txt"]


def test_a_run_that_is_not_finished_is_neither_shown_nor_scored():
    Path("half").mkdir()
    Path("half/run.json").write_text(json.dumps({"state": "running"}))
    for line in ("report half", "verify half", f"evaluate half --data {SAMPLES}"):
        assert "not finished" in refused(line)
    Path("half/run.json").write_text("{")
    for line in ("report half", "verify half", f"evaluate half --data {SAMPLES}"):
        assert "run.json" in refused(line)


def test_a_place_that_cannot_be_written_is_refused():
    refused(f"plan {MLP} --budget sparsity=0.5 --save none/plan.json")
    refused(f"prune {MLP} --budget sparsity=0.5 --repair none --out /proc/allot/run")


def test_a_file_from_elsewhere_cannot_be_verified():
    np.savez("x.npz", x=np.zeros(3))
    safetensors.torch.save_file(STATE, "w.safetensors")
    assert "was not written by allot" in refused("verify w.safetensors")


# What only the files below the command line can mend


def test_inputs_of_the_wrong_shape_cannot_be_scored_on():
    assert "[10, 7]" in refused(f"evaluate {MLP} --data cli.factories:wide")


@pytest.mark.parametrize("words", [f"--data {SAMPLES} --test cli.factories:unlabelled", "--score wanda --repair none"])
def test_what_cannot_be_scored_leaves_nothing_behind(words):
    refused(f"prune {MLP} --budget sparsity=0.5 --out LEFT {words}")
    assert not Path("LEFT").exists()
