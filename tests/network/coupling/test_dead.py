"""Channels that masks on single weights left without use go, and the answers stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.coupling.dead import without_dead_channels
from allot.pruning.prune import prune
from contract.cases import CASES


def net(activation: nn.Module, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8, bias=bias), activation, nn.Linear(8, 7, bias=bias), activation, nn.Linear(7, 3)
    ).eval()


def cut(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    slim, plan = without_dead_channels(model, x)
    with torch.no_grad():
        assert torch.allclose(slim(x), model(x), atol=1e-6)
    return slim, dict(plan.kept)


def zero(tensor: Tensor, *, rows: list[int] | slice = slice(None), columns: list[int] | None = None) -> None:
    with torch.no_grad():
        if columns is None:
            tensor[rows] = 0
        else:
            tensor[:, columns] = 0


def test_a_channel_that_nobody_reads_goes():
    model = net(nn.Sigmoid())
    zero(model[2].weight, columns=[1, 4])
    assert cut(model)[1] == {"0": (0, 2, 3, 5, 6, 7), "2": tuple(range(7))}


def test_a_channel_that_is_zero_goes_where_zero_stays_zero():
    model = net(nn.ReLU())
    zero(model[0].weight, rows=[3])
    zero(model[0].bias, rows=[3])
    assert cut(model)[1]["0"] == (0, 1, 2, 4, 5, 6, 7)


def test_a_channel_that_is_zero_stays_where_the_activation_makes_something_of_it():
    model = net(nn.Sigmoid())
    zero(model[0].weight, rows=[3])
    zero(model[0].bias, rows=[3])
    zero(model[2].weight, columns=[5])
    assert cut(model)[1]["0"] == (0, 1, 2, 3, 4, 6, 7)


def test_a_channel_that_a_bias_writes_stays():
    model = net(nn.ReLU())
    zero(model[0].weight, rows=[3])
    assert cut(model)[1]["0"] == tuple(range(8))


def test_what_goes_takes_along_what_only_it_has_read():
    model = net(nn.ReLU())
    zero(model[4].weight, columns=[2])  # channel 2 of the second layer has no reader
    with torch.no_grad():
        column = model[2].weight[2, 6].clone()
        model[2].weight[:, 6] = 0
        model[2].weight[2, 6] = column  # and is the only reader of channel 6 of the first
    assert cut(model)[1] == {"0": (0, 1, 2, 3, 4, 5, 7), "2": (0, 1, 3, 4, 5, 6)}


def test_a_group_without_any_use_keeps_one_channel():
    model = net(nn.ReLU())
    zero(model[4].weight)
    slim, kept = cut(model)
    assert kept["2"] == (0,) and slim[4].in_features == 1


def test_a_sparse_result_gets_slim_with_the_same_answers():
    case = CASES["without batch norm"]
    result = prune(case.make(), case.inputs(), "sparsity=0.93", allocate="global", repair="none", batch_size=8)
    slim, masked = result.slim(), result.model()
    with torch.no_grad():
        assert torch.allclose(slim(case.inputs()), masked(case.inputs()), atol=1e-6)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in masked.parameters())


def test_a_result_without_inputs_cannot_be_followed():
    case = CASES["linear chain"]
    result = prune(case.make(), None, "sparsity=0.5", allocate="uniform", repair="none")
    with pytest.raises(UsageError, match="calibration data"):
        result.slim()
