"""Arithmetic progressions of densities over the blocks, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods.depth import Depth
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


class Backwards(nn.Module):
    """Three blocks; the last one runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


def problem_with(example: Tensor | None, kept: int = 600) -> Problem:
    torch.manual_seed(0)
    return make_problem(Backwards(), Budget(params=kept), Unstructured(), example=example)


def kept_by(method: Depth, problem: Problem) -> list[int]:
    kept = drive(method, problem, Candidate.dense(problem)).allocation.kept
    return [kept[f"blocks.{b}.{name}.weight"] for b in range(3) for name in ("up", "down")]


def test_density_falls_by_equal_steps_in_order_of_execution():
    # mean density .5, slope .4: .7, .5, .3 of 200 weights each, the block that runs first is the last one
    assert kept_by(Depth(slope=0.4), problem_with(torch.randn(1, 10))) == [60, 60, 100, 100, 140, 140]
    assert kept_by(Depth(slope=-0.4), problem_with(torch.randn(1, 10))) == [140, 140, 100, 100, 60, 60]


def test_without_an_example_the_order_is_that_of_registration():
    assert kept_by(Depth(slope=0.4), problem_with(None)) == [140, 140, 100, 100, 60, 60]


def test_no_slope_is_uniform():
    assert kept_by(Depth(slope=0), problem_with(None)) == [100] * 6


def test_a_block_that_would_keep_more_than_all_is_cut_and_the_others_share_the_rest():
    # 1.5, 1, .5 of a mean of .8: the first is whole, the others have 2 : 1 of the remaining 560
    found = kept_by(Depth(slope=0.5), problem_with(None, kept=960))
    assert found[:2] == [200, 200] and sum(found) == 960
    assert found[2] == pytest.approx(187, abs=1) and found[4] == pytest.approx(93, abs=1)


def test_one_block_is_uniform():
    model = nn.Sequential(nn.Linear(4, 4))
    problem = make_problem(model, Budget(params=5), Unstructured(), example=torch.randn(1, 4))
    assert drive(Depth(), problem, Candidate.dense(problem)).allocation.kept == {"0.weight": 5}


def test_the_pass_that_finds_the_order_is_counted():
    for example, pushed in ((torch.randn(1, 10), 1), (None, 0)):
        problem = problem_with(example)
        state = Depth().init(problem, Candidate.dense(problem))
        assert Depth().step(problem, Candidate.dense(problem), state)["forward"] == pushed
    assert replace(Depth(), slope=0.1).slope == 0.1


def test_a_slope_beyond_one_is_refused():
    with pytest.raises(UsageError, match="slope"):
        Depth(slope=1.5)
