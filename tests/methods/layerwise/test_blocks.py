"""Which blocks of a model are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from allot import UsageError
from allot.methods.layerwise.blocks import BlockSequence, find_blocks, size_of
from allot.run.calibration import Calibration
from methods.layerwise.nets import NETS, TRANSFORMERS, Case, Encoder


def blocks_of(case: Case) -> BlockSequence:
    inputs = Calibration.of(case.inputs())
    return find_blocks(case.model(), inputs.pick([0]), inputs.pick([0, 1]))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("encoder", [["layers.0"], ["layers.1"]]),
        ("stages", [["stage1.0"], ["stage1.1"], ["stage2.0"], ["stage2.1"]]),
        ("row", [["0", "1", "2"], ["3", "4", "5", "6"], ["7", "8"], ["9"]]),
    ],
)
def test_blocks_are_elements_of_containers_each_with_its_own_weights(name: str, blocks: list[list[str]]):
    assert [[module_call.name for module_call in block] for block in blocks_of(NETS[name]).blocks] == blocks


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("gpt-2", "transformer.h.0", 3),
        ("llama", "model.layers.0", 3),
        ("bert with padding", "bert.encoder.layer.0", 3),
        ("gemma 3, two kinds of masks", "model.layers.0", 7),
        ("vit", "vit.layers.0", 3),
    ],
)
def test_blocks_of_transformers_are_found(name: str, first: str, count: int):
    found = blocks_of(TRANSFORMERS[name])
    assert len(found.blocks) == count
    assert found.blocks[0][0].name.endswith((first, first.replace("vit.", "vit.encoder.").replace("layers", "layer")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "first", "count"),
    [
        ("torchvision", lambda v: v.models.resnet18(num_classes=5), "layer1.0", 8),
        ("timm", lambda t: t.create_model("test_vit", img_size=16, patch_size=8), "blocks.0", 6),
    ],
)
def test_blocks_of_vision_models_are_found(name: str, make: Callable[..., nn.Module], first: str, count: int):
    model = make(pytest.importorskip(name)).eval()
    side = 32 if name == "torchvision" else 16
    found = find_blocks(model, torch.randn(1, 3, side, side), torch.randn(2, 3, side, side))
    assert (found.blocks[0][0].name, len(found.blocks)) == (first, count)
    inside = [size_of(model.get_submodule(block[0].name)) for block in found.blocks]
    assert found.size == max(*inside, size_of(model) - sum(inside))


def test_arguments_beside_the_hidden_are_known_by_what_they_belong_to():
    found = blocks_of(NETS["encoder"])
    assert found.slots == (None, 0)  # one mask for all, a factor for every sample
    assert {module_call.slots for module_call in found.calls} == {(0, 1)}
    assert "into" in found.before and "head" not in found.before and "layers.0.mlp" not in found.before
    assert found.block_of("layers.10.mlp") is None and found.block_of("layers.1.mlp.0.weight") == 1


class Shared(nn.Module):
    """The same layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return x


class Between(nn.Module):
    """Something happens between the layers, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu_()
        return x


class Tied(Encoder):
    """Two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].mlp[0].weight = self.layers[0].mlp[0].weight


@pytest.mark.parametrize("make", [Shared, Between, lambda: nn.Linear(4, 4)])
def test_a_model_without_such_blocks_is_refused_in_words(make: Callable[[], nn.Module]):
    with pytest.raises(UsageError, match="no blocks that run one after another"):
        find_blocks(make().eval(), torch.randn(1, 4), torch.randn(2, 4))


def test_blocks_that_share_weights_are_none():
    with pytest.raises(UsageError, match="no blocks"):
        blocks_of(Case(Tied, NETS["encoder"].inputs))
