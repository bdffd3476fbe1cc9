"""Blocks of layers by name, and the order in which layers run."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.methods.layerwise import execution
from allot.methods.layerwise.execution import block_names, ran_in_order
from allot.network.layers import Scope
from allot.pruning.setup import make_problem
from allot.run.patterns import Unstructured


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.stages = nn.Sequential(nn.Sequential(Residual(), Residual()), nn.Sequential(Residual()))
        self.aside = nn.Linear(4, 4)
        self.stem = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


@pytest.fixture
def problem():
    net = Net()
    whole = Scope.of(
        net
    )  # a layer that never runs leaves the scope of a problem; one that other samples reach does not
    return replace(make_problem(net, Budget(params=20), Unstructured(), example=torch.randn(1, 4)), scope=whole)


def test_a_block_is_the_outermost_module_that_a_container_holds_and_no_container(problem):
    found = block_names(problem)
    assert found["stages.0.1.branch.0.weight"] == found["stages.0.1.branch.2.weight"] == "stages.0.1"
    assert found["stages.1.0.branch.0.weight"] == "stages.1.0"
    assert found["head.weight"] == "head.weight"
    assert len(set(found.values())) == 6


def test_layers_come_in_the_order_in_which_they_run_and_unused_ones_after_their_neighbour(problem):
    blocks = [f"stages.{i}.{j}.branch.{k}.weight" for i, j in ((0, 0), (0, 1), (1, 0)) for k in (0, 2)]
    assert ran_in_order(problem) == ["stem.weight", *blocks, "aside.weight", "head.weight"]


def test_examples_in_docstrings_run():
    assert doctest.testmod(execution).failed == 0
