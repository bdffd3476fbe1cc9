"""A limit of time cuts training by one factor, from what steps take; a run that goes on keeps the cut it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import allot
from allot.errors import Stopped, UsageError
from allot.methods import METHODS
from allot.pruning import time_limit as fit
from allot.pruning.assemble import assemble, options_of
from allot.pruning.setup import make_problem
from allot.pruning.time_limit import measure_cut, scale_steps
from contract.cases import CASES

CASE = CASES["with batch norm"]
SHORT: dict[str, Any] = {"batch_size": 8, "options": {"fcpts": {"steps": 60, "start": "uniform"}}}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock on which every reading is a second later: a step of any stage takes one second."""
    now = [0.0]

    def read() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(fit.time, "perf_counter", read)
    return now


def of(minutes: float | None, out: Path | None = None, **more: Any) -> Any:
    chain = {"method": "fcpts", "repair": "bn", **SHORT, **more}
    return allot.prune(CASE.make(), CASE.inputs(16), "sparsity=0.7", max_minutes=minutes, save_to=out, **chain)


def test_training_is_cut_to_what_fits_and_nothing_else_is():
    found = of(0.5).report()["diagnostics"]["fit"]
    [(stage, (asked, left))] = found["steps"].items()
    assert (stage, asked) == ("fcpts", 61)  # and one for the start
    others = 2  # passes of bn over 16 samples
    assert left + others <= fit.SHARE * 30 < 1.1 * (left + others)
    assert found["seconds"] == left + others


def test_what_fits_is_left_alone():
    free, limited = of(None), of(60)
    assert limited.report()["diagnostics"]["fit"]["steps"] == {}
    assert all(torch.equal(free.state_dict()[name], value) for name, value in limited.state_dict().items())


def test_what_no_cut_can_make_fit_is_refused():
    with pytest.raises(UsageError, match=r"max_minutes=0\.01: with as few steps as can be this chain takes about"):
        of(0.01)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="a number of minutes above 0"):
            of(wrong)


def test_a_run_that_goes_on_keeps_its_cut(tmp_path: Path, clock: list[float]):
    whole = of(0.5, tmp_path / "whole")
    calls = iter(range(10**6))
    with pytest.raises(Stopped):
        of(0.5, tmp_path / "part", should_stop=lambda: next(calls) > 12)
    began = json.loads((tmp_path / "part/run.json").read_text())["configuration"]["fit"]
    before = clock[0]
    again = of(0.5, tmp_path / "part")
    assert clock[0] == before  # nothing is timed again
    assert again.report()["diagnostics"]["fit"] == began
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in again.state_dict().items())
    with pytest.raises(UsageError, match="belongs to another configuration"):
        of(None, tmp_path / "part")
    assert of(0.5, tmp_path / "part").report()["seconds"] == again.report()["seconds"]


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if {"steps", "passes"} & options_of(m).keys()])
def test_every_method_that_trains_can_be_cut(name: str):
    trainings: list[int] = []

    def look(value: Any) -> None:
        steps = "first" if getattr(value, "steps", None) == "auto" else "steps"
        for count in (getattr(value, steps, None), getattr(value, "passes", None)):
            if isinstance(count, int):
                trainings.append(count)
        if hasattr(value, "__dataclass_fields__"):
            for part in vars(value).values():
                look(part)
        elif isinstance(value, tuple):
            for part in value:
                look(part)

    look(METHODS[name])
    before, trainings[:] = list(trainings), []
    look(scale_steps(METHODS[name], 0.25))
    assert before and trainings == [max(1, round(0.25 * steps)) for steps in before]
    assert scale_steps(METHODS[name], 1.0) is METHODS[name]


def test_the_model_and_the_draws_of_the_caller_are_left_alone():
    model, parts = CASE.make(), assemble("unipts", options={"unipts-search": {"starts": ["erk"]}})
    problem = make_problem(
        model, allot.Budget(sparsity=0.5), parts.pattern, calibration=allot.Calibration.of(CASE.inputs(16))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    measure_cut(problem, parts, 100)
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


AUTO: dict[str, Any] = {"method": "uniform", "repair": "distill", "options": {"distill": {"steps": "auto", "first": 4}}}


def many(**more: Any) -> Any:
    chain = {**AUTO, "batch_size": 8, **more}
    return allot.prune(CASE.make(), CASE.inputs(64), "sparsity=0.7", **chain)


def test_training_that_continues_uses_the_time_that_is_left():
    report = many(max_minutes=1).report()
    found, (training,) = report["diagnostics"]["fit"], report["diagnostics"]["training"]
    others = found["seconds"] - 4  # the first round
    assert found["steps"] == {} and found["max_steps"] == int(fit.SHARE * 60 - others)
    assert training["steps"] <= found["max_steps"]
    if "allowed" in training["ended"]:
        assert found["max_steps"] - training["steps"] < 4


def test_a_first_round_that_does_not_fit_is_cut_and_is_the_only_one():
    options = {"distill": {"steps": "auto", "first": 400}}
    report = many(max_minutes=0.5, options=options).report()
    found, (training,) = report["diagnostics"]["fit"], report["diagnostics"]["training"]
    [(_, (asked, left))] = found["steps"].items()
    assert asked == 400 and left <= found["max_steps"] <= fit.SHARE * 30
    assert training["steps"] <= found["max_steps"]


def test_steps_are_limited_by_number_too_and_only_where_training_continues():
    (training,) = many(max_steps=9).report()["diagnostics"]["training"]
    assert training["steps"] <= 9
    with pytest.raises(UsageError, match="max_steps=9: it limits training with steps=auto, and no repair"):
        many(max_steps=9, options={})
    with pytest.raises(UsageError, match="max_steps=0: a whole number"):
        many(max_steps=0)


def test_a_run_of_limited_minutes_that_continues_resumes_to_the_bit(tmp_path: Path):
    whole = many(max_minutes=1, save_to=tmp_path / "whole")
    calls = iter(range(10**6))
    with pytest.raises(Stopped):
        many(max_minutes=1, save_to=tmp_path / "part", should_stop=lambda: next(calls) > 14)
    again = many(max_minutes=1, save_to=tmp_path / "part")
    assert again.report()["diagnostics"] == whole.report()["diagnostics"]
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in again.state_dict().items())
