"""Wrong types are errors that name the argument, at every public function."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_type_hints

import numpy
import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import AllotError, UsageError
from allot.integrations.held_zeros import HeldZeros
from allot.network.arguments import check_type, fits, typed
from allot.pruning.advise import advise
from allot.pruning.sweep import Cell, budgets_of, cells_of
from allot.run.problem import Method
from allot.sources.load import load_data, load_model

NET, INPUTS = nn.Linear(6, 4), torch.zeros(4, 6)
LABELLED = [(row, 1) for row in INPUTS]
CELLS = cells_of(["erk"], ["sparsity=0.5"], 1)
# function -> arguments that it takes; every other public name is listed below
TAKEN: dict[Callable[..., Any], dict[str, Any]] = {
    allot.prune: {"model": NET, "calibration": None, "budget": "sparsity=0.5", "repair": "none"},
    allot.evaluate: {"model": NET, "data": LABELLED},
    allot.export: {"model": NET, "example": INPUTS, "path": "net.pt2"},
    allot.verify: {"path": "run"},
    allot.sweep: {"model": NET, "calibration": None, "cells": CELLS, "out": "sweep"},
    allot.search: {"model": NET, "calibration": None, "out": "search", "test": LABELLED, "max_drop": "1pt"},
    allot.load: {"path": "run"},
    allot.load_slim: {"model": NET, "path": "run"},
    allot.load_csr: {"model": NET, "path": "run"},
    allot.attach: {"model": NET, "masks": {}},
    allot.fold: {"model": NET},
    allot.Allocation: {"density": {}, "total": {}},
    allot.Allocation.load: {"path": "allocation.json"},
    allot.Budget: {"sparsity": 0.5},
    allot.Budget.of: {"given": 0.5},
    allot.Calibration.of: {"data": INPUTS},
    allot.Channels: {"step": 1},
    allot.Compute: {},
    allot.NM: {"n": 2, "m": 4},
    allot.Readable: {"source": LABELLED},
    allot.Rules: {},
    allot.Scope.of: {"model": NET},
    allot.zoo.model: {"name": "digits-resnet20"},
    allot.zoo.data: {"name": "digits", "split": "test"},
    advise: {"model": NET, "example": INPUTS},
    budgets_of: {"texts": ["0.5"]},
    cells_of: {"methods": ["erk"], "budgets": ["sparsity=0.5"], "seeds": 1},
    load_model: {"spec": "zoo:digits-resnet20"},
    load_data: {"spec": "zoo:digits"},
    HeldZeros: {"model": NET},
}
WITHOUT = {"Rows", "Unstructured", "sharing"}  # no arguments
MADE_BY_ALLOT = {"Layer", "Scope", "Result", "Calibration"}  # constructed inside
INTERNAL = {"terms", "fixed_bytes", "full_bytes", "full_latency", "factor"}  # of a budget tied to a model
TABLES = {"METHODS", "RECIPES", "SCORES", "zoo"}


class Thing:
    """Nothing that a function takes."""


WRONG = (Thing(), 3, 2.5, True, "zoo:digits", {"a": Thing()}, [Thing()], nn.Linear, b"x", float("nan"), 10**400)


def test_every_public_name_is_tried_here():
    public = {name for name in allot.__all__ if not isinstance(getattr(allot, name), type(AllotError))}
    public |= {name for name in allot.__all__ if isinstance(getattr(allot, name), type)}
    errors = {
        name for name in public if isinstance(found := getattr(allot, name), type) and issubclass(found, AllotError)
    }
    assert public - errors - {function.__qualname__ for function in TAKEN} == WITHOUT | MADE_BY_ALLOT | TABLES


@pytest.mark.parametrize("function", TAKEN, ids=lambda function: function.__qualname__)
def test_a_wrong_type_is_an_error_of_allot_that_names_what_was_given(
    function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    tried = 0
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD or name in INTERNAL:
            continue
        for wrong in WRONG:
            if fits(wrong, hints.get(name, Any)):
                continue
            tried += 1
            with pytest.raises(AllotError) as refused:
                function(**{**TAKEN[function], name: wrong})
            assert len(str(refused.value)) < 700 and "\n" not in str(refused.value)
    assert tried or function is allot.Readable  # which says what it accepts
    assert not list(tmp_path.iterdir())  # refused before anything is written


@pytest.mark.parametrize("given", ["zoo:digits-resnet20", "torchvision:resnet18", "hf:gpt2", "net.pt", Path("net.pt")])
@pytest.mark.parametrize("function", [function for function, taken in TAKEN.items() if "model" in taken])
def test_the_name_of_a_model_says_how_it_is_loaded(function: Callable[..., Any], given: str | Path):
    with pytest.raises(UsageError, match=r"model = load_model\(.*\)\.model$") as refused:
        function(**{**TAKEN[function], "model": given})
    assert str(given) in str(refused.value)
    if ":" not in str(given):
        assert "weights='net.pt'" in str(refused.value)


def test_the_line_that_loads_a_model_runs():
    with pytest.raises(UsageError) as refused:
        allot.prune("zoo:digits-resnet20", None, 0.9)  # type: ignore[arg-type]
    names: dict[str, Any] = {}
    exec(str(refused.value).partition("Load it first: ")[2], names)
    assert isinstance(names["model"], nn.Module)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model": nn.Linear},
            r"prune: model=the class Linear: an nn\.Module is accepted\. Make one of the class: Linear",
        ),
        ({"model": NET.state_dict()}, r"model=an OrderedDict: an nn\.Module .* model\.load_state_dict"),
        ({"seed": "1"}, r"prune: seed='1': a whole number is accepted\."),
        ({"samples": 1.5}, r"samples=1\.5: a whole number or None is accepted"),
        ({"rules": {"include": ["a"]}}, r"rules=\{'include': \['a'\]\}: a Rules or None is accepted"),
        ({"options": {"erk": 3}}, r"options\['erk'\]=3: a dict is accepted"),
        ({"batch_norm": 3}, r"batch_norm=3: 'auto' or 'batch' or 'frozen' is accepted"),
        ({"test": 3}, r"labelled data of type int: a tensor, Dataset, DataLoader or iterable is accepted"),
        ({"test": "zoo:digits"}, r"labelled data of type str: .* data = load_data\('zoo:digits'\)"),
        ({"calibration": 3}, r"calibration data of type int"),
        ({"calibration": "zoo:digits"}, r"calibration data of type str: .* data = load_data\('zoo:digits'\)"),
        ({"budget": 7}, r"sparsity=7 is out of range"),
        ({"budget": "bytes=1e400MB"}, r"bytes=1e400MB is out of range"),
        ({"max_memory": 10**400}, r"max_memory=1000"),
    ],
)
def test_the_error_names_the_argument_the_value_and_what_is_accepted(given: dict[str, Any], message: str):
    with pytest.raises(AllotError, match=message):
        allot.prune(**{**TAKEN[allot.prune], **given})


def test_an_unknown_argument_is_the_error_of_python():
    with pytest.raises(TypeError, match="spedd"):
        allot.evaluate(NET, LABELLED, spedd=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="model"):
        allot.fold()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("value", "annotation", "wanted"),
    [
        (numpy.int64(3), int, True), (numpy.float32(3), float, True), (3, float, True), (3.0, int, False),
        (True, int, False), (numpy.float64(1), bool, False), (None, int | None, True), (10**400, float, False),
        ("a", Sequence[str], False), (("a",), list[str], True), (["a", 1], Sequence[str], False),
        ({"a": 1.0}, Mapping[str, float], True), ({"a": "x"}, Mapping[str, float], False),
        ({1: 1.0}, Mapping[str, float], False), (len, Callable[..., Any], True), (3, Callable[..., Any], False),
        ("kl", Literal["kl", "mse"], True), (3, Literal["kl", "mse"], False), (Path("x"), str | os.PathLike[str], True),
        (allot.METHODS["erk"], str | Method, True), (3, str | Method, False), (nn.Linear, nn.Module, False),
        (NET, nn.Module, True), (object(), Any, True), (iter([1]), Iterable[Any], True),
        ({"a": 1}, Iterable[Any], False),
        (CELLS, Sequence[Cell], True), (["erk"], Sequence[Cell], False), ({"w": INPUTS}, Mapping[str, Tensor], True),
    ],
)  # fmt: skip
def test_a_value_fits_its_annotation(value: object, annotation: Any, wanted: bool):
    assert fits(value, annotation) is wanted


def test_a_function_keeps_its_name_its_signature_and_what_it_returns():
    def plus(a: int, b: int = 1) -> int:
        """The sum."""
        return a + b

    found = typed(plus)
    assert found(2) == 3 and found.__name__ == "plus" and inspect.signature(found) == inspect.signature(plus)


def test_a_value_that_cannot_be_written_is_named_by_its_type():
    class Loud:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(UsageError, match=r"x=a list: a whole number is accepted"):
        check_type("x", [Loud()], int)
    with pytest.raises(UsageError, match=r"x='a{59}…: a whole number is accepted"):
        check_type("x", "a" * 1000, int)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ({"a"}, Sequence[str]), ({"a": 1}.keys(), Sequence[str]), (numpy.array(["a"]), Sequence[str]),
        (iter(["a"]), Sequence[str]), (numpy.bool_(False), bool), ("cpu", torch.device), (PurePosixPath("a"), Path),
    ],
)  # fmt: skip
def test_what_is_as_good_as_the_type_is_accepted_and_left_whole(value: Any, annotation: Any):
    assert fits(value, annotation)
    assert not isinstance(value, Iterator) or list(value) == ["a"]
