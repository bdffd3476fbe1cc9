"""What runs of a sweep hand on: by all that it depends on, and nothing that was drawn for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from allot import Budget, Calibration, Rules
from allot.pruning.setup import pose
from allot.run.patterns import Unstructured
from allot.run.problem import Problem
from allot.run.sweep_memory import Known
from contract.cases import CASES

CASE = CASES["with batch norm"]


def problem(known: Known | None = None, *, floor: int = 1, **calibration: int) -> Problem:
    inputs = Calibration.of(CASE.inputs(16), **{"samples": 16, "batch_size": 4, **calibration})
    posed = pose(CASE.make(), Budget(sparsity=0.5), Unstructured(), calibration=inputs, rules=Rules(floor=floor))
    return replace(posed, known=known)


def test_a_value_is_made_once_for_the_same_question():
    known, made = Known(), []
    for _ in range(2):
        assert problem(known).once("what", lambda: made.append(1) or "value") == "value"
    assert problem(known).once("other", lambda: "another") == "another" and len(made) == 1
    assert problem(None).once("what", lambda: "mine") == "mine"


@pytest.mark.parametrize(
    "other",
    [
        lambda known: problem(known, seed=1),
        lambda known: replace(problem(known), seed=1),
        lambda known: problem(known, batch_size=8),
        lambda known: problem(known, samples=8),
        lambda known: problem(known, floor=2),
    ],
)
def test_another_seed_other_batches_or_other_bounds_are_another_question(other: object):
    known = Known()
    assert problem(known).once("what", lambda: "first") == "first"
    assert other(known).once("what", lambda: "second") == "second"


def test_what_no_seed_decides_outlives_it():
    known = Known()
    for seeded in (True, False):
        problem(known).once(("what", seeded), lambda: "first", seeded=seeded)
    other = replace(problem(known, batch_size=8), seed=1)
    assert other.once(("what", False), lambda: "second", seeded=False) == "first"
    known.forget_seed()
    assert problem(known).once(("what", False), lambda: "second", seeded=False) == "first"
    assert problem(known).once(("what", True), lambda: "second") == "second"


def test_what_was_drawn_for_is_made_again():
    known = Known()
    values = [known.once("what", lambda: float(torch.rand(()))) for _ in range(2)]
    assert values[0] != values[1]


def test_samples_that_are_drawn_anew_share_nothing():
    class Drawn(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> torch.Tensor:
            return CASE.inputs(16)[index] + torch.rand(())

    known = Known()
    posed = replace(problem(known), calibration=Calibration.of(Drawn(), samples=16, batch_size=4))
    assert [posed.once("what", lambda value=value: value) for value in (1, 2)] == [1, 2]


def test_questions_that_cannot_be_told_apart_are_asked_again():
    known = Known()
    assert [known.once((["list"],), lambda value=value: value) for value in (1, 2)] == [1, 2]
