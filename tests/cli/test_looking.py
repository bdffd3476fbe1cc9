"""Pages, sweeps and named recipes on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allot.cli.recipe import RecipeFile, gallery
from allot.errors import UsageError
from allot.export.timing import latency as timing
from allot.methods import METHODS, RECIPES
from allot.network.layers import Scope
from allot.network.macs import measured
from allot.pruning import advise as advising
from allot.pruning.advise import break_even
from allot.pruning.assemble import assemble
from cli.command import MLP, NET, SAMPLES, done, refused, run
from contract.cases import short
from export.timing.test_latency import work


def test_every_run_has_a_page_and_several_have_one_together():
    for seed in (0, 1):
        made = done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method erk --seed {seed} --out RUN{seed}")
        assert f"RUN{seed}/report.html" in made.err and Path(f"RUN{seed}/report.html").exists()
    assert "page: RUN0/report.html" in done("report RUN0").err
    assert "page: report.html" in done("report RUN0 RUN1").err and "RUN1" in Path("report.html").read_text()
    done("report RUN0 RUN1 --out both.html --json")
    assert Path("both.html").read_text() == Path("report.html").read_text()
    assert "cannot write" in refused("report RUN0 RUN1 --out nowhere/both.html")
    assert 'href="RUN1/report.html"' in Path("report.html").read_text()


def test_a_comparison_goes_into_the_folder_that_holds_the_runs():
    for name in ("runs/a", "runs/deep/b"):
        done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair none --out {name}")
    assert "page: runs/report.html" in done("report runs/a runs/deep/b").err
    page = Path("runs/report.html").read_text()
    assert 'href="a/report.html"' in page and 'href="deep/b/report.html"' in page
    assert f"page: {Path.cwd()}/runs/report.html" in done(f"report {Path.cwd()}/runs/a runs/deep/b").err
    assert "page: runs/report.html" in done("report runs/a runs/a").err  # not into the run itself
    assert done("verify runs/a --json").json["passed"]


def test_a_run_that_cannot_be_shown_is_named_in_one_line():
    done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair none --out RUN")
    done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair none --seed 1 --out OTHER")
    whole = Path("RUN/report.json").read_text()
    for text in ("{}", "[]", json.dumps({**json.loads(whole), "layers": 5})):
        Path("RUN/report.json").write_text(text)
        for line in ("report RUN", "report RUN OTHER"):
            assert "report.json of RUN does not hold what a report needs" in refused(line)
    Path("RUN/report.json").write_text(whole)
    done("report RUN RUN")
    assert "<h1>One run</h1>" in Path("report.html").read_text()
    certificate = Path("RUN/certificate.json").read_text()
    Path("RUN/certificate.json").write_text("5")
    assert "RUN/certificate.json cannot be read" in refused("report RUN")
    Path("RUN/certificate.json").write_text(certificate)
    with Path("RUN/steps.jsonl").open("ab") as steps:
        steps.write(b"\xff\n5\n")
    done("report RUN")


def test_a_run_ends_with_the_checks_that_verify_makes():
    said = done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair none --out RUN").err
    count = re.search(r"verified: (\d+) checks", said)[1]
    assert len(done("verify RUN --json").json["rows"]) == int(count)


def test_an_export_is_a_row_of_the_page():
    chain = "--pattern channels --allocate uniform --repair none --samples 8"
    done(f"prune {NET} --data {NET} --budget macs=60% {chain} --out RUN")
    row = done("export RUN --to slim --json").json
    done("export RUN --to slim")
    assert [export["form"] for export in json.loads(Path("RUN/report.json").read_text())["exports"]] == ["slim"]
    assert f"{row['bytes']:,}" in Path("RUN/report.html").read_text()
    assert done("verify RUN --json").json["passed"]


def test_the_files_of_a_run_are_exports_as_well():
    done(f"prune {NET} --data {NET} --budget sparsity=0.9 --repair none --samples 8 --out RUN")
    for form, most in (("safetensors", 1.0), ("bitmask", 0.14)):
        row = done(f"export RUN --to {form} --json").json
        assert row["error"] == 0 and row["bytes"] == Path(row["file"]).stat().st_size <= most * row["dense_bytes"]
        done(f"export RUN --to {form} --out copy.safetensors")
        assert Path("copy.safetensors").read_bytes() == Path(row["file"]).read_bytes()
        assert done("verify copy.safetensors --json").json["passed"]
    size = json.loads(Path("RUN/report.json").read_text())["bytes"]
    assert size["with_ideal_mask"] < size["file"] < 1.15 * size["with_ideal_mask"]
    assert "slim is for runs of channels" in refused("export RUN --to slim")
    assert "save_pretrained" in refused("export RUN --to hf")


def test_a_sweep_ends_in_a_table_and_goes_on():
    line = f"sweep {MLP} --data {SAMPLES} --budget sparsity=0.5,0.7 --method erk,pot --seeds 2 --out SWEEP --samples 8"
    line += " --repair none"
    began = done(f"{line} --json")
    table = began.json
    assert "run 1 of 12: erk, sparsity=0.5, seed 0" in began.err and "run 2 of 12: uniform+erk" in began.err
    assert "4 more as controls: uniform densities with the same repair" in began.err
    assert [row["method"] for row in table["means"]] == ["erk", "uniform+erk", "pot"] * 2  # one control for both
    assert len(table["cells"]) == 12 and table["out"] == "SWEEP" and Path("SWEEP/report.html").exists()
    again = done(line).err
    assert "sparsity=0.7" in again and "pot" in again and "comparison: SWEEP/report.html" in again
    assert len(done("report SWEEP --out all.html --json").json["runs"]) == 12
    assert 'href="SWEEP/erk/sparsity%3D0.5/seed-0/report.html"' in Path("all.html").read_text()
    assert 'href="uniform%2Berk/sparsity%3D0.5/seed-0/report.html"' in Path("SWEEP/report.html").read_text()
    alone = done(f"{line.replace('SWEEP', 'ALONE')} --no-control --json").json
    assert len(alone["cells"]) == 8 and alone["cells"][0]["score"] == table["cells"][0]["score"]
    assert "needs MODEL" in refused(f"sweep {MLP} --budget sparsity=0.5")
    assert "nothere" in refused(f"sweep {MLP} --budget sparsity=0.5 --method nothere --out S")
    assert "out of range" in refused(f"sweep {MLP} --budget sparsity=0.5,2 --out S")


def test_exported_weights_are_asked_with_the_code_of_their_model():
    done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair none --out RUN")
    assert done(f"verify RUN --model {MLP} --json").json["rows"][-1]["check"] == "outputs on the probe"
    done(f"export RUN --model {MLP} --data {SAMPLES} --to bitmask --out away.safetensors")
    assert done(f"verify away.safetensors --model {MLP} --json").json["rows"][-1]["check"] == "outputs on the probe"
    assert "another model" in refused("verify away.safetensors --model cli.factories:conv")
    said = done("report RUN").err
    assert "bitmask" in said and "of ideal mask" in said


@pytest.mark.parametrize("name", gallery())
def test_a_named_recipe_is_a_whole_one(name: str):
    wanted = RecipeFile.resolve(Path(name), {}, ())
    assert wanted.parsed_budget() and assemble(wanted.method, pattern=wanted.pattern)
    assert done(f"recipes {name}").err.startswith("# ") and name in done("recipes").err
    assert done(f"recipes {name} --json").json[name] == gallery()[name].read_text()


OF_A_USER = "cli.factories:wide_conv --data cli.factories:pictures --input 3,10,10"
OF_THE_ZOO = f"{NET} --data {NET} --samples 24"


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        *(pytest.param(OF_A_USER, name, id=f"of a user-{name}") for name in gallery()),
        *(
            pytest.param(OF_THE_ZOO, name, id=f"of the zoo-{name}", marks=[] if name == "quick" else pytest.mark.slow)
            for name in gallery()
        ),
    ],
)
def test_a_named_recipe_prunes_a_net(asked: str, name: str, monkeypatch: pytest.MonkeyPatch):
    recipe = RecipeFile.resolve(Path(name), {}, ())
    chain = RECIPES[recipe.method]
    for part in (chain.allocate, *chain.repair):
        monkeypatch.setitem(METHODS, part, short(METHODS[part]))
    asked = asked.partition(" --data")[0] + " --input 3,10,10" if recipe.data and "user" in asked else asked
    report = done(f"prune {asked} --recipe {name} --out RUN --json").json
    assert all(row["met"] for row in report["budget"]) and report["method"] == recipe.method
    assert [f"{row['kind']}={row['asked']}" for row in report["budget"]] == [
        f"{kind}={amount}" for kind, amount in recipe.parsed_budget().to_json().items()
    ]
    assert done("verify RUN --json").json["passed"]


def test_a_named_recipe_that_is_none_has_a_neighbour():
    assert "quick" in refused(f"prune {MLP} --recipe quik --data {SAMPLES} --out RUN2")
    assert "quick" in refused("recipes quik")


def test_advice_is_given_in_sentences_a_table_and_a_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "timed", work)  # a clock that counts multiply-accumulates
    told = done(f"advise {NET} --runtime torch --pattern channels --json").json
    assert [row["macs"] for row in told["channels"]] == pytest.approx([0.9, 0.7, 0.5, 0.3], abs=0.05)
    for row in told["channels"]:
        assert row["faster"] == pytest.approx(1 / row["macs"], rel=0.1)
    assert told["machine"]["threads"] and "torch" in told["machine"]["runtimes"]
    assert told["said"][0].startswith("Channels pay from")
    first, second = (command.replace("\\\n  ", "") for command in told["commands"])
    assert first == (
        f"allot prune {NET} --data {NET} --runtime torch --budget macs=50% --method dsa --pattern channels "
        "--out runs/channels"
    )
    assert second == "allot export runs/channels --to slim"
    shown = done(f"advise {NET} --runtime torch --out advice.html").err
    assert "classify.weight" in shown and "page: advice.html" in shown and f"allot prune {NET}" in shown
    page = Path("advice.html").read_text()
    assert "Dashed: as fast as dense" in page and f"<pre>allot prune {NET}" in page
    # its one linear layer has a ten-thousandth of the MACs: a row of the table, and no curve
    assert "classify." in page and "Linear layers as sparse matrices, PyTorch, measured" not in page
    assert "no MODEL" in refused("advise")
    assert "channels:8 for multiples" in refused(f"advise {NET} --pattern 2:4")


def test_what_single_weights_gain_is_foretold_for_the_whole_net(monkeypatch: pytest.MonkeyPatch):
    """Of three alike layers of 10 ms in a net of 50 ms, each takes 4 ms at densities up to 0.1, and 12 ms above."""

    def clock(runs: Any, **settings: Any) -> dict[Any, float]:
        return {key: 50.0 if key == "net" else 10.0 if key == "dense" or key > 0.1 else 4.0 for key in runs}

    monkeypatch.setattr(advising, "timed", clock)
    layers = [nn.Linear(8, 8) for _ in range(3)]
    model = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), *layers)
    example = torch.randn(1, 1, 8)
    scope = measured(Scope.of(model), model, lambda: model(example))
    rows, net = advising._linear(model, example, scope)
    assert [(row["layer"], row["layers"]) for row in rows] == [("1.weight", 3)]
    assert rows[0]["share"] == pytest.approx(3 * 64 / (3 * 64 + 3 * 8)) and rows[0]["break_even"] == 0.5
    assert net["faster"]["0.2"] == 1 and net["faster"]["0.1"] == pytest.approx(50 / (50 - 3 * 6))
    told = {"channels": [], "why_not": "none", "linear": rows, "net": net, "semi_structured": None}
    assert "pay from a density of 0.1 down, as sparse matrices in PyTorch (1.56x" in advising._sentences(told)[1]
    assert advising._linear(nn.Conv1d(1, 1, 3), example, Scope.of(nn.Conv1d(1, 1, 3))) == ([], None)


@pytest.mark.parametrize(
    ("faster", "wanted"),
    [([0.5, 0.8, 1.2], 0.2 + (0.1 - 0.2) * 0.5), ([1.5, 2.0, 3.0], 0.3), ([0.1, 0.2, 0.9], None)],
)
def test_a_break_even_is_where_the_curve_crosses_dense(faster: list[float], wanted: float | None):
    assert break_even((0.3, 0.2, 0.1), faster) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (None, "2:4: no GPU with sparse tensor cores here"),
        ({"a": 1.5, "b": 0.9}, "2:4 pays for 1 of 2 linear layers in half precision on the GPU, up to 1.50x"),
        ({"a": 0.9}, "2:4 does not pay on the GPU here: at most 0.90x"),
        ({}, "2:4: no linear layer takes it."),
    ],
)
def test_what_is_said_of_two_of_four_is_what_was_measured(found: dict[str, float] | None, wanted: str):
    told = {"channels": [], "why_not": "none", "linear": [], "net": None, "semi_structured": found}
    assert advising._sentences(told)[-1].startswith(wanted)


def test_advice_goes_by_pytorch_where_no_other_runtime_takes_the_model(monkeypatch: pytest.MonkeyPatch):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)

    told = advising.advise(Branching(), torch.ones(1, 8), label="mine")
    assert told["runtime"] == "torch" and "captured" not in " ".join(told["said"])
    with pytest.raises(UsageError, match="cannot be captured"):
        advising.advise(Branching(), torch.ones(1, 8), runtime=timing.Runtime("onnx"))


def test_a_model_whose_channels_stay_gets_its_own_reason():
    told = advising.advise(
        nn.Sequential(nn.Flatten(), nn.Linear(8, 4)), torch.ones(1, 8), runtime=timing.Runtime("torch")
    )
    assert told["said"][0].startswith("Channels: no advice (no channels can be removed") and "latency" not in str(told)


def test_a_run_goes_on_to_be_one_when_its_exports_are_gone():
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair none --out RUN"
    done(line)
    done(f"export RUN --model {MLP} --data {SAMPLES} --to program")
    Path("RUN/model.pt2").unlink()
    assert "note: model.pt2: exists: promised yes, found no" in done(line).err
    refused_by_verify = run("verify RUN")
    assert refused_by_verify.code == 4 and "RUN/model.pt2" in refused_by_verify.err


def test_a_sweep_that_is_not_finished_shows_what_is():
    done(f"sweep {MLP} --data {SAMPLES} --budget sparsity=0.5,0.7 --method erk --seeds 1 --repair none --out SWEEP")
    Path("SWEEP/results.json").unlink()
    said = done("report SWEEP --out some.html").err
    assert "is a sweep that is not finished: 4 runs of it are" in said and Path("some.html").exists()
