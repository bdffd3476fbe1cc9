"""Fractals in place of data."""

from __future__ import annotations

import pytest
import torch

import allot
from allot.errors import UsageError
from allot.sources.load import ModelSource, load_data
from allot.sources.synthetic import Fractals
from contract.cases import PICTURE, convolutions


def test_an_image_is_a_function_of_seed_and_place_and_is_normalised():
    images = Fractals((3, 16, 12), seed=1)
    assert len(images) == 512
    (image,) = images[5]
    assert image.shape == (3, 16, 12) and image.dtype == torch.float32 and torch.equal(image, images[5][0])
    assert torch.allclose(image.mean((1, 2)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(image.std((1, 2), correction=0), torch.ones(3), atol=1e-4)
    assert not torch.equal(image, images[6][0]) and not torch.equal(image, Fractals((3, 16, 12), seed=2)[5][0])
    with pytest.raises(IndexError):
        images[512]


def test_neighbouring_pixels_are_alike_as_in_pictures():
    image = torch.stack([Fractals((1, 32, 32))[i][0] for i in range(8)])
    assert float((image[..., 1:] * image[..., :-1]).mean()) > 0.4


@pytest.mark.parametrize(("spec", "shape"), [("synthetic", PICTURE), ("synthetic:1,8,8", (1, 8, 8))])
def test_data_is_made_in_the_shape_of_the_model_or_as_said(spec: str, shape: tuple[int, ...]):
    data = load_data(spec, ModelSource(convolutions(), torch.zeros(1, *PICTURE)))
    assert data[0][0].shape == shape


@pytest.mark.parametrize("spec", ["synthetic", "synthetic:3,x,3", "synthetic:3,8", "synthetic:0,8,8"])
def test_a_shape_that_is_none_is_refused(spec: str):
    with pytest.raises(UsageError, match="CHANNELS,HEIGHT,WIDTH"):
        load_data(spec)


def test_a_model_is_pruned_without_data():
    result = allot.prune(
        convolutions(), Fractals(PICTURE, 24), "sparsity=0.7", method="pot", options={"layerwise": {"steps": 3}}
    )
    assert result.report()["kept"] == round(0.3 * result.problem.budget.total)
