"""Shapes that annotations promise are checked in tests: of arguments and of the result, each call by itself."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from allot.methods import fcpts
from shapes import in_one_scope


@in_one_scope
def product(x: Float[Tensor, "N K"], y: Float[Tensor, "K M"], *, turned: bool = False) -> Float[Tensor, "N M"]:
    return (x @ y).T if turned else x @ y


def test_a_letter_means_one_number_within_a_call_and_another_in_the_next():
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert product(torch.ones(5, 1), torch.ones(1, 1)).shape == (5, 1)
    with pytest.raises(Exception, match="x="):
        product(torch.ones(3), torch.ones(3, 4))
    with pytest.raises(Exception, match="y="):
        product(torch.ones(2, 3), torch.ones(4, 3))


def test_a_result_of_another_shape_is_found():
    assert product(torch.ones(2, 3), torch.ones(3, 2), turned=True).shape == (2, 2)
    with pytest.raises(Exception, match="return"):
        product(torch.ones(2, 3), torch.ones(3, 4), turned=True)


def test_the_functions_of_allot_are_checked():
    with pytest.raises(Exception, match="t="):
        fcpts.bridge(torch.ones(3), torch.ones(4))
