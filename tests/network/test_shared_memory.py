"""Parameters in the same memory that are not one parameter are refused, with names and the line that ties them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import allot
from allot.errors import UsageError
from allot.network.shared_memory import check_shared_memory


def pair(first: nn.Module, second: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"first": first, "second": second})


def tied_by_data() -> nn.Module:
    model = pair(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model["second"].weight.data = model["first"].weight.data
    return model


def transposed_view() -> nn.Module:
    model = pair(nn.Linear(4, 6), nn.Linear(6, 4))
    model["second"].weight = nn.Parameter(model["first"].weight.data.t())
    return model


def slice_of_rows() -> nn.Module:
    model = pair(nn.Linear(4, 6), nn.Linear(4, 3))
    model["second"].weight.data = model["first"].weight.data[2:5]
    return model


def slices_that_overlap_in_a_column() -> nn.Module:
    model, whole = pair(nn.Linear(4, 6), nn.Linear(4, 6)), torch.randn(6, 7)
    model["first"].weight.data, model["second"].weight.data = whole[:, :4], whole[:, 3:]
    return model


def other_dtype() -> nn.Module:
    model = pair(nn.Linear(4, 6), nn.Linear(4, 12))
    model["second"].weight = nn.Parameter(model["first"].weight.data.view(torch.bfloat16).view(12, 4))
    return model


SHARED = [tied_by_data, transposed_view, slice_of_rows, slices_that_overlap_in_a_column, other_dtype]


@pytest.mark.parametrize("make", SHARED)
def test_parameters_that_share_an_entry_are_refused_by_both_names(make):
    with pytest.raises(UsageError, match=r"first\.weight and second\.weight are two parameters"):
        check_shared_memory(make())


@pytest.mark.parametrize("make", SHARED)
def test_the_line_in_the_message_settles_it(make):
    model = make()
    with pytest.raises(UsageError) as raised:
        check_shared_memory(model)
    line = str(raised.value).rstrip(".").rpartition(", model.")[2]
    exec(f"model.{line}", {"model": model, "nn": nn, "torch": torch})
    check_shared_memory(model)


def test_a_sequence_is_spelled_with_its_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(UsageError, match=r"model\[1\]\.weight = model\[0\]\.weight\.$"):
        check_shared_memory(model)


def test_prune_refuses_them_before_anything_runs():
    with pytest.raises(UsageError, match="tie them as one parameter"):
        allot.prune(tied_by_data(), None, "sparsity=0.5", repair="none")


def test_a_buffer_that_is_a_view_of_a_parameter_is_refused():
    model = nn.Linear(4, 6)
    model.register_buffer("first_rows", model.weight.data[:2])
    with pytest.raises(UsageError, match="the buffer first_rows shares memory with the parameter weight"):
        check_shared_memory(model)


def test_an_expanded_parameter_is_refused():
    model = nn.Linear(4, 6)
    model.weight = nn.Parameter(torch.randn(1, 4).expand(6, 4))
    with pytest.raises(UsageError, match="entries of weight share memory"):
        check_shared_memory(model)


def tied_as_one() -> nn.Module:
    model = pair(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model["second"].weight = model["first"].weight
    return model


def flat_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    return model


def columns_side_by_side() -> nn.Module:
    model, whole = pair(nn.Linear(4, 6), nn.Linear(4, 6)), torch.randn(6, 8)
    model["first"].weight.data, model["second"].weight.data = whole[:, :4], whole[:, 4:]
    return model


def without_values() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def channels_last() -> nn.Module:
    return nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [tied_as_one, flat_buffer, columns_side_by_side, without_values, channels_last])
def test_tensors_that_share_no_entry_or_are_one_are_accepted(make):
    check_shared_memory(make())
