"""The field test: which cells are selected, that they resume, and that tables leave out nothing."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from benchmarks.nets import debian
from benchmarks.nets.net import Net, agreement, outputs_of
from torch import nn

import allot
from allot.errors import UsageError
from allot.pruning.assemble import assemble
from benchmarks import apart, field, field_page

ROOT = Path(__file__).resolve().parent.parent.parent
MARKS = "# Words\n\n<!-- field -->\n<!-- end -->\n\nMore words.\n"


@pytest.mark.parametrize("name", ["field", "field_page", "nets.debian"])
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


METRICS = {"agreement": "percent of answers", "kl": "KL to the dense net"}


def made_up(asked):
    """What a cell of a net gives that nobody prunes."""
    if asked["chain"] is None:
        return {"agreement": 100.0, "kl": 0.0}
    seed = asked["seed"]
    found = {"agreement": 90.0 + seed, "kl": 0.02 + 0.01 * seed, "cpu": 3.0 + seed, "images": [1500, 250]}
    return found | {"fidelity": {"kl": 0.2 + 0.1 * seed, "agreement": 0.5}}


@pytest.fixture
def nets(monkeypatch, tmp_path, in_this_process):
    """CREPE and R-Net, whose cells take no time; an empty page; the keys of cells that ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(field, "measure", made_up)
    monkeypatch.setattr(field, "METRICS", {"crepe": METRICS, "rnet": METRICS})
    Path("page.md").write_text(MARKS)
    return in_this_process


def run(text: str) -> int:
    return field.main([*text.split(), "--out", "cells", "--page", "page.md"])


def rows_of(lines: list[str]) -> list[list[str]]:
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


# Selection


def selected(net: str, text: str) -> list[str]:
    options = field.command().parse_args(text.split())
    return list(field.cells_of(net, options, options.seeds))


def test_all_recipes_run_beside_their_control_at_all_budgets_and_seeds():
    keys = selected("rnet", "")
    recipes = ["erk", "pot", "admm", "fcpts", "unipts", "best"]
    rows = [(budget, name) for budget in ("sparsity=0.5", "sparsity=0.7", "sparsity=0.9") for name in recipes]
    rows = [(budget, f"{control}{name}") for budget, name in rows for control in ("", "uniform+")]
    rows += [("macs=50%", "dsa"), ("macs=50%", "uniform+dsa")]
    assert keys[0] == "rnet dense"
    assert keys[1:] == [f"rnet {budget} {name} {seed}" for seed in (0, 1, 2) for budget, name in rows]
    language = selected("smollm2", "--seeds 1")
    controls = ("wanda", "sparsegpt", "llm")
    assert language == ["dense", *(f"{b} {name} 1" for b in ("50%", "60%", "2-of-4") for name in controls)]


def test_budgets_and_methods_select_cells_of_their_kind():
    assert selected("rnet", "--budget 0.9 --methods pot dsa wanda --seeds 1") == [
        "rnet dense",
        "rnet sparsity=0.9 pot 1",
    ]
    assert selected("rnet", "--budget macs=50% --methods pot dsa --seeds 1")[1:] == ["rnet macs=50% dsa 1"]
    assert selected("smollm2", "--budget 60% 0.9 --methods llm pot --seeds 1") == ["dense", "60% llm 1"]
    mine = field.command().parse_args(["--methods", "erk+admm", "--chain", 'x={"repair": "none"}', "--seeds", "0"])
    chains = {asked["method"]: asked["chain"] for asked in field.cells_of("rnet", mine, [0]).values()}
    assert chains == {"dense": None, "erk+admm": {"allocate": "erk", "repair": "admm"}, "x": {"repair": "none"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--budget sparsity=2", "sparsity=2"),
        ("--budget size=3", "size"),
        ("--budget 4:2", "budget '4:2': a sparsity like 60%"),
        ("--nets resnet50", "invalid choice: 'resnet50'"),
    ],
)
def test_what_cannot_be_understood_is_an_error_before_anything_runs(text, said, nets, capsys):
    with pytest.raises(SystemExit):
        run(text)
    assert said in capsys.readouterr().err and nets == []


@pytest.mark.parametrize("recipe", [name for names in field.RECIPES.values() for name in names if name != "fcpts"])
def test_a_control_has_uniform_densities_and_the_other_parts_of_its_recipe(recipe):
    names, whole = (assemble(**field.CHAINS[name]).names for name in (f"uniform+{recipe}", recipe))
    assert names.allocate == "uniform" and whole.allocate != "uniform"
    assert (names.repair, names.score, names.pattern) == (whole.repair, whole.score, whole.pattern)


def test_the_control_of_fcpts_trains_as_it_does_and_keeps_uniform_densities():
    chain = {"method": "fcpts", "options": {"fcpts": {**field.CHAINS["uniform+fcpts"]["options"]["fcpts"], "steps": 6}}}
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).eval()
    inputs = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    assert set(dict(allot.prune(net, inputs, "sparsity=0.9", **chain).allocation).values()) == {0.1}


# Resumption


def test_a_stopped_command_resumes_with_the_cell_under_way(nets, monkeypatch, capsys):
    asked = "--nets rnet --budget 0.5 0.9 --methods erk uniform+erk --seeds 0 1"
    inner = apart.subprocess.run

    def interrupted(command, **options):
        if len(nets) == 3:
            raise KeyboardInterrupt
        return inner(command, **options)

    monkeypatch.setattr(apart.subprocess, "run", interrupted)
    assert run(asked) == 130
    assert nets == ["rnet dense", "rnet sparsity=0.5 erk 0", "rnet sparsity=0.5 uniform+erk 0"]
    assert Path("page.md").read_text() == MARKS
    monkeypatch.setattr(apart.subprocess, "run", inner)
    before = [(file, file.stat().st_mtime_ns) for file in Path("cells").glob("*.json")]
    assert run(asked) == 0
    assert len(nets) == len(set(nets)) == 9  # none twice
    assert [(file, file.stat().st_mtime_ns) for file, _ in before] == before
    assert run(asked) == 0 and len(nets) == 9


def test_a_net_that_does_not_load_is_left_out_and_the_others_run(nets, monkeypatch, caplog, capsys):
    def missing_package(asked):
        if asked["net"] == "crepe":
            raise UsageError("torchcrepe is missing")
        return made_up(asked)

    monkeypatch.setattr(field, "measure", missing_package)
    asked = "--nets crepe rnet --budget 0.5 --methods erk --seeds 0 1"
    assert run(asked) == 1
    assert nets == ["crepe dense", "rnet dense", "rnet sparsity=0.5 erk 0", "rnet sparsity=0.5 erk 1"]
    assert "crepe is left out: crepe dense failed, as its other cells would: torchcrepe is missing" in caplog.text
    lines = capsys.readouterr().out.splitlines()
    assert rows_of(lines)[1][1:3] == ["dense", "failed"] and "Not run: sparsity=0.5: erk." in lines
    monkeypatch.setattr(field, "measure", made_up)
    assert run(asked) == 0
    assert nets[4:] == ["crepe dense", "crepe sparsity=0.5 erk 0", "crepe sparsity=0.5 erk 1"]


def test_nets_without_their_data_are_left_out(monkeypatch, caplog, tmp_path, in_this_process, capsys):
    assert field.main(["--nets", "lite0", "smollm2", "--out", str(tmp_path), "--chain", 'x={"repair": "none"}']) == 1
    assert in_this_process == []
    assert "lite0 is left out: it needs --photos DIR, a folder of photographs" in caplog.text
    assert "smollm2 is left out: it needs --text DIR, a folder of prose" in caplog.text


def test_cells_of_other_arguments_are_not_taken_for_these(nets, capsys):
    asked = "--nets rnet --budget 0.5 --methods erk --seeds 0"
    assert run(asked) == 0
    with pytest.raises(SystemExit):
        run(f"{asked} --threads 2")
    assert "was measured with another threads: use another --out" in capsys.readouterr().err


# Tables


def test_tables_show_means_and_what_failed_or_is_missing(nets, monkeypatch, capsys, caplog):
    def one_fails(asked):
        if asked["seed"] == 1 and asked["method"] == "uniform+erk":
            raise RuntimeError("no such\noperator")
        return made_up(asked)

    monkeypatch.setattr(field, "measure", one_fails)
    assert run("--nets rnet --budget 0.5 --methods erk uniform+erk --seeds 0 1") == 1
    rows = [
        "| budget | method | agreement | kl | watched: distance | watched: agreement, % | CPU-s "
        "| inputs forward / backward | seeds |",
        "| | dense | 100.0 | 0.000 | | | | | |",
        "| sparsity=0.5 | erk | 90.5 ± 0.7 | 0.0250 ± 0.0071 | KL 0.250 ± 0.071 | 50.0 ± 0.0 | 4 ± 1 "
        "| 1,500 / 250 | 2 of 2 |",
        "| sparsity=0.5 | uniform+erk | 90.0 | 0.0200 | KL 0.200 | 50.0 | 3 | 1,500 / 250 | 1 of 2, 1 failed |",
    ]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")] == rows
    assert "rnet, sparsity=0.5: missing are uniform+erk (seeds 1)" in caplog.text
    lines = Path("page.md").read_text().splitlines()
    assert lines[0] == "# Words" and lines[-1] == "More words."
    assert "- rnet sparsity=0.5 uniform+erk 1: RuntimeError: no such operator" in lines
    page = rows_of(lines)
    assert page[:2] == [  # the overview
        ["net: metric", "budget", "dense", "erk", "uniform+erk"],
        ["rnet: agreement", "sparsity=0.5", "100.0", "90.5", "90.0"],
    ]
    assert page[3] == ["erk", "0", "1", "0", "5"]
    assert [row[1:3] for row in page if row[1] == "dense"] == [["dense", "not run"], ["dense", "100.0"]]
    left = [line.removeprefix("Not run: ") for line in lines if line.startswith("Not run: ")]
    assert [1 + line.count(", ") + line.count("; ") for line in left] == [38, 36]  # of crepe, of R-Net
    assert left[1].startswith("sparsity=0.5: pot, uniform+pot, ") and left[1].endswith("; macs=50%: dsa, uniform+dsa.")


def test_a_net_that_is_pruned_has_all_columns(monkeypatch, in_this_process, tmp_path, capsys):
    def load(asked):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        inputs = torch.randn(30, 6)
        (dense,) = outputs_of(model, inputs)
        drawn = torch.randn(20, 6, generator=torch.Generator().manual_seed(asked["seed"]))
        return Net("lite0", model, drawn, lambda m: agreement(outputs_of(m, inputs)[0], dense), {})

    monkeypatch.setitem(field.LOADERS, "lite0", load)
    asked = ["--photos", "photos", "--nets", "lite0", "--budget", "0.5", "--seeds", "1", "2", "--out", str(tmp_path)]
    assert field.main([*asked, "--methods", "none", "uniform+lstsq", "no-such-repair"]) == 1
    rows = rows_of(capsys.readouterr().out.splitlines())
    assert rows[0][:4] == ["budget", "method", "agreement", "kl"]
    assert rows[1][1:4] == ["dense", "100.0", "0.000"]
    assert [row[1] for row in rows[2:]] == ["none", "uniform+lstsq", "no-such-repair"]
    assert all(" ± " in row[2] and row[4].startswith("KL ") and " ± " in row[5] for row in rows[2:4])
    assert rows[2][-2].endswith("/ 0") and int(rows[3][-2].split(" / ")[0].replace(",", "")) > 0
    assert rows[4][2] == "failed" and rows[4][-1] == "0 of 2, 2 failed"


def test_recipes_are_ahead_of_their_control_equal_or_behind():
    values = {  # budget -> scores of a recipe and of its control, one a seed
        1: ((90.0, 92.0), (80.0, 81.0)),
        2: ((5.0, 7.0), (6.0, 6.5)),
        3: ((1.0,), (1.5, 1.5)),
        4: ((), (1.0,)),
    }
    cells, found = {"alone": {"method": "alone", "budget": 1}}, {"alone": {"x": 9.0}}
    for budget, both in values.items():
        for method, scores in zip(("a", "uniform+a"), both, strict=True):
            cells |= {f"{budget} {method} {seed}": {"method": method, "budget": budget} for seed in (0, 1)}
            found |= {f"{budget} {method} {seed}": {"x": score} for seed, score in enumerate(scores)}
    lines = field_page.against_controls([field_page.Part("net", {"x": "", "y": ""}, cells, found, {})])
    assert lines[2:] == ["| a | 1 | 1 | 1 | 1 |"]


def test_the_table_alone_measures_nothing_and_says_what_is_missing(nets, caplog, capsys):
    assert run("--nets rnet --budget 0.5 --methods erk --seeds 0") == 0
    before = Path("page.md").read_text()
    Path("page.md").write_text(MARKS)
    ran = list(nets)
    assert run("--table") == 0 and nets == ran
    assert Path("page.md").read_text() == before
    assert "rnet, sparsity=0.5: missing are erk (seeds 1 2), uniform+erk, pot" in caplog.text
    assert "crepe, macs=50%: missing are dsa, uniform+dsa" in caplog.text


def test_methods_of_ones_own_are_printed_and_leave_the_page(nets, capsys):
    assert run("--nets rnet --budget 0.5 --methods none --seeds 0") == 0
    assert Path("page.md").read_text() == MARKS
    assert rows_of(capsys.readouterr().out.splitlines())[2][1] == "none"
    Path("page.md").write_text("no mark")
    with pytest.raises(SystemExit):
        run("--table")
    assert "page.md: there is no line <!-- field -->" in capsys.readouterr().err


def test_the_page_names_every_net():
    page = (ROOT / field_page.PAGE).read_text()
    assert all(f"\n## {net}\n" in page for net in field.METRICS)


# Packages


def test_packages_of_the_makefile_have_their_versions():
    (named,) = re.findall(r"^WEIGHTS := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    versions = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert set(named.split()) <= set(versions) and all(name in field.PACKAGES for name in named.split())


@pytest.mark.skipif(not debian.shutil.which("dpkg-deb"), reason="no Debian")
def test_files_of_a_debian_package_come_without_those_beside_them(tmp_path, monkeypatch, caplog):
    made = tmp_path / "made"
    (made / "DEBIAN").mkdir(parents=True)
    (made / "DEBIAN" / "control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: a\n"
    )
    for name in ("share/one.jpg", "share/in/two.jpg", "share/drawing.svg", "other/three.jpg"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    original, asked = subprocess.run, []

    def run(command, **options):
        asked.append(command)
        if command[:2] != ["apt-get", "download"]:
            return subprocess.CompletedProcess(command, 0)
        if command[-1] == "unknown":
            return subprocess.CompletedProcess(command, 100, "", "W: old\nE: Unable to locate package unknown\n")
        return original(["dpkg-deb", "--build", str(made), f"{options['cwd']}/a_1.deb"], capture_output=True)

    monkeypatch.setattr(debian.subprocess, "run", run)
    monkeypatch.setattr(debian.shutil, "which", lambda name: name)
    folder = tmp_path / "photographs"
    packages = {"a": ("share/*.jpg",), "unknown": ("*",)}
    assert debian.fetch(packages, folder) == ["unknown"]
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == ["a/share/in/two.jpg", "a/share/one.jpg"]
    assert "unknown: E: Unable to locate package unknown" in caplog.text
    asked.clear()
    assert debian.fetch({"a": ()}, folder) == [] and asked == []  # it is there
    assert debian.fetch({"a": ("share/*.webp",)}, tmp_path / "empty") == ["a"]
    assert "a: this release of it has no file like share/*.webp" in caplog.text
    asked.clear()
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    assert debian.fetch(packages, folder) == ["unknown"] and asked == []
