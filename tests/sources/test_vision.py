"""Well-known architectures at random weights: scope, MACs and an exact budget, with a reason for all that is left."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import allot

aten = torch.ops.aten
PRODUCTS_OF_WEIGHTS = (aten.mm, aten.addmm, aten.convolution, aten._convolution)  # bmm is attention's own

# name -> side of the picture; the counts of parameters are those that the papers give
TORCHVISION = {
    "resnet50": (64, 25_557_032),
    "mobilenet_v3_large": (64, 5_483_032),
    "densenet121": (64, 7_978_856),
    "vit_b_16": (224, 86_567_656),
    "swin_t": (64, 28_288_354),
    "convnext_tiny": (64, 28_589_128),
}
TIMM = {
    "efficientnet_b0": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "regnety_002": 64,
    "levit_128s": 224,
}
LARGER = {"swin_tiny_patch4_window7_224": 224, "mixer_s32_224": 224, "resnetv2_50x1_bit": 64, "coatnet_0_rw_224": 224}

REASONS = re.compile(
    r"bias|normalisation \(\w*Norm\w*\)|lookup table, not a matrix product|"
    r"\w+ of \w+: not the weight of a layer that allot knows"
)
OTHERS = re.compile(
    r".*(class_token|cls_token|pos_embed(ding)?|relative_position_bias_table|layer_scale|gamma|gain|attention_biases)"
)


@pytest.fixture(autouse=True)
def weights_at_random_but_the_same():
    torch.manual_seed(0)


def counted(model: torch.nn.Module, example: torch.Tensor) -> int:
    """MACs of the products with weights, as torch counts them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in PRODUCTS_OF_WEIGHTS) // 2


def check(model: torch.nn.Module, side: int) -> dict:
    """The report of a 90 % prune of the model, with everything checked that holds for any."""
    model.eval()
    example = torch.randn(1, 3, side, side)
    result = allot.prune(model, None, "sparsity=0.9", method="uniform", repair="none", example=example)
    report = result.report()
    parameters = dict(model.named_parameters())
    names = [layer["name"] for layer in report["layers"]]
    assert set(names) | set(report["skipped"]) == set(parameters)
    assert not set(names) & set(report["skipped"])
    assert report["total"] == sum(parameters[name].numel() for name in names)
    assert report["kept"] == round(report["total"] / 10) == sum(int(mask.sum()) for mask in result.masks.values())
    assert report["macs"]["dense"] == counted(model, example)
    assert all(layer["macs"] for layer in report["layers"])
    for name, reason in report["skipped"].items():
        assert REASONS.fullmatch(reason), (name, reason)
        assert not reason.startswith("parameter of") or OTHERS.fullmatch(name), (name, reason)
        assert parameters[name].dim() < 2 or OTHERS.fullmatch(name), (name, reason)
    return report


def test_a_transformer_of_torchvision_is_pruned_exactly():
    """The layers of `vit_b_16`, which is slow: fewer, and narrower."""
    models = pytest.importorskip("torchvision.models")
    size = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    check(models.VisionTransformer(**size), 32)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "vit_b_16" else ()) for name in TORCHVISION]
)
def test_torchvision_models_are_pruned_exactly(name):
    models = pytest.importorskip("torchvision.models")
    side, parameters = TORCHVISION[name]
    model = models.get_model(name, weights=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    report = check(model, side)
    assert report["total"] > 0.98 * parameters


@pytest.mark.parametrize("name", [*TIMM, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def test_timm_models_are_pruned_exactly(name):
    timm = pytest.importorskip("timm")
    check(timm.create_model(name, pretrained=False), (TIMM | LARGER)[name])


@pytest.mark.parametrize("budget", ["macs=30%", "params=10%", "bytes=20%"])
@pytest.mark.parametrize("method", ["uniform", "erk"])
def test_other_budgets_of_a_depthwise_net_are_met(method, budget):
    models = pytest.importorskip("torchvision.models")
    model = models.get_model("mobilenet_v3_small", weights=None).eval()
    example = torch.zeros(1, 3, 64, 64)
    report = allot.prune(model, None, budget, method=method, repair="none", example=example).report()
    row = report["budget"][0]
    assert row["achieved"] <= row["limit"]
    if row["kind"] == "params":
        assert row["achieved"] == row["limit"]
    elif row["kind"] == "macs":
        dearest = max(layer["macs"] / layer["total"] for layer in report["layers"] if layer["density"] < 1)
        assert row["limit"] - row["achieved"] < dearest
    else:
        assert row["limit"] - row["achieved"] <= row["limit"] / 1000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["erk", "lamp", "global", "global-normalised"])
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_large", "densenet121", "swin_t", "convnext_tiny"])
def test_every_recipe_with_its_repairs_finishes_on_torchvision_models(name, method):
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None).eval()
    pictures = torch.randn(8, 3, 64, 64)
    report = allot.prune(model, pictures, "sparsity=0.9", method=method, batch_size=4).report()
    assert report["kept"] == round(report["total"] / 10)
