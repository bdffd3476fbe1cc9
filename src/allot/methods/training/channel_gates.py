"""Factors on channels: where every consumer reads a channel, its weights are multiplied by the channel's gate.

A gate on what is read acts as one on the channel itself, once on every path, wherever norms and activations stand; at
zero it is the channel's removal. Nothing of a model is needed but its groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allot.network.call import call
from allot.processes import all_reduce, all_reduce_number, rank, world_size
from allot.run.outputs import Comparison
from allot.run.problem import Candidate, Problem

DRAWS = 4  # of labels, for each batch


def gated(
    problem: Problem, tensors: Mapping[str, Tensor], gates: Mapping[str, Float[Tensor, " C"]]
) -> dict[str, Tensor]:
    """`tensors` with the columns that read each channel multiplied by its gate, differentiable in the gates.

    Args:
        tensors: those that are in place of the model's already.
        gates: group -> `[channels]`.
    """
    gated_tensors = dict(tensors)
    for group in problem.scope.groups:
        gate = gates[group.name]
        for member in group.members:
            if member.reads:
                weight = gated_tensors.get(member.tensor, problem.dense[member.tensor])
                places = torch.tensor(member.places, device=weight.device)  # [C, r]
                line = torch.ones(weight.shape[member.dim], dtype=gate.dtype, device=weight.device)
                line = line.index_put((places.flatten(),), gate.to(weight.device).repeat_interleave(places.shape[1]))
                shape = [-1 if d == member.dim else 1 for d in range(weight.dim())]
                gated_tensors[member.tensor] = weight * line.view(shape).to(weight.dtype)
    return gated_tensors


def fisher(problem: Problem, candidate: Candidate) -> tuple[dict[str, Tensor], int, int]:
    """(group -> E[(d log p(y | x) / d gate)^2] at gate 1, samples forward, samples backward).

    y is drawn from the model's own p(y | x), where d log p has mean zero: the square of a batch's summed gradient is
    in expectation the sum of its samples' squares.
    """
    calibration, reading = problem.inputs(), problem.reading(Comparison(loss="kl"))
    dense = candidate.effective(problem)
    expected = {group.name: torch.zeros(group.total, dtype=torch.float64) for group in problem.scope.groups}
    forward = backward = 0
    for k in range(calibration.batches):
        inputs, samples = calibration.batch(k)
        for _ in range(DRAWS):
            gates = {name: torch.ones(len(value), requires_grad=True) for name, value in expected.items()}

            def likelihood_gradients(
                output: object, gates: dict[str, Tensor] = gates, samples: int = samples
            ) -> list[Tensor]:
                logits = reading.tensors(output)[0]
                logits = (logits if logits.dim() < 4 else logits.movedim(1, -1)).flatten(0, -2)  # [n, classes]
                log_p = logits.log_softmax(-1).gather(-1, _drawn_classes(logits, samples)).sum()
                leaves = list(gates.values())
                return all_reduce(torch.autograd.grad(log_p, leaves, allow_unused=True, materialize_grads=True))

            with torch.enable_grad():
                gradients = call(problem.model, gated(problem, dense, gates), inputs, then=likelihood_gradients)
            for name, gradient in zip(gates, gradients, strict=True):
                expected[name] += gradient.double().square().cpu()
            forward, backward = forward + samples, backward + samples
    return expected, forward, backward


def _drawn_classes(logits: Float[Tensor, "n classes"], samples: int) -> Int[Tensor, "n 1"]:
    """A class for each row, drawn by its probability; `samples` is the size of the batch of which this is a share.

    The rows of the whole batch draw together, so that a row draws the same for any number of processes.
    """
    rows = round(all_reduce_number(len(logits)))
    before = rows * (samples * rank() // world_size()) // samples
    u = torch.rand(rows, dtype=torch.float64)[before : before + len(logits), None].to(logits.device)
    reached = logits.detach().double().softmax(-1).cumsum(-1)
    return (reached <= u * reached[:, -1:]).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
