"""Whether batch norms may use the statistics of a batch while weights are trained: the dense net answers that."""

from __future__ import annotations

import torch

from allot.network.call import call
from allot.network.layers import is_batch_norm
from allot.processes import single_process
from allot.run.fidelity import distance, spread
from allot.run.problem import Problem

MOVED = 0.5  # relative error of the dense net's outputs, half way from no change to no better than a constant


def batch_norm_error(problem: Problem) -> float | None:
    """How far the dense net's outputs move where batch norms normalise by the batch, on one batch of inputs.

    Returns:
        squared error over the squared deviation from the mean, mean over outputs; None without batch norms, or where
        outputs cannot be compared.
    """
    if not any(map(is_batch_norm, problem.model.modules())):
        return None
    try:
        reading, inputs = problem.reading(), problem.inputs().pick(problem.inputs().positions(0))
        with torch.no_grad(), single_process():
            dense, moved = (
                reading.tensors(call(problem.model, {}, inputs, training=mode)) for mode in (None, is_batch_norm)
            )
        scales = [spread(y.double().sum(0), y.double().square().sum(), len(y)) for y in dense]
        errors = [distance(y, y_d, scale).mean() for y, y_d, scale in zip(moved, dense, scales, strict=True)]
    except Exception:  # noqa: BLE001 - outputs that cannot be compared, a batch of one sample, a model of one sample
        return None
    return float(torch.stack(errors).mean())
