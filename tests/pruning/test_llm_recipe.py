"""The recipe `llm`: the head of a language model stays dense, masks and weights of the rest are those of admm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import allot
from allot.errors import UsageError
from allot.methods import METHODS
from allot.pruning.assemble import assemble
from allot.sources.files import Texts
from allot.sources.load import load_model
from cli.command import done
from sources.language import gpt2, llama, text

HEAD = "output head of a language model: the recipe leaves it dense unless --include names it"
TIED = HEAD.replace("model:", "model, which is the embedding as well:")


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def blocks() -> Texts:
    return Texts(torch.randint(0, 11, (16, 8), generator=torch.Generator().manual_seed(0)))


def test_the_head_stays_dense_and_says_why():
    llama()
    result = allot.prune(load_model("hf:net").model, blocks(), "sparsity=0.5", method="llm")
    report = result.report()
    assert report["skipped"]["lm_head.weight"] == HEAD and report["skipped"]["model.embed_tokens.weight"]
    assert len(report["layers"]) == 7 and report["kept"] * 2 == report["total"]
    assert torch.equal(result.model().lm_head.weight, load_model("hf:net").model.lm_head.weight)
    assert done("plan hf:net --method llm --budget sparsity=0.5 --json").json["skipped"] == report["skipped"]


def test_a_head_that_is_the_embedding_stays_dense_as_well():
    gpt2()
    report = allot.prune(load_model("hf:net").model, blocks(), "sparsity=0.5", method="llm").report()
    assert report["skipped"]["transformer.wte.weight"] == TIED
    assert {layer["name"].rpartition(".")[0].rpartition(".")[2] for layer in report["layers"]} == {
        "c_attn", "c_proj", "c_fc",
    }  # fmt: skip


def test_a_head_that_is_included_by_name_is_pruned():
    llama()
    model = load_model("hf:net").model
    rules = allot.Rules(include=("lm_head", "*.mlp.*"))
    report = allot.prune(model, blocks(), "sparsity=0.5", method="llm", rules=rules).report()
    assert [layer["name"] for layer in report["layers"]][-1] == "lm_head.weight" and len(report["layers"]) == 4


def test_other_recipes_and_models_without_a_head_are_as_before():
    llama()
    assert (
        "lm_head.weight" in allot.prune(load_model("hf:net").model, blocks(), "sparsity=0.5", method="erk").allocation
    )
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    assert len(allot.prune(plain, torch.randn(8, 6), "sparsity=0.5", method="llm").allocation) == 2
    assert assemble("llm").names.dense_head and not assemble("erk").names.dense_head


def test_a_language_model_takes_it_where_no_method_is_named():
    llama()
    made = allot.prune(load_model("hf:net").model, blocks(), "sparsity=0.5")
    assert made.method == "llm" and "lm_head.weight" not in made.allocation
    parts = allot.prune(load_model("hf:net").model, blocks(), "sparsity=0.5", repair="none")
    assert parts.method == "erk"


def test_a_run_says_what_it_left_dense_and_its_recipe_repeats_it():
    llama()
    data = f"text:{text(400)}"
    done(f"prune hf:net --data {data} --input 8 --recipe llm --out RUN")
    run = json.loads(Path("RUN/run.json").read_text())
    assert run["configuration"]["exclude"] == ["lm_head.weight"] and run["configuration"]["samples"] == 50
    done(f"prune hf:net --data {data} --input 8 --recipe llm --out RUN")  # finished: opened again
    done("prune --recipe RUN/recipe.yaml --out AGAIN")
    model = load_model("hf:net", shape=(8,)).model
    saved = Path("PYTHON")
    allot.prune(model, blocks(), "sparsity=0.5", method="llm", save_to=saved)
    assert yaml.safe_load((saved / "recipe.yaml").read_text())["exclude"] == ["lm_head.weight"]
    done(f"prune hf:net --data {data} --input 8 --samples 50 --recipe PYTHON/recipe.yaml --out THIRD")
    kept = [allot.load(name) for name in ("RUN", "AGAIN", "THIRD")]
    assert all(torch.equal(one[name], two[name]) for one in kept for two in kept for name in one)


def test_masks_are_chosen_by_admm_and_a_score_is_made_only_where_no_repair_does_so():
    chain = assemble("llm")
    assert chain.names.repair == ("admm",) and str(chain.pattern) == "rows" and chain.names.score == "magnitude"
    alone = assemble("llm", repair="none")
    assert alone.names.score == "wanda" and str(alone.pattern) == "rows"
    assert assemble("llm", repair="bias").names.score == "wanda"
    assert assemble("llm", score="wanda").names.score == "wanda"
    assert assemble("llm", pattern="channels").names.score == "magnitude"


def test_options_of_the_recipe_hold_unless_others_are_given():
    assert METHODS["admm"].iterations != 10
    for given, iterations, refinement in (({}, 10, 4), ({"refinement": 3}, 10, 3), ({"iterations": 5}, 5, 4)):
        (admm,) = assemble("llm", options={"admm": given}).repair
        assert (admm.iterations, admm.refinement) == (iterations, refinement)
    assert not assemble("llm", repair="none").names.options
    with pytest.raises(UsageError, match="no method of this run is called"):
        assemble("llm", repair="none", options={"admm": {"iterations": 5}})


def test_a_run_from_other_parts_repeats_the_options_of_the_recipe():
    llama()
    settings = {"method": "llm", "allocate": "erk", "options": {"admm": {"refinement": 1}}}
    allot.prune(load_model("hf:net").model, blocks(), "sparsity=0.5", save_to="RUN", **settings)
    recipe = yaml.safe_load(Path("RUN/recipe.yaml").read_text())
    assert recipe["method"] == "erk" and recipe["options"] == {"admm": {"iterations": 10, "refinement": 1}}


def test_wanda_keeps_the_highest_products_of_each_row():
    llama()
    model = load_model("hf:net").model
    result = allot.prune(model, blocks(), "sparsity=0.5", method="llm", repair="none")
    name = "model.layers.0.self_attn.q_proj.weight"
    inputs = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(**result.problem.inputs().batch(0)[0])
    weight = model.get_parameter(name).detach()
    score = weight.abs() * inputs[-1].flatten(0, 1).square().sum(0).sqrt()
    best = score.argsort(1, descending=True)[:, : weight.shape[1] // 2]
    assert torch.equal(result.masks[name], torch.zeros_like(weight, dtype=torch.bool).scatter_(1, best, True))
