"""Inputs reach the model as they are; they are cast only where the model does not run on them, and that is said."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import UsageError
from allot.network.call import dtype_for


class Sees(nn.Module):
    """Notes the dtype of its inputs, and computes in its own."""

    def __init__(self, *, casts: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.casts, self.layer = casts, nn.Linear(4, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.add(x.dtype)
        return self.layer(x.to(self.layer.weight.dtype) if self.casts else x)


SEEN: set[torch.dtype] = set()
DOUBLE = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def prune(model: nn.Module, data) -> allot.Result:
    return allot.prune(model.eval(), data, "sparsity=0.5", score="wanda", repair="bias")


def test_a_model_that_takes_them_gets_them_as_they_are(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "allot"):
        prune(Sees(casts=True), DOUBLE)
    assert {torch.float64} == SEEN and "cast" not in caplog.text


def test_a_model_that_does_not_take_them_gets_them_cast_and_it_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "allot"):
        result = prune(Sees(casts=False), DOUBLE)
    assert result.problem.calibration.dtype == torch.float32
    assert caplog.text.count("inputs are cast from float64 to float32") == 1


@pytest.mark.parametrize(("casts", "seen"), [(True, {torch.float64}), (False, {torch.float64, torch.float32})])
def test_scores_are_taken_on_inputs_as_they_are(casts, seen):
    allot.evaluate(Sees(casts=casts).eval(), [(x, 0) for x in DOUBLE])
    assert seen == SEEN


def test_a_model_in_half_precision_still_takes_single_precision_data():
    assert prune(Sees(casts=False, dtype=torch.bfloat16), DOUBLE.float()).report()["kept"] == 4


class Mixed(nn.Module):
    """A table in half precision comes first; the layers compute in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float16))
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


def test_the_first_parameter_does_not_decide_where_the_model_runs():
    model, x = Mixed().eval(), DOUBLE.float()
    assert dtype_for(model, x) is None
    assert prune(model, x).problem.calibration.dtype is None


def test_whole_numbers_are_never_cast():
    assert dtype_for(nn.Embedding(5, 2), torch.tensor([1, 2])) is None


def test_where_nothing_helps_the_error_is_that_of_the_inputs_as_they_are():
    with pytest.raises(UsageError, match="does not run on inputs of shape"):
        prune(Sees(casts=False), torch.randn(40, 5, dtype=torch.float64))
