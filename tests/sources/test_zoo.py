"""The zoo keeps its promises: disjoint splits, small files, nets that score what their cards say."""

import hashlib
import re
from importlib import resources
from itertools import combinations

import pytest
import torch
from torch import nn

from allot.errors import UsageError
from allot.sources import zoo
from allot.sources.zoo._catalogue import arrays

FILES = resources.files("allot.sources.zoo")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def card(name: str) -> str:
    return FILES.joinpath("cards", f"{name}.md").read_text(encoding="utf-8")


def correct(net: nn.Module, dataset: torch.utils.data.TensorDataset) -> int:
    images, labels = dataset.tensors
    with torch.inference_mode():
        return sum(
            int((net(x).argmax(1) == y).sum()) for x, y in zip(images.split(256), labels.split(256), strict=True)
        )


@pytest.mark.parametrize("name", zoo.DATASETS)
def test_no_image_is_in_two_splits_nor_twice_in_one(name):
    digests = {s: [hashlib.sha256(i.tobytes()).digest() for i in arrays(name, s)[0]] for s in zoo.SPLITS}
    assert all(len(set(d)) == len(d) for d in digests.values())
    assert all(set(digests[a]).isdisjoint(digests[b]) for a, b in combinations(zoo.SPLITS, 2))


@pytest.mark.parametrize("name", zoo.DATASETS)
def test_no_base_picture_is_in_two_splits(name):
    ids = {s: set(arrays(name, s)[2].tolist()) for s in zoo.SPLITS}
    assert all(ids[a].isdisjoint(ids[b]) for a, b in combinations(zoo.SPLITS, 2))


def test_digits_test_split_covers_797_base_digits():
    assert len(set(arrays("digits", "test")[2].tolist())) == 797


def test_glyph_test_faces_are_in_no_other_split():
    face = {s: set((arrays("glyph", s)[2] // 62).tolist()) for s in zoo.SPLITS}
    assert face["test"] == set(range(16, 21))
    assert face["calibration"] | face["validation"] <= set(range(16))


def test_glyph_id_names_the_character():
    for split in zoo.SPLITS:
        _, labels, ids = arrays("glyph", split)
        assert (ids % 62 == labels).all()


@pytest.mark.parametrize("split", zoo.SPLITS)
@pytest.mark.parametrize("name", zoo.DATASETS)
def test_images_and_labels_have_the_promised_shape_type_and_range(name, split):
    images, labels = zoo.data(name, split).tensors
    assert images.shape == (len(labels), 1, 16, 16)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.isfinite(images).all()
    assert sorted(labels.unique().tolist()) == list(range(zoo.DATASETS[name].classes))
    assert len(labels) >= {"calibration": 1000, "validation": 800, "test": 3000}[split]


@pytest.mark.parametrize("name", zoo.DATASETS)
def test_calibration_pixels_are_normalised(name):
    images, _ = zoo.data(name, "calibration").tensors
    assert images.mean().abs() < 0.05
    assert (images.std() - 1).abs() < 0.05


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_net_scores_on_test_what_its_card_says(name):
    hits, samples, percent = re.search(r"top-1 on `test`: (\d+) of (\d+) = (\S+) %", card(name)).groups()
    test = zoo.data(name, "test")
    assert len(test) == int(samples)
    assert abs(correct(zoo.model(name), test) - int(hits)) <= 1
    assert f"{100 * int(hits) / int(samples):.2f}" == percent


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_card_states_the_number_of_parameters(name):
    parameters = sum(p.numel() for p in zoo.model(name).parameters())
    assert f"{parameters:,} parameters" in card(name)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_loaded_net_is_float32_on_cpu_in_eval_mode_and_never_shared(name):
    net = zoo.model(name)
    assert not any(module.training for module in net.modules())
    assert {(p.dtype, p.device.type) for p in net.parameters()} == {(torch.float32, "cpu")}
    assert all(p.requires_grad for p in net.parameters())
    assert all(p is not q for p, q in zip(net.parameters(), zoo.model(name).parameters(), strict=True))
    assert net(torch.zeros(2, 1, 16, 16)).shape == (2, zoo.MODELS[name].classes)


def test_loading_a_net_leaves_the_random_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    zoo.model("digits-resnet20")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "file", [f"weights/{m}.safetensors" for m in zoo.MODELS] + ["data/digits.npz", "data/glyph.npz"]
)
def test_no_file_is_larger_than_two_megabytes(file):
    assert len(FILES.joinpath(*file.split("/")).read_bytes()) <= 2_000_000


def test_resnet20_has_twenty_weighted_layers_and_projections_of_1x1():
    net = zoo.model("glyph-resnet20")
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convs) == 19  # and the classifier
    assert sum(c.kernel_size == (1, 1) for c in convs) == 2


def test_mobilenetv2_has_depthwise_3x3_convolutions():
    convs = [m for m in zoo.model("glyph-mobilenetv2").modules() if isinstance(m, nn.Conv2d)]
    depthwise = [c for c in convs if c.groups == c.in_channels == c.out_channels and c.groups > 1]
    assert len(depthwise) == 11
    assert all(c.kernel_size == (3, 3) for c in depthwise)


def test_vit_has_attention_and_layer_norm_and_no_batch_norm():
    kinds = [type(m) for m in zoo.model("glyph-vit").modules()]
    assert nn.MultiheadAttention in kinds and nn.LayerNorm in kinds
    assert not any("BatchNorm" in kind.__name__ for kind in kinds)


def test_a_model_name_stands_for_its_data():
    for a, b in zip(zoo.data("glyph-vit", "test").tensors, zoo.data("glyph", "test").tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("ask", "accepted"),
    [
        (lambda: zoo.model("resnet20"), "glyph-resnet20"),
        (lambda: zoo.model("glyph"), "glyph-resnet20"),
        (lambda: zoo.data("mnist", "test"), "digits"),
        (lambda: zoo.data("digits", "train"), "calibration, test, validation"),
        (lambda: zoo.data("glyph-vit", "train"), "calibration, test, validation"),
    ],
)
def test_an_unknown_name_is_answered_with_the_accepted_ones(ask, accepted):
    with pytest.raises(UsageError, match=accepted):
        ask()


def test_shipped_digits_are_rebuilt_by_the_command():
    pytest.importorskip("sklearn")
    from benchmarks.zoo.data_build import build

    rebuilt = build("digits")
    for split in zoo.SPLITS:
        images, labels, ids = arrays("digits", split)
        assert (rebuilt[f"{split}_labels"] == labels).all() and (rebuilt[f"{split}_ids"] == ids).all()
        # another torch may round differently, and clamp to the other side of a step
        difference = abs(rebuilt[f"{split}_images"].astype(int) - images)
        assert difference.max() <= 1


def test_shipped_glyphs_are_rebuilt_by_the_command():
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    from benchmarks.zoo.data_build import build

    rebuilt = build("glyph")
    for split in zoo.SPLITS:
        images, labels, ids = arrays("glyph", split)
        assert (rebuilt[f"{split}_labels"] == labels).all() and (rebuilt[f"{split}_ids"] == ids).all()
        # another FreeType may render an edge differently
        assert abs(rebuilt[f"{split}_images"].astype(int) - images).mean() < 2
