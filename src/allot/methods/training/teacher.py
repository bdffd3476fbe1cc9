"""What the dense net answers to the calibration samples, remembered: from pass to pass, and by a sweep from run to run.

Part of a training's state: "teacher", tables `[samples, ...]` on the CPU, which the first pass fills; "repeat", whether
they serve; "probed", samples that were pushed to find that out; "drew", whether the dense net draws when it answers;
"known", where an earlier run of the sweep filled the tables.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from allot.processes import anyone, gathered, processes
from allot.run.problem import Problem
from allot.run.store import State


def recalled(problem: Problem, state: State, what: Hashable) -> tuple[list[Tensor], int] | None:
    """The tables, where all samples are in them, and the samples that a run by itself would push to get to them now.

    Args:
        what: which answers, see `Problem.once`.
    """
    if not state["repeat"]:
        return None
    if problem.known and not state["step"] and (found := problem.known.get(problem.about(what))):
        state |= {**found, "known": True}
    first = state["step"] < problem.inputs().batches
    if first and "known" not in state:
        return None
    state["teacher"] = [table.cpu() for table in state["teacher"]]  # a state that was read back is elsewhere
    if not first:
        return state["teacher"], 0
    samples = len(problem.inputs().positions(state["step"]))
    return state["teacher"], samples + (0 if state["step"] else state["probed"])


def keep(
    problem: Problem,
    state: State,
    what: Hashable,
    answers: list[list[Tensor]],
    pieces: list[tuple[int, int]],
    positions: list[int],
) -> None:
    """Remember answers to these samples, where inputs repeat and there is room (`Compute.cached`).

    Args:
        answers: outputs by piece of this process's share of the batch.
    """
    calibration = problem.inputs()
    if state["repeat"] and not state["teacher"]:
        each = sum(t.numel() * t.element_size() for outputs in answers for t in outputs) / pieces[-1][1]
        of_samples = all(
            t.shape[:1] == (stop - start,)
            for outputs, (start, stop) in zip(answers, pieces, strict=True)
            for t in outputs
        )
        state["repeat"] = not anyone(each * len(calibration) > problem.compute.cached or not of_samples)
    if not state["repeat"]:
        return
    answers = [[tensor.cpu() for tensor in outputs] for outputs in answers]
    if processes() > 1:
        answers = [outputs for said in gathered(answers) for outputs in said]
    if not state["teacher"]:
        state["teacher"] = [tensor.new_zeros(len(calibration), *tensor.shape[1:]) for tensor in answers[0]]
    shapes = [table.shape[1:] for table in state["teacher"]]
    if any([tensor.shape[1:] for tensor in outputs] != shapes for outputs in answers):
        state |= {"repeat": False, "teacher": []}  # samples of several shapes
        return
    for table, parts in zip(state["teacher"], zip(*answers, strict=True), strict=True):
        table[positions] = torch.cat(parts)
    if problem.known and state["step"] == calibration.batches - 1 and not state["drew"]:
        problem.known.put(problem.about(what), {name: state[name] for name in ("teacher", "probed", "drew")})
