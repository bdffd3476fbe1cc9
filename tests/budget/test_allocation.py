"""Allocations: immutable, JSON both ways, edited by hand."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from allot.budget.allocation import Allocation
from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import UsageError

SHARES = Allocation({"a": 0.5, "b": 0.25}, {"a": 10, "b": 8})


def written(tmp_path, content) -> str:
    path = tmp_path / "allocation.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_what_is_saved_is_loaded(tmp_path):
    SHARES.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == dict(SHARES)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**9), st.data())
def test_counts_survive_densities_and_json(total, data):
    kept = data.draw(st.integers(0, total))
    allocation = Allocation.of({"a": kept}, {"a": total})
    again = json.loads(json.dumps(allocation.to_json()))["layers"]["a"]
    assert allocation.kept == {"a": kept}
    assert again == {"density": kept / total, "kept": kept, "total": total}
    assert Allocation({"a": again["density"]}, {"a": total}).kept == {"a": kept}


@pytest.mark.parametrize(
    "content",
    [
        {"layers": {"a": {"density": 0.5, "kept": 1, "total": 2}, "b": {"density": 1}}},
        {"layers": {"a": 0.5, "b": 1}},
        {"a": 0.5, "b": 1.0},
        {"layers": {"a": {"density": 0.5, "note": "by hand"}, "b": {"density": 1.0}}, "budget": {"sparsity": "0.5"}},
    ],
)
def test_a_file_edited_by_hand_is_read(tmp_path, content):
    assert Allocation.load(written(tmp_path, content)) == {"a": 0.5, "b": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": {"a": {"density": 1.5}}}, "density of a is 1.5"),
        ({"layers": {"a": {"density": -0.1}}}, "density of a is -0.1"),
        ({"layers": {"a": {"density": "0.5"}}}, "density of a is '0.5'"),
        ({"layers": {"a": {"density": None}}}, "density of a is None"),
        ({"layers": {"a": {"density": True}}}, "density of a is True"),
        ('{"layers": {"a": {"density": NaN}}}', "density of a is nan"),
        ({"layers": {"a": {"density": 0.5}, "b": {"kept": 3}}}, 'b has no "density"'),
        ({"layers": {}}, "holds no allocation"),
        ({"layers": []}, "holds no allocation"),
        ([0.5], "holds no allocation"),
        ("0.5", "holds no allocation"),
        ("half of everything", "cannot read an allocation"),
        ("", "cannot read an allocation"),
    ],
)
def test_a_file_that_is_no_allocation_is_refused_by_name(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=message) as refused:
        Allocation.load(path)
    assert path in str(refused.value)


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        Allocation.load(tmp_path / "nothing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read"):
        Allocation.load(tmp_path / "binary")


def test_a_file_edited_by_hand_still_meets_the_budget(tmp_path):
    terms = (Term("a", 1000), Term("b", 1000))
    budget = Budget(sparsity=0.9).on(terms)
    wished = Allocation.load(written(tmp_path, {"a": 0.3, "b": 0.1}))
    assert budget.counts(wished) == {"a": 150, "b": 50}


def test_an_allocation_is_a_mapping_that_cannot_be_changed():
    assert dict(SHARES) == {"a": 0.5, "b": 0.25}
    assert SHARES.kept == {"a": 5, "b": 2}
    assert repr(SHARES) == "Allocation(2 layers, 7 of 18 kept)"
    with pytest.raises(TypeError):
        SHARES["a"] = 1.0


def test_changing_what_was_passed_in_changes_no_allocation():
    density, total = {"a": 0.5}, {"a": 10}
    allocation = Allocation(density, total)
    density["a"], total["a"] = 1.0, 1
    assert allocation["a"] == 0.5 and allocation.total == {"a": 10}


def test_density_and_total_name_the_same_layers():
    with pytest.raises(UsageError, match=r"different layers: \['b'\]"):
        Allocation({"a": 0.5}, {"a": 10, "b": 10})


def test_densities_of_numpy_are_numbers():
    assert Allocation({"a": np.float32(0.5)}, {"a": 10})["a"] == 0.5
