"""Training in rounds: what the watch set finds worse is taken back, and the next step is a third."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allot.errors import Stopped, UsageError
from allot.methods.distill import Distill
from allot.methods.training.distillation import Training
from allot.methods.training.rounds import Rounds
from allot.methods.training.schedule import Schedule
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.run.fidelity import Watch
from contract.cases import CASES, bits

CASE = CASES["attention"]
INPUTS = torch.randn(64, *CASE.inputs().shape[1:], generator=torch.Generator().manual_seed(3))


def trained(steps: int | str = 6, rate: float | str = 0.05, rounds: int = 1, **more: Any) -> Result:
    limits = {"first": 6, "max_steps": more.pop("most", None)} if steps == "auto" else {}
    training = Training(steps=steps, learning_rate=rate, rounds=rounds, **limits)
    repair = more.pop("repair", (Distill(training, more.pop("schedule", Schedule())),))
    return prune(CASE.make(), INPUTS, "sparsity=0.6", repair=repair, batch_size=16, **more)


def rounds_of(result: Result) -> list[dict[str, Any]]:
    return result.report()["diagnostics"]["rounds"]


def state_of(result: Result) -> dict[str, Any]:
    return {name: bits(value) for name, value in result.state_dict().items()}


def test_a_step_that_made_it_worse_is_taken_back_and_the_next_one_is_a_third():
    tried = rounds_of(trained(rate=3.0, rounds=2))
    first = next(i for i, one in enumerate(tried) if one["kept"])
    assert first > 0
    assert [one["rate"] for one in tried[: first + 1]] == pytest.approx([3.0 / 3**i for i in range(first + 1)])


def test_the_largest_step_is_not_the_best_and_smaller_ones_are_tried_from_the_same_net():
    tried = rounds_of(trained(rate=0.4, rounds=3))
    trials = [one for one in tried if one["steps"] == 6]
    assert [one["rate"] for one in trials] == pytest.approx([0.4 / 3**i for i in range(len(trials))])
    best = min((one for one in trials if one["kept"]), key=lambda one: one["kl"])
    later = tried[len(trials) :]
    assert later[0]["steps"] == 12 and later[0]["rate"] == pytest.approx(best["rate"])


def test_no_step_that_helps_leaves_the_net_as_it_was():
    result = trained(rate=1e30, rounds=2)
    tried = rounds_of(result)
    assert len(tried) == 4 and not any(one["kept"] for one in tried)
    assert state_of(result) == state_of(trained(repair="none"))


def test_a_round_that_helped_is_followed_by_one_of_twice_its_steps():
    kept = [one for one in rounds_of(trained(rate=0.02, rounds=3)) if one["kept"]]
    steps = [one["steps"] for one in kept]
    assert steps == sorted(steps) and {6, 12} <= set(steps) <= {6, 12, 24}
    errors = [one["kl"] for one in kept]
    assert errors == sorted(errors, reverse=True)


def test_auto_is_one_round_of_the_usual_step_where_that_helps():
    assert state_of(trained(rate="auto")) == state_of(trained(rate=0.05))
    assert [one["rate"] for one in rounds_of(trained(rate="auto"))] == [0.05]


def test_the_budget_is_wider_in_the_first_round_only():
    rounds = Rounds(Distill(Training(rounds=3, learning_rate="auto"), Schedule(ramp=8.0)))
    begun = {"length": 5, "rate": 0.01, "best": {}, "trials": False}
    first, later = (rounds._method(begun | {"best": best}) for best in ({}, {"density": {}}))
    assert (first.schedule.ramp, later.schedule.ramp) == (8.0, 1.0)
    assert first.training.steps == 5 and first.training.peak == 0.01


def training_of(result: Result) -> dict[str, Any]:
    (training,) = result.report()["diagnostics"]["training"]
    return training


def test_auto_continues_with_rounds_of_twice_the_steps_until_they_no_longer_pay():
    result = trained("auto", rate=0.05)
    tried = rounds_of(result)
    assert [one["kept"] for one in tried[-2:]] == [False, False] and len(tried) > 4
    assert training_of(result) == {
        "rounds": len(tried),
        "steps": sum(one["steps"] for one in tried),
        "ended": "two rounds in a row made the net no better",
    }
    kept = [one for one in tried if one["kept"]]
    assert max(one["steps"] for one in kept) > 6
    assert [one["kl"] for one in kept] == sorted((one["kl"] for one in kept), reverse=True)


@pytest.mark.parametrize("most", [4, 6, 31, 40])
def test_auto_takes_no_more_steps_than_are_allowed_and_uses_them_where_they_are_enough_for_a_round(most: int):
    result = trained("auto", rate=0.02, most=most)
    tried, training = rounds_of(result), training_of(result)
    assert training["steps"] == sum(one["steps"] for one in tried) <= most
    assert most - training["steps"] < 6 and training["ended"].startswith(f"of {most} steps allowed")
    assert tried[0]["steps"] == min(6, most)


def test_rounds_of_auto_begin_as_those_of_a_number():
    of_number, of_auto = (rounds_of(trained(steps, rate=0.4, rounds=3)) for steps in (6, "auto"))
    assert of_auto[: len(of_number)] == of_number


def test_why_training_ended_is_in_the_report():
    assert training_of(trained(rate="auto"))["ended"] == "all steps that were requested"
    assert training_of(trained("auto", rate=1e30))["ended"] == "no step size made the net better"


def test_each_round_is_measured_once_at_its_end(monkeypatch: pytest.MonkeyPatch):
    seen: list[bytes] = []
    measure = Watch.fidelity

    def counted(watch: Watch, tensors: Any) -> Any:
        seen.append(b"".join(bits(value) for value in tensors.values()))
        return measure(watch, tensors)

    monkeypatch.setattr(Watch, "fidelity", counted)
    result = trained(rate=0.4, rounds=2)
    ends = len(rounds_of(result))
    assert len(seen) - len(set(seen)) <= 2 < ends  # the net at the start, and the best one, as a stage and in rounds


@pytest.mark.parametrize("number", ["auto", 6])
@pytest.mark.parametrize("steps", [2, 6, 9, 14, 20])
def test_a_run_stopped_in_any_round_ends_as_an_uninterrupted_one(steps: int, number: int | str, tmp_path: Path):
    more: dict[str, Any] = {"rate": 0.4, "rounds": 2, "steps": number, **({"most": 50} if number == "auto" else {})}
    whole = trained(save_to=tmp_path / "whole", **more)
    told = iter([False] * steps)
    with pytest.raises(Stopped):
        trained(save_to=tmp_path / "run", should_stop=lambda: next(told, True), **more)
    resumed = trained(save_to=tmp_path / "run", **more)
    assert state_of(resumed) == state_of(whole)
    assert rounds_of(resumed) == rounds_of(whole) and training_of(resumed) == training_of(whole)
    assert resumed.report()["images"] == whole.report()["images"]


def test_values_out_of_range_are_refused():
    with pytest.raises(UsageError, match="learning_rate"):
        Training(learning_rate="automatic")
    with pytest.raises(UsageError, match="rounds"):
        Training(rounds=0)
    for wrong in ({"steps": "automatic"}, {"steps": 0}, {"first": 0}, {"max_steps": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Training(**wrong)


def test_only_repairs_continue_while_it_pays():
    with pytest.raises(UsageError, match=r"allocate: steps=auto: repairs that train continue"):
        prune(CASE.make(), INPUTS, "sparsity=0.6", method="fcpts", options={"fcpts": {"steps": "auto"}})
