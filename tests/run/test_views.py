"""Views of pictures: crops of the same size, a function of (seed, sample, number)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import allot
from allot.errors import UsageError
from allot.methods.distill import Distill
from allot.methods.training.distillation import Training
from allot.run.calibration import Calibration
from allot.run.views import are_pictures, crop, with_crops, with_mixtures

PICTURES = torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def test_each_picture_is_followed_by_its_views():
    calibration = Calibration.of(TensorDataset(PICTURES, torch.arange(5)), samples=3, seed=2)
    viewed = with_crops(calibration, 2)
    assert len(viewed) == 9
    batch = viewed.pick(range(9))
    assert batch.shape == (9, 3, 20, 24)
    assert torch.equal(batch[::3], calibration.pick(range(3)))
    views = [batch[i] for i in range(9) if i % 3]
    assert all(not torch.equal(one, other) for i, one in enumerate(views) for other in views[:i])
    assert torch.equal(batch, with_crops(calibration, 2).pick(range(9)))
    assert not torch.equal(batch, with_crops(Calibration.of(PICTURES, samples=3, seed=3), 2).pick(range(9)))


def test_a_view_shows_a_part_of_the_picture_and_nothing_else():
    ramp = torch.linspace(0, 1, 24).expand(1, 20, 24)
    turned = 0
    for seed in range(40):
        seen = crop(ramp, seed)
        steps = seen[0].diff(dim=1)
        assert seen.shape == ramp.shape and seen.min() >= 0 and seen.max() <= 1
        assert bool((steps >= -1e-6).all()) or bool((steps <= 1e-6).all())
        assert 0.2 <= float(seen.max() - seen.min()) <= 1
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


def test_views_of_a_run_enter_every_repair_that_reads_inputs(tmp_path: Path):
    def run(views: int | None, **more: Any) -> allot.Result:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 18 * 22, 5)).eval()
        return allot.prune(net, PICTURES, "sparsity=0.5", views=views, batch_norm="batch", **more)

    plain, viewed = (run(views, repair="bn,bias") for views in (None, 2))
    assert viewed.log.forward == 3 * plain.log.forward
    torch.manual_seed(0)
    run(2, repair="bn", save_to=tmp_path / "run")
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="views"):
        run(1, repair="bn", save_to=tmp_path / "run")
    with pytest.raises(UsageError, match="views=-1"):
        run(-1)


def test_a_mixture_is_half_of_an_input_or_more_and_the_rest_is_another_of_the_inputs_used():
    source = torch.eye(6)[:, None].expand(6, 3, 6).contiguous()
    calibration = Calibration.of(source, samples=4, seed=5)
    mixed = with_mixtures(calibration, 3)
    assert len(mixed) == 16
    rows = mixed.pick(range(16)).mean(1)
    for place, row in enumerate(rows):
        index = calibration.indices[place // 4]
        assert float(row.sum()) == pytest.approx(1) and float(row[index]) >= 0.5
        assert set(row.nonzero().flatten().tolist()) <= set(calibration.indices)
        assert place % 4 or float(row[index]) == 1
    assert len({tuple(row.tolist()) for row in rows}) > 8
    assert torch.equal(rows, with_mixtures(calibration, 3).pick(range(16)).mean(1))


def test_inputs_of_other_shapes_are_not_mixed():
    sizes = [torch.rand(3), torch.rand(5)]
    mixed = with_mixtures(Calibration(sizes, (0, 1)), 9).source
    for place in range(20):  # the partner is the input itself, or has the other shape
        torch.testing.assert_close(mixed[place][0], sizes[place // 10])


def test_training_on_mixtures_reads_no_watched_input_and_leaves_tokens_as_they_are():
    class Noted(torch.utils.data.Dataset):
        def __init__(self, samples: Tensor) -> None:
            self.samples, self.read = samples, set()

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, i: int) -> Tensor:
            self.read.add(i)
            return self.samples[i]

    fit = Distill(Training(steps=4), mixtures=3)
    data = Noted(torch.rand(40, 4))
    made = allot.prune(nn.Linear(4, 4), data, "sparsity=0.5", allocate="uniform", repair="none")
    inputs, watched = made.problem.inputs(), set(made.problem.watch.inputs.indices)
    data.read.clear()
    mixed = with_mixtures(inputs, 3)
    for k in range(mixed.batches):
        mixed.batch(k)
    assert data.read == set(inputs.indices) and not data.read & watched
    tokens = torch.zeros(40, 3, dtype=torch.int64)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    plain, asked = (
        allot.prune(net, tokens, "sparsity=0.5", repair=(replace(fit, mixtures=n),)).state_dict() for n in (0, 3)
    )
    assert all(torch.equal(value, plain[name]) for name, value in asked.items())


def test_a_rung_of_crops_is_left_out_aloud_where_inputs_are_no_pictures(caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with caplog.at_level("INFO", "allot"):
        result = allot.prune(model, torch.randn(24, 6), "sparsity=0.5", method="best", max_steps=2)
    assert "admm-views left out: inputs are no pictures" in caplog.text
    assert "admm-views" not in result.report()["repair"]
