"""Scores against their papers' definitions, one weight at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from allot.network.input_squares import Squares, input_norms, watched_squares
from allot.network.layers import Layer, Scope
from allot.run.patterns import select
from allot.run.scores import SCORES, lamp, lamp_score, magnitude, random, wanda


@dataclass
class Seen:
    """Evidence gathered by one pass over the inputs."""

    seed: int = 0
    squares: Squares = field(default_factory=dict)

    def input_norm(self, layer: Layer) -> Tensor:
        return input_norms(layer, self.squares[layer.name]).float()


def seen(model: nn.Module, x: Tensor) -> tuple[Layer, Seen]:
    (layer,) = scope = Scope.of(model)
    evidence = Seen()
    with watched_squares(model, scope, evidence.squares):
        model(x)
    return layer, evidence


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LAYER = Scope.of(nn.Linear(4, 3, bias=False))["weight"]


def naive_lamp(weight: list[float]) -> list[float]:
    """Lee et al., equation 2: weights in ascending order of |w|, each square over the squares from there on."""
    order = sorted(range(len(weight)), key=lambda i: (weight[i] ** 2, -i))  # of equal ones the later index goes first
    scores = [0.0] * len(weight)
    for u, i in enumerate(order):
        rest = 0.0
        for j in order[u:]:
            rest += weight[j] ** 2
        scores[i] = weight[i] ** 2 / rest if rest else 0.0
    return scores


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.floats(-10, 10, width=32), min_size=1, max_size=12))
def test_lamp_is_the_papers_loop(weight):
    weight = [w if abs(w) > 1e-9 else 0.0 for w in weight]
    expected = torch.tensor(naive_lamp(weight), dtype=torch.float64)
    assert torch.allclose(lamp_score(torch.tensor(weight, dtype=torch.float64)), expected, rtol=1e-12)


def test_lamp_of_the_largest_weight_is_one():
    score = lamp_score(rand(6, 7))
    assert float(score.max()) == 1.0 and score.shape == (6, 7) and score.dtype == torch.float64


def test_lamp_of_zeros_is_zero():
    assert not lamp_score(torch.zeros(3, 3)).any()


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_lamp_orders_a_layer_like_magnitude(kept):
    weight = rand(3, 4)
    evidence = Seen()
    assert torch.equal(select(lamp(LAYER, weight, evidence), kept), select(magnitude(LAYER, weight, evidence), kept))


def test_wanda_of_a_linear_is_weight_times_column_norm():
    model, x = nn.Linear(4, 3), rand(7, 4)
    layer, evidence = seen(model, x)
    score = wanda(layer, model.weight, evidence)
    for o in range(3):
        for i in range(4):
            expected = abs(float(model.weight.detach()[o, i])) * float(x[:, i].norm())
            assert float(score[o, i]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_wanda_of_a_convolution_is_weight_times_norm_of_its_patch_entries(groups):
    model, x = nn.Conv2d(4, 6, (3, 2), groups=groups, stride=2, padding=1, dilation=(1, 2)), rand(2, 4, 7, 8)
    layer, evidence = seen(model, x)
    patches = F.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2)  # [2, 4 * 6, positions]
    norms = patches.square().sum((0, 2)).sqrt().view(groups, 4 // groups, 3, 2)
    expected = model.weight.abs() * norms.repeat_interleave(6 // groups, 0)
    assert torch.allclose(wanda(layer, model.weight, evidence), expected, rtol=1e-4)


def test_random_is_a_function_of_seed_and_layer():
    weight = torch.zeros(3, 4)
    other = Scope.of(nn.Sequential(nn.Linear(4, 3, bias=False)))["0.weight"]
    first = random(LAYER, weight, Seen(seed=1))
    assert torch.equal(first, random(LAYER, weight + 1, Seen(seed=1)))
    assert not torch.equal(first, random(LAYER, weight, Seen(seed=2)))
    assert not torch.equal(first, random(other, weight, Seen(seed=1)))
    assert float(first.min()) >= 0 and float(first.max()) < 1


@pytest.mark.parametrize("seed", [-1, 2**62, 2**80])
def test_any_whole_number_is_a_seed(seed):
    assert random(LAYER, torch.zeros(3, 4), Seen(seed=seed)).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_has_the_weights_shape_and_single_precision_at_least(name, dtype):
    model = nn.Linear(4, 3, bias=False).to(dtype)
    layer, evidence = seen(model, rand(5, 4).to(dtype))
    before = model.weight.detach().clone()
    score = SCORES[name](layer, model.weight, evidence)
    assert score.shape == (3, 4) and score.dtype in (torch.float32, torch.float64)
    assert not score.requires_grad and bool(torch.isfinite(score).all()) and bool((score >= 0).all())
    assert torch.equal(model.weight, before)
    assert torch.equal(score, SCORES[name](layer, model.weight, evidence))
