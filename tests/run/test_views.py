"""Views of pictures: crops of the same size, a function of (seed, sample, number)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import allot
from allot.run.calibration import Calibration
from allot.run.views import are_pictures, view, with_views

PICTURES = torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def test_each_picture_is_followed_by_its_views():
    calibration = Calibration.of(TensorDataset(PICTURES, torch.arange(5)), samples=3, seed=2)
    viewed = with_views(calibration, 2)
    assert len(viewed) == 9
    batch = viewed.pick(range(9))
    assert batch.shape == (9, 3, 20, 24)
    assert torch.equal(batch[::3], calibration.pick(range(3)))
    views = [batch[i] for i in range(9) if i % 3]
    assert all(not torch.equal(one, other) for i, one in enumerate(views) for other in views[:i])
    assert torch.equal(batch, with_views(calibration, 2).pick(range(9)))
    assert not torch.equal(batch, with_views(Calibration.of(PICTURES, samples=3, seed=3), 2).pick(range(9)))


def test_a_view_shows_a_part_of_the_picture_and_nothing_else():
    ramp = torch.linspace(0, 1, 24).expand(1, 20, 24)
    turned = 0
    for seed in range(40):
        seen = view(ramp, seed)
        steps = seen[0].diff(dim=1)
        assert seen.shape == ramp.shape and seen.min() >= 0 and seen.max() <= 1
        assert bool((steps >= -1e-6).all()) or bool((steps <= 1e-6).all())
        assert 0.5 <= float(seen.max() - seen.min()) <= 1
        turned += bool((steps <= 1e-6).all())
    assert 10 <= turned <= 30


@pytest.mark.parametrize("inputs", [torch.zeros(1, 3, 100), torch.zeros(1, 64, 32, 32), torch.zeros(1, 3, 8, 8), {}])
def test_other_inputs_are_no_pictures(inputs: object):
    assert not are_pictures(inputs)


def test_views_enter_the_statistics_and_never_the_watch_set():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    pictures = torch.rand(40, 3, 20, 24)
    plain, viewed = (
        allot.prune(net, pictures, "sparsity=0.5", repair="admm", options={"admm": {"views": views}})
        for views in (0, 2)
    )
    assert viewed.log.forward > 2.5 * plain.log.forward
    assert plain.report()["watch"]["samples"] == viewed.report()["watch"]["samples"] == 16
    assert not torch.equal(plain.state_dict()["0.weight"], viewed.state_dict()["0.weight"])


def test_views_of_other_inputs_are_none_and_said(caplog: pytest.LogCaptureFixture):
    asked = {"repair": "admm", "options": {"admm": {"views": 2}}}
    allot.prune(nn.Linear(4, 4), torch.rand(40, 4), "sparsity=0.5", **asked)
    assert "views=2: inputs are no pictures" in caplog.text
