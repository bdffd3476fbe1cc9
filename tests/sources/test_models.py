"""MODEL on the command line: every origin, its weights, its inputs."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import allot
from allot import UsageError
from allot.sources import zoo
from allot.sources.load import load_model
from cli.command import MLP, NET, done, refused, run
from cli.factories import mlp


@pytest.fixture
def no_network(monkeypatch):
    """Fails at once and says so, whoever tries."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.request.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_zoo_models_come_trained_and_know_their_input(name):
    source = load_model(f"zoo:{name}")
    assert not source.model.training and source.example.shape == (1, 1, 16, 16)
    assert source.model(source.example).shape[0] == 1


def test_zoo_models_have_no_other_weights_at_random():
    with pytest.raises(UsageError, match="has its own"):
        load_model(NET, weights="random")


def test_torchvision_models_with_random_weights_need_no_download(no_network):
    source = load_model("torchvision:mobilenet_v3_small", weights="random")
    assert source.example.shape == (1, 3, 224, 224)
    said = done("plan torchvision:mobilenet_v3_small --budget macs=50% --input 3,64,64 --json").json
    assert said["budget"][0]["met"] and said["model"] == "torchvision:mobilenet_v3_small"


def test_a_plan_of_random_weights_says_so_where_it_matters(no_network):
    line = "plan torchvision:squeezenet1_1 --input 3,64,64 --budget sparsity=0.9"
    assert "note: random weights; lamp depends on the weights" in done(f"{line} --method lamp").err
    assert "note" not in done(f"{line} --method erk").err


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", "timm:resnet10t", "hf:nobody/nothing"])
def test_a_download_that_fails_names_the_way_around_it(spec, no_network):
    outcome = run(f"prune {spec} --budget sparsity=0.9 --repair none --out RUN --json")
    assert outcome.code == 2 and outcome.out == "" and "Traceback" not in outcome.err
    error = outcome.err.splitlines()[-1]  # the libraries may say that they download
    assert error.startswith(f"error: cannot load {spec}: ") and "--weights" in error
    assert not Path("RUN").exists()


def test_a_name_out_of_a_thousand_gets_the_nearest_and_not_the_whole_list():
    for spec, near in [("torchvision:resnet51", "'resnet50'"), ("timm:resnet10", "'resnet10t'")]:
        error = refused(f"plan {spec} --budget sparsity=0.9")
        assert near in error and "list_models()" in error and len(error) < 250


def test_timm_models_bring_their_input_and_normalisation():
    source = load_model("timm:resnet10t", weights="random")
    assert source.example.shape == (1, 3, 176, 176) and len(source.normalise[0]) == 3
    assert done("plan timm:resnet10t --input 3,64,64 --budget macs=50% --json").json["budget"][0]["met"]


# Weights


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "model", "module."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_from_a_file_are_the_models(ending, wrapped):
    other = mlp()
    torch.nn.init.normal_(other[0].weight)
    state = other.state_dict()
    if ending == "safetensors":
        safetensors.torch.save_file(state, "w.safetensors")
    elif wrapped == "module.":
        torch.save({f"module.{name}": value for name, value in state.items()}, "w.pt")
    else:
        torch.save(state if wrapped == "plain" else {wrapped: state, "epoch": 3}, "w.pt")
    assert same(load_model(MLP, weights=f"w.{ending}").model, other)


def test_weights_of_a_run_fit_the_model_again():
    done(f"prune {NET} --budget sparsity=0.9 --repair none --out RUN")
    for file in ("model.safetensors", "model.bitmask.safetensors"):
        model = load_model(NET, weights=f"RUN/{file}").model
        assert int(torch.count_nonzero(model.classify.weight)) <= model.classify.weight.numel()
        assert sum(int(torch.count_nonzero(p)) for p in model.parameters() if p.dim() > 1) == 27061


def test_weights_from_a_file_need_no_download(no_network):
    torch.save(load_model("torchvision:squeezenet1_1", weights="random").model.state_dict(), "w.pt")
    done("plan torchvision:squeezenet1_1 --weights w.pt --input 3,64,64 --method lamp --budget sparsity=0.9")


def test_input_is_the_shape_of_one_example():
    assert load_model(MLP).example is None
    assert load_model(MLP, shape=(6,)).example.shape == (1, 6)
    assert "[1, 7]" in refused(f"plan {MLP} --input 7 --budget macs=50%")


# Directories of the transformers library


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def bert(transformers) -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained("net")


def gpt2(transformers) -> None:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained("net")


def vit(transformers) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained("net")


@pytest.mark.parametrize("build", [bert, gpt2, vit])
def test_hf_directories_are_pruned_exactly_without_being_told_their_inputs(build, transformers):
    build(transformers)
    outcome = done("prune hf:net --budget macs=50%,sparsity=0.5 --repair none --out RUN --json")
    said = outcome.json
    assert "Loading weights" not in outcome.err
    assert said["kept"] <= said["total"] / 2 and all(row["met"] for row in said["budget"])
    assert all(layer["macs"] for layer in said["layers"] if "pooler" not in layer["name"])
    assert done("verify RUN --json").json["passed"]


def test_hf_runs_are_exported_as_directories_that_from_pretrained_opens(transformers):
    vit(transformers)
    done("prune hf:net --budget sparsity=0.5 --repair none --out RUN")
    row = done("export RUN --to hf --json").json
    assert row["form"] == "hf" and row["error"] == 0 and row["bytes"] > 0 and row["params"] == row["dense_params"]
    again = transformers.ViTForImageClassification.from_pretrained("RUN/hf").state_dict()
    kept = allot.load("RUN")
    assert all(torch.equal(again[name], value) for name, value in kept.items() if name in again)


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/net", "a/b/c"])
def test_hf_directories_that_are_not_there_are_not_asked_for_elsewhere(name: str, no_network: None):
    pytest.importorskip("transformers")
    assert refused(f"plan hf:{name} --budget sparsity=0.5") == f"error: hf:{name}: no such directory.\n"


def test_hf_plans_of_a_directory_use_its_weights(transformers):
    bert(transformers)
    outcome = done("plan hf:net --method lamp --budget sparsity=0.5")
    assert "random weights" not in outcome.err


def test_hf_conv1d_and_tied_embeddings_are_in_scope_once(transformers):
    gpt2(transformers)
    said = done("plan hf:net --budget sparsity=0.5 --json").json
    names = [layer["name"] for layer in said["layers"]]
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert ("transformer.wte.weight" in names) != ("lm_head.weight" in names)
    assert said["skipped"]["transformer.wpe.weight"] == "lookup table, not a matrix product"


def test_hf_classifiers_are_scored_on_dictionaries_of_arrays(transformers):
    bert(transformers)
    ids = np.arange(60).reshape(6, 10) % 40
    np.savez("text.npz", input_ids=ids, attention_mask=np.ones_like(ids), labels=np.arange(6) % 3)
    done("prune hf:net --data npz:text.npz --test npz:text.npz --budget sparsity=0.5 --repair variance --out RUN")
    assert done("evaluate RUN --json").json["samples"] == 6


def test_hf_pictures_are_normalised_as_the_directory_says(transformers):
    vit(transformers)
    assert load_model("hf:net").normalise is None
    Path("net/preprocessor_config.json").write_text('{"image_mean": [0.25], "image_std": [0.5]}')
    source = load_model("hf:net")
    assert source.normalise == ((0.25,), (0.5,)) and source.example.shape == (1, 1, 16, 16)
