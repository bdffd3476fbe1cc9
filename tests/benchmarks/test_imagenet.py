"""The papers' tables, on a made-up folder of pictures: whole, resumable, and each protocol called what it is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.imagenet import cells, cost, epochs, pages, pictures, recipes

import allot
from allot import METHODS, Stopped, UsageError
from allot.run.calibration import Calibration
from allot.run.driver import repeatable

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "benchmarks" / "imagenet"
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
"""
TABLE = """
title: Made up
paper: "Nobody: nothing"
protocol: best epoch
differences: [all of it]
samples: 12
batch_size: 4
augment: true
budgets: ["sparsity=0.5"]
nets:
  tiny: {model: "tiny.py:net", size: 12}
chains:
  uniform: {about: control, allocate: uniform, repair: "distill,bn", options: {distill: {steps: 7, ramp: 1.9}}}
  fcpts-paper: {about: the paper's, method: fcpts-paper, options: {fcpts-paper: {steps: 6}}}
  pot: {about: baseline, method: pot, options: {layerwise: {steps: 2}}}
reported:
  - {net: tiny, budget: "sparsity=0.5", chain: fcpts-paper, says: "12.3", source: abstract}
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cells.Setting:
    """Twenty-seven pictures in three classes, a tiny net and a table of it, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(NET)
    Path("made-up.yaml").write_text(TABLE)
    draw = np.random.default_rng(0)
    for split, number in (("train", 6), ("val", 3)):
        for label in range(3):
            Path(split, f"class {label}").mkdir(parents=True)
            for i in range(number):
                noise = draw.integers(0, 120, (18, 15, 3)) + 60 * (np.arange(3) == label)
                Image.fromarray(noise.astype(np.uint8)).save(f"{split}/class {label}/{i}.png")
    return cells.Setting(Path("train"), Path("val"), Path("out"))


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return allot.load(run)


# Recipes


@pytest.mark.parametrize("name", sorted(recipes.tables()))
def test_every_recipe_holds_up_to_what_the_library_takes(name: str):
    from torchvision import models

    table = recipes.load(name)  # every cell is put together, options and all
    for net in table.nets.values():
        origin, _, model = net.model.partition(":")
        assert origin == "timm" or model in models.list_models()
        if net.weights:
            meta = models.get_weight(net.weights).meta
            assert len(meta["categories"]) == 1000
            assert net.stated == meta["_metrics"]["ImageNet-1K"]["acc@1"]
    for chain in table.chains:  # what trains says for how long: no default is mistaken for the paper's number
        cell = recipes.Cell(next(iter(table.nets)), table.budgets[0], chain, 0)
        found = recipes.parts(table, cell)
        said = recipes.recipe(table, cell).options
        training = [n for n, part in zip(found.names.repair, found.repair, strict=True) if hasattr(part, "steps")]
        training += [n for n in (found.names.allocate, *found.names.repair) if isinstance(METHODS[n], epochs.TRAINING)]
        assert training and all("steps" in said[method] for method in training)
    assert all(chain.about for chain in table.chains.values()) and "uniform" in table.chains


@pytest.mark.slow
def test_timm_knows_the_nets_of_the_recipes():
    timm = pytest.importorskip("timm")
    nets = [net for name in recipes.tables() for net in recipes.load(name).nets.values()]
    for name in [net.model.removeprefix("timm:") for net in nets if net.model.startswith("timm:")]:
        assert name in timm.list_pretrained()


def test_a_typo_in_a_recipe_is_an_error_that_names_it(made_up: cells.Setting):
    for right, wrong, said in (
        ("steps: 7", "stepps: 7", "stepps"),
        ("method: fcpts-paper", "method: fcpts-papr", "fcpts-papr"),
        ("chain: fcpts-paper", "chain: fcpts", "reported"),
        ("augment:", "augmented:", "augmented"),
        ("sparsity=0.5", "sparsty=0.5", "sparsty"),
    ):
        Path("wrong.yaml").write_text(TABLE.replace(right, wrong))
        with pytest.raises((UsageError, allot.BudgetError), match=said):
            recipes.load("wrong.yaml")
    with pytest.raises(UsageError, match="did you mean 'fcpts'"):
        recipes.load("fcpt")


def test_what_never_ran_on_imagenet_says_so_in_its_first_line():
    files = [file for file in FOLDER.iterdir() if file.suffix in {".py", ".yaml", ".md"}]
    assert len(files) > 9
    for file in (*files, ROOT / "docs" / "papers.md"):
        assert re.search("never run on (imagenet|a gpu)", file.read_text().splitlines()[0].lower()), file


def test_a_try_changes_steps_pictures_and_single_options(made_up: cells.Setting):
    table = recipes.load("unipts")
    small = recipes.Small(samples=8, steps=2, size=64, options=("unipts-paper.generations=1", "layerwise.steps=1"))
    said = recipes.recipe(table, recipes.Cell("mobilenet_v2", "sparsity=0.5", "unipts-paper", 0), small)
    assert said.input == (3, 64, 64) and said.samples == 8
    assert said.options["unipts"]["steps"] == 2 and said.options["unipts"]["learning_rate"] == 0.05
    assert said.options["unipts-paper"]["generations"] == 1 and "layerwise" not in said.options
    vit = recipes.recipe(recipes.load("fcpts"), recipes.Cell("vit_b_16", "sparsity=0.5", "erk", 0), small)
    assert vit.input == (3, 224, 224)
    with pytest.raises(UsageError, match="did you mean 'layerwise'"):
        recipes.recipe(
            table, recipes.Cell("resnet50", "sparsity=0.9", "pot", 0), recipes.Small(options=("layerwse.x=1",))
        )


# Pictures


def test_random_crops_are_a_function_of_step_and_sample(made_up: cells.Setting):
    from allot.sources.pictures import folder

    data = pictures.Augmented(folder(made_up.train, (3, 12, 12)), 12)
    model = torch.nn.Linear(1, 1)

    def step(number: int, workers: int) -> torch.Tensor:
        with repeatable(model, 0, "stage", number):
            return Calibration.of(data, samples=8, workers=workers).batch(number)[0]

    first, second = step(1, 0), step(2, 3)
    assert first.shape == (8, 3, 12, 12)
    assert torch.equal(step(1, 3), first) and torch.equal(step(2, 0), second)
    with repeatable(model, 0, "stage", 1):
        assert not Calibration.of(data, samples=8).repeats()  # the teacher's answers must not be taken from a table


def test_a_crop_lies_inside_the_picture_with_the_area_and_aspect_asked():
    draw = torch.Generator().manual_seed(0)
    for height, width in ((30, 40), (200, 9), (9, 200)):
        for _ in range(200):
            top, left, h, w = pictures.crop(height, width, draw)
            assert 0 <= top <= height - h and 0 <= left <= width - w
            assert 0.07 * height * width < h * w or min(height, width) == 9
            assert 0.6 < w / h < 1.6


def test_weights_of_a_file_and_their_own_preprocessing(made_up: cells.Setting):
    from torchvision import models

    net = recipes.Net(model="torchvision:resnet18", weights="ResNet50_Weights.IMAGENET1K_V2")
    with pytest.raises(UsageError, match=r"r18\.safetensors"):
        pictures.load_net("r18", net, ".", 32)
    torch.manual_seed(1)
    torch.save(models.resnet18().state_dict(), "r18.pth")
    source = pictures.load_net("r18", net, ".", 112)
    assert torch.equal(source.model.fc.weight, torch.load("r18.pth", weights_only=True)["fc.weight"])
    own = models.ResNet50_Weights.IMAGENET1K_V2.transforms(crop_size=112, resize_size=116)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 130, 3)).astype(np.uint8))
    assert torch.equal(source.preprocess((3, 112, 112))(picture), own(picture))


# Epochs


def test_scoring_epochs_changes_nothing_and_a_wide_net_is_never_the_best():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 3)).eval()
    inputs = torch.randn(16, 6)
    labels = model(inputs).argmax(1)
    test = list(zip(inputs, labels, strict=True))
    options = {"fcpts": {"steps": 8, "ramp": 8.0}}
    setting = {"samples": 16, "batch_size": 4, "repair": "bn"}
    plain = allot.prune(model, inputs, "sparsity=0.8", method="fcpts", options=options, **setting)
    parts = allot.pruning.assemble.assemble("fcpts", options=options)
    watched = epochs.Epochs(parts.allocate, "fcpts", epochs.Judge(test))
    found = allot.prune(model, inputs, "sparsity=0.8", method="fcpts", allocate=watched, **setting)
    assert all(torch.equal(value, plain.model().state_dict()[n]) for n, value in found.model().state_dict().items())
    scored = found.report()["diagnostics"]["epochs"]
    assert [row["epoch"] for row in scored] == [1, 2]
    assert [row["fits"] for row in scored] == [False, True] and scored[0]["kept"] > scored[1]["kept"]
    assert epochs.best([scored[0] | {"top1": 1.0}, scored[1]]) == scored[1]
    assert found.report()["method"] == "fcpts"
    with pytest.raises(UsageError, match="layerwise trains no"):
        epochs.Epochs(METHODS["layerwise"], "layerwise", epochs.Judge(test))


# Tables, from end to end


def test_a_table_is_measured_and_its_protocols_are_called_what_they_are(made_up: cells.Setting, monkeypatch):
    table = recipes.load("made-up.yaml")
    chosen = recipes.cells(table, seeds=2)
    assert [cell.key for cell in chosen][:2] == ["tiny sparsity=0.5 uniform 0", "tiny sparsity=0.5 fcpts-paper 0"]
    seen = []
    found = cells.run(table, chosen, made_up, on_cell=lambda now: seen.append(len(now["cells"])))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert found == json.loads(made_up.results.read_text())
    for run in found["cells"].values():
        assert run["kept"] == run["total"] // 2 and run["macs"]["sparse"] < run["macs"]["dense"]
        directory = made_up.out / run["net"] / run["budget"] / run["chain"] / f"seed-{run['seed']}"
        assert json.loads((directory / "certificate.json").read_text())["passed"]
    control = found["cells"]["tiny sparsity=0.5 uniform 0"]["epochs"]
    assert [row["epoch"] for row in control] == [1, 2, pytest.approx(7 / 3)]
    assert not control[0]["fits"] and control[-1]["fits"]
    assert found["cells"]["tiny sparsity=0.5 pot 0"]["epochs"] == []

    text = pages.page(table, found, made_up)
    assert text.splitlines()[0].startswith("A try, never run on ImageNet as the recipe says: 9 pictures in 3 classes")
    head = next(line for line in text.splitlines() if line.startswith("| budget"))
    assert "last step, nothing chosen" in head and "best epoch, CHOSEN ON THE VALIDATION SET" in head
    row = next(line for line in text.splitlines() if "| fcpts-paper, 2 seeds |" in line).split(" | ")
    runs = [found["cells"][f"tiny sparsity=0.5 fcpts-paper {seed}"] for seed in (0, 1)]
    assert row[2].startswith(f"{50 * sum(run['score'] for run in runs):.2f} ± ")
    assert row[4].endswith(f"({', '.join(str(int(epochs.best(run['epochs'])['epoch'])) for run in runs)})")
    assert row[5] == "12.3 (abstract)"
    pot = next(line for line in text.splitlines() if "| pot, 2 seeds |" in line).split(" | ")
    assert pot[3] == pot[4] == "—"
    assert f"Dense: {100 * found['dense']['tiny']['score']:.2f}; the same weights, the same 9 pictures" in text

    monkeypatch.setattr(allot, "prune", None)  # what is done is not done again
    assert cells.run(table, chosen, made_up) == found
    other = cells.Setting(made_up.train, made_up.val, made_up.out, small=recipes.Small(samples=8))
    with pytest.raises(UsageError, match=r"recipe\.samples=12, asked is 8"):
        cells.run(table, chosen, other)


def test_a_cell_that_was_stopped_goes_on_and_ends_the_same(made_up: cells.Setting):
    table = recipes.load("made-up.yaml")
    chosen = recipes.cells(table, chains=("fcpts-paper",))
    found = cells.run(table, chosen, cells.Setting(made_up.train, made_up.val, Path("whole")))
    asked = iter([False] * 6 + [True] * 3)
    with pytest.raises(Stopped, match="after step 5 of 7"):  # a step of its start, and one beyond the first epoch
        cells.run(table, chosen, made_up, should_stop=lambda: next(asked))
    assert cells.read(made_up)["cells"] == {} and cells.read(made_up)["dense"]
    again = cells.run(table, chosen, made_up)
    (one,), (other,) = found["cells"].values(), again["cells"].values()
    assert other["score"] == one["score"] and other["nll"] == one["nll"] and other["images"] == one["images"]
    assert [row["top1"] for row in other["epochs"]] == [row["top1"] for row in one["epochs"]]
    directory = chosen[0].directory
    before, after = state_of(directory(Path("whole"))), state_of(directory(made_up.out))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_command_line_lists_runs_and_says_what_is_wrong(made_up: cells.Setting, capsys):
    from benchmarks.imagenet.__main__ import main

    given = ["made-up.yaml", "--train", "train", "--val", "val", "--out", "o", "--chains", "pot", "--device", "cpu"]
    assert main([*given, "--list"]) == 0
    assert capsys.readouterr().out == "missing tiny sparsity=0.5 pot 0\n"
    assert main([*given, "--steps", "1", "--workers", "2"]) == 0
    first = Path("o/made-up/made-up.md").read_text().splitlines()[0]
    assert "never run on ImageNet" in first and "steps=1" in first
    assert main([*given, "--list"]) == 0
    assert capsys.readouterr().out == "done    tiny sparsity=0.5 pot 0\n"
    assert main([*given, "--chains", "pt"]) == 2 and main(["fcpts"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "did you mean 'pot'" in said and "--train DIR and --val DIR" in said


def test_the_cost_of_a_training_says_whether_it_is_as_short_as_asked():
    options = cost._parser().parse_args(["--model", "zoo:digits-resnet20", "--batch", "4", "--steps", "2"])
    options.device = "cpu"
    found = {name: cost.measure(name, options) for name in ("plain", "fcpts")}
    assert found["plain"]["shape"] == [1, 16, 16] and found["plain"]["peak"] > 2**26
    found["plain"]["seconds"], found["fcpts"]["seconds"] = 60.0, 90.0
    told = {"model": "m", "shape": [1], "batch": 4, "steps": 2, "found": found, "ratio": {"plain": 1, "fcpts": 1.5}}
    lines = cost.text(told).splitlines()
    assert (
        "1.50 x the time" in lines[2]
        and "at most 1.15 x the time asked: MISSED" in lines[2]
        and "resident set" in lines[0]
    )


# The same in processes of their own


def start(*arguments: str) -> subprocess.Popen:
    code = (
        "import sys, runpy, vision; vision.declare_operators_when_needed(); "
        "runpy.run_module('benchmarks.imagenet', run_name='__main__', alter_sys=True)"
    )
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT)))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    with process:
        said = process.communicate(timeout=600)[0]
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_command_goes_on(made_up: cells.Setting, how: signal.Signals, code: int):
    given = ("made-up.yaml", "--train", "train", "--val", "val", "--device", "cpu", "--out")
    assert ended(start(*given, "whole"))[0] == 0
    killed = start(*given, "out")
    steps = Path("out/made-up/tiny/sparsity=0.5/fcpts-paper/seed-0/steps.jsonl")
    while killed.poll() is None and not (steps.exists() and steps.stat().st_size):
        time.sleep(0.01)
    killed.send_signal(how)
    returned, said = ended(killed)
    assert returned == code and (how == signal.SIGKILL or "the same command goes on" in said)
    assert len(cells.read(cells.Setting(Path(), Path(), Path("out/made-up")))["cells"]) < 3
    assert ended(start(*given, "out"))[0] == 0
    one, other = (json.loads(Path(out, "made-up/results.json").read_text()) for out in ("whole", "out"))
    assert one["cells"].keys() == other["cells"].keys() and one["dense"] == other["dense"]
    for key, run in one["cells"].items():
        assert (run["score"], run["nll"]) == (other["cells"][key]["score"], other["cells"][key]["nll"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "net"), [("fcpts", "resnet18"), ("fcpts", "regnetx_006"), ("unipts", "mobilenet_v2"), ("dsa", "resnet18")]
)
def test_every_chain_of_the_papers_runs_at_a_small_size(made_up: cells.Setting, name: str, net: str):
    small = ["--samples", "8", "--batch", "4", "--steps", "2", "--image-size", "32", "--weights", "random"]
    small += ["--set", "unipts-paper.generations=1", "--set", "unipts-paper.population=3"]
    small += ["--set", "unipts-paper.crossovers=1", "--set", "unipts-paper.mutants=1", "--device", "cpu"]
    budget = recipes.budgets_of(recipes.load(name), net)[0]
    ran = start(name, "--train", "train", "--val", "val", "--only", net, "--budgets", budget, *small)
    code, said = ended(ran)
    assert code == 0, said
    found = json.loads(Path("runs/imagenet", name, "results.json").read_text())
    assert {run["chain"] for run in found["cells"].values()} == set(recipes.load(name).chains)
    assert "weights at random" in Path("runs/imagenet", name, f"{name}.md").read_text().splitlines()[0]


@pytest.mark.slow
def test_the_cost_command_measures_each_in_its_own_process(made_up: cells.Setting):
    ran = start("cost", "--model", "zoo:digits-resnet20", "--batch", "4", "--steps", "4", "--out", "cost.json")
    code, said = ended(ran)
    assert code in (0, 1), said
    assert set(json.loads(Path("cost.json").read_text())["ratio"]) == {"plain", "fcpts", "unipts"}
