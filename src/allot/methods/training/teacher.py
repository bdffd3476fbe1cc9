"""What the dense net answers to the calibration samples, remembered from pass to pass.

Part of a training's state: "teacher", tables `[samples, ...]` on the CPU, which the first pass fills; "repeat", whether
they serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allot.processes import all_gather_object, any_process, world_size
from allot.run.problem import Problem
from allot.run.store import State


def recalled(problem: Problem, state: State) -> list[Tensor] | None:
    """The tables, where all samples are in them."""
    if not state["repeat"] or state["step"] < problem.inputs().batches:
        return None
    state["teacher"] = [table.cpu() for table in state["teacher"]]  # a state that was read back is elsewhere
    return list(state["teacher"])


def keep(
    problem: Problem,
    state: State,
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
        state["repeat"] = not any_process(each * len(calibration) > problem.compute.cached or not of_samples)
    if not state["repeat"]:
        return
    answers = [[tensor.cpu() for tensor in outputs] for outputs in answers]
    if world_size() > 1:
        answers = [outputs for said in all_gather_object(answers) for outputs in said]
    if not state["teacher"]:
        state["teacher"] = [tensor.new_zeros(len(calibration), *tensor.shape[1:]) for tensor in answers[0]]
    shapes = [table.shape[1:] for table in state["teacher"]]
    if any([tensor.shape[1:] for tensor in outputs] != shapes for outputs in answers):
        state |= {"repeat": False, "teacher": []}  # samples of several shapes
        return
    for table, parts in zip(state["teacher"], zip(*answers, strict=True), strict=True):
        table[positions] = torch.cat(parts)
