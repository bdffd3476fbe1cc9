"""`folder:` as each model was taught to see, and files that are no pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from allot import UsageError
from allot.sources.load import ModelSource, load_data, load_model
from cli.command import done, refused, run

Image = pytest.importorskip("PIL.Image")
CONV = "cli.factories:conv --input 3,16,16"


@pytest.fixture
def pictures() -> list:
    """Six pictures of noise in two classes, 30 x 40, as they lie in the folder."""
    draw = np.random.default_rng(0)
    found = []
    for label in ("cat", "dog"):
        Path(f"pictures/{label}").mkdir(parents=True)
        for number in range(3):
            found.append(Image.fromarray(draw.integers(0, 256, size=(30, 40, 3), dtype=np.uint8)))
            found[-1].save(f"pictures/{label}/{number}.png")
    return found


def cut_off(name: str = "pictures/cat/1.png") -> str:
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[: len(content) // 2])
    return name


# Preprocessing


def test_torchvision_models_see_as_their_default_weights_do(pictures):
    models = pytest.importorskip("torchvision.models")
    own = models.MobileNet_V2_Weights.DEFAULT.transforms()
    assert own.resize_size != [256]  # not what is done for lack of better
    data = load_data("folder:pictures", load_model("torchvision:mobilenet_v2", weights="random"))
    for (found, label), picture, expected in zip(data, pictures, [0, 0, 0, 1, 1, 1], strict=True):
        assert torch.equal(found, own(picture)) and label == expected


def test_torchvision_models_see_at_the_size_that_is_asked(pictures):
    models = pytest.importorskip("torchvision.models")
    source = load_model("torchvision:mobilenet_v2", weights="random", shape=(3, 64, 64))
    own = models.MobileNet_V2_Weights.DEFAULT.transforms(crop_size=64, resize_size=round(64 * 232 / 224))
    assert torch.equal(load_data("folder:pictures", source)[0][0], own(pictures[0]))
    wide = load_model("torchvision:mobilenet_v2", weights="random", shape=(3, 32, 64))
    assert load_data("folder:pictures", wide)[0][0].shape == (3, 32, 64)


def test_torchvision_models_take_the_size_of_their_weights():
    pytest.importorskip("torchvision.models")
    assert load_model("torchvision:efficientnet_b1", weights="random").example.shape == (1, 3, 240, 240)


@pytest.mark.parametrize(
    ("name", "normalise"),
    [
        ("lraspp_mobilenet_v3_large", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("ssdlite320_mobilenet_v3_large", ((0.0,) * 3, (1.0,) * 3)),  # normalises by itself
    ],
)
def test_torchvision_models_of_pictures_of_any_size_are_told_one(name, normalise, pictures):
    pytest.importorskip("torchvision.models")
    source = load_model(f"torchvision:{name}", weights="random", shape=(3, 32, 32))  # no backbone is fetched either
    assert source.normalise == normalise
    plain = load_data("folder:pictures", ModelSource(torch.nn.Identity(), torch.zeros(1, 3, 32, 32), normalise))
    assert torch.equal(load_data("folder:pictures", source)[0][0], plain[0][0])


@pytest.mark.parametrize("size", [176, 64])
def test_timm_models_see_as_their_configuration_says(size, pictures):
    timm = pytest.importorskip("timm")
    source = load_model("timm:resnet10t", weights="random", shape=None if size == 176 else (3, size, size))
    config = timm.data.resolve_model_data_config(source.model)
    own = timm.data.create_transform(**{**config, "input_size": (3, size, size)})
    assert source.example.shape[-1] == size
    assert torch.equal(load_data("folder:pictures", source)[2][0], own(pictures[2]))


def vit(transformers, **processing) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_labels=2,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained("net")
    if processing:
        transformers.ViTImageProcessor(**processing).save_pretrained("net")


@pytest.mark.parametrize("shape", [None, (3, 8, 8), (3, 8, 24)])
def test_hf_models_see_as_the_preprocessor_beside_them_does(shape, pictures, caplog):
    transformers = pytest.importorskip("transformers")
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    vit(transformers, size={"height": 16, "width": 16}, **own)
    _, height, width = shape or (3, 16, 16)
    expected = transformers.ViTImageProcessor(size={"height": height, "width": width}, **own)
    found = load_data("folder:pictures", load_model("hf:net", shape=shape))[1][0]
    assert torch.equal(found, expected(images=pictures[1], return_tensors="pt")["pixel_values"][0])
    assert not caplog.records


def test_hf_models_that_crop_do_so_at_the_size_that_is_asked(pictures, caplog):
    transformers = pytest.importorskip("transformers")
    vit(transformers)
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained("net")
    for side, edge in ((16, 20), (8, 10)):
        own = transformers.CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": side, "width": side})
        found = load_data("folder:pictures", load_model("hf:net", shape=(3, side, side)))[1][0]
        assert torch.equal(found, own(images=pictures[1], return_tensors="pt")["pixel_values"][0])
    assert not caplog.records


def test_a_preprocessor_that_cannot_be_used_is_told_and_its_mean_is_used(pictures):
    vit(pytest.importorskip("transformers"))
    settings = '{"image_processor_type": "FutureImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}'
    Path("net/preprocessor_config.json").write_text(settings)
    source = load_model("hf:net")
    plain = load_data("folder:pictures", ModelSource(source.model, source.example, source.normalise))
    assert torch.equal(load_data("folder:pictures", source)[0][0], plain[0][0])
    told = done("prune hf:net --data folder:pictures --budget sparsity=0.5 --repair none --out RUN").err
    assert told.count("note: the preprocessor of hf:net cannot be used here") == 1


@pytest.mark.parametrize("own", [lambda image: torch.zeros(3, 5, 5), lambda image: 1 / 0])
def test_a_preprocessing_that_gives_another_size_is_told_and_left_out(own, pictures, caplog):
    example = torch.zeros(1, 3, 16, 16)
    plain = load_data("folder:pictures", ModelSource(torch.nn.Identity(), example))
    with caplog.at_level(logging.WARNING, logger="allot"):
        odd = load_data("folder:pictures", ModelSource(torch.nn.Identity(), example, preprocess=lambda shape: own))
    assert torch.equal(odd[0][0], plain[0][0])
    assert "makes no pictures of [3, 16, 16]" in caplog.text


# Workers


def test_folders_read_by_workers_give_the_same_run(pictures):
    line = f"prune {CONV} --data folder:pictures --test folder:pictures --budget sparsity=0.5 --method erk --json --out"
    alone, together = done(f"{line} ONE").json, done(f"{line} TWO --workers 2").json
    assert alone["scores"] == together["scores"] and alone["budget"] == together["budget"]
    assert Path("ONE/model.safetensors").read_bytes() == Path("TWO/model.safetensors").read_bytes()
    assert "workers: 2" in Path("TWO/recipe.yaml").read_text()
    # how many read is no part of what was asked
    assert done(f"{line} ONE --workers 3").json["kept"] == alone["kept"]
    assert done(f"evaluate TWO --model {CONV} --workers 2 --json").json["score"] == alone["scores"]["sparse"]


def test_a_number_of_workers_below_none_is_refused(pictures):
    assert "workers" in refused(f"prune {CONV} --data folder:pictures --budget sparsity=0.5 --workers -1 --out RUN")
    assert "workers" in refused(f"evaluate {CONV} --data folder:pictures --workers -1")


# Files that are no pictures


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_broken_picture_is_an_error_that_names_it_and_the_way_around(damage, pictures):
    name = "pictures/cat/1.png"
    if damage == "cut":
        cut_off(name)
    else:
        Path(name).write_text("" if damage == "empty" else "no picture")
    for line in (f"prune {CONV} --budget sparsity=0.5 --out RUN --data", f"evaluate {CONV} --data"):
        for workers in (0, 2):
            error = refused(f"{line} folder:pictures --workers {workers}")
            assert f"{name} cannot be read" in error and "--skip-corrupt" in error
    assert not Path("RUN").exists()


def test_broken_pictures_are_left_out_by_choice_and_told_once(pictures):
    name = cut_off()
    line = f"prune {CONV} --data folder:pictures --test folder:pictures --budget sparsity=0.5 --method erk"
    line += " --skip-corrupt --out"
    outcome = done(f"{line} RUN --json")
    assert outcome.err.count(name) == 1 and f"note: left out: {name} cannot be read" in outcome.err
    told = outcome.json
    assert told["unreadable"] == 1 and told["scores"]["samples"] == 5 and told["scores"]["unreadable"] == 1
    assert "samples that cannot be read" in done("report RUN").err
    # the run says how it was made, so that it is scored, and made again, in the same way
    scored = done(f"evaluate RUN --model {CONV} --json").json
    assert scored["score"] == told["scores"]["sparse"] and scored["unreadable"] == 1
    Path(name).unlink()
    done(f"{line.replace(' --skip-corrupt', '')} CLEAN")
    assert Path("RUN/model.safetensors").read_bytes() == Path("CLEAN/model.safetensors").read_bytes()


def test_a_run_with_broken_pictures_goes_on_with_the_same_ones(pictures):
    cut_off()
    line = f"prune {CONV} --data folder:pictures --budget sparsity=0.5 --skip-corrupt --workers 2 --json --out RUN"
    first = done(line).json
    assert done(line).json["unreadable"] == 1 == first["unreadable"]


def test_skip_corrupt_is_a_key_of_recipes(pictures):
    cut_off()
    Path("r.yaml").write_text("skip_corrupt: true\nworkers: 1\ndata: folder:pictures\n")
    done(f"prune {CONV} --recipe r.yaml --budget sparsity=0.5 --out RUN")
    assert "skip_corrupt" in refused(f"prune {CONV} --set skip_corrupt=perhaps --budget sparsity=0.5 --out RUN2")


def test_a_folder_without_pictures_is_refused(pictures):
    for file in Path("pictures").rglob("*.png"):
        file.write_text("no picture")
    told = run(f"prune {CONV} --data folder:pictures --budget sparsity=0.5 --skip-corrupt --out RUN")
    assert told.code == 2 and "none of the 6 samples can be read; the first: pictures/" in told.err
    for file in Path("pictures/dog").glob("*.png"):
        file.unlink()
    error = refused(f"prune {CONV} --data folder:pictures --budget sparsity=0.5 --out RUN")
    assert "pictures: no pictures in dog: files that end in .jpg" in error
    for folder in ("cat", "dog"):
        for file in Path(f"pictures/{folder}").glob("*"):
            file.unlink()
        Path(f"pictures/{folder}").rmdir()
    assert "one sub-folder a class" in refused(f"prune {CONV} --data folder:pictures --budget sparsity=0.5 --out RUN")


def test_data_without_places_ignore_the_choice():
    spec = "cli.factories:generator"
    data = load_data(spec, skip_corrupt=True)
    assert len(list(data)) == 40
    with pytest.raises(UsageError, match="no such folder"):
        load_data("folder:none", ModelSource(torch.nn.Identity(), torch.zeros(1, 3, 4, 4)), skip_corrupt=True)
