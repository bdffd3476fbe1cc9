"""Batch-norm re-estimation: running statistics of the sparse net in place of the dense net's.

Each calibration batch goes through the sparse net once, batch norms normalising by the batch as in training. The
inputs x of each batch norm are pooled exactly over batches (count-weighted, spread between batches included):

    mean = sum_b n_b mean_b / n        var = (sum_b n_b var_b + sum_b n_b (mean_b - mean)^2) / (n - 1)

Differences from averaging PyTorch's running statistics: no momentum, no equal weight for a short last batch, and the
variance between batch means is not lost; with one batch both agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from allot.errors import UsageError
from allot.network.call import call
from allot.network.hooks import Moments
from allot.network.layers import is_batch_norm
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class BatchNorm:
    """Re-estimate the running mean and variance of every batch norm; a model without any is left as it is.

    State:
        moments: batch norm -> `Moments` of its inputs so far, each `[C]`, float64.
    """

    role = "repair"
    needs_data = True
    parallel = True
    streams = "passes"

    def init(self, problem: Problem, candidate: Candidate) -> State:
        steps = problem.inputs().batches if any(_tracking_norms(problem.model)) else 0
        return {"step": 0, "steps": steps, "moments": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        inputs, samples = problem.inputs().batch(state["step"])
        tensors = candidate.effective(problem)
        pooled = state["moments"]

        def pool(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moments = Moments.of((*args, *kwargs.values())[0].movedim(1, -1))
            pooled[name] = (Moments(**pooled[name]) + moments if name in pooled else moments).to_state()

        with ExitStack() as stack, torch.no_grad():
            for name, module in _tracking_norms(problem.model):
                stack.callback(module.register_forward_pre_hook(partial(pool, name), with_kwargs=True).remove)
                for buffer, value in module.named_buffers(prefix=name, recurse=False):
                    tensors[buffer] = value.clone()  # the pass writes to it
            try:
                call(problem.model, tensors, inputs, training=is_batch_norm)
            except ValueError as error:
                more = problem.inputs().for_more
                raise UsageError(
                    f"no batch statistics from {samples} samples: {error}. {more}, or leave bn out."
                ) from error
        state["step"] += 1
        return {"forward": samples, "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        tensors = dict(candidate.tensors)
        for name, module in _tracking_norms(problem.model):
            if name in state["moments"]:
                moments = Moments(**state["moments"][name])
                prefix = f"{name}." if name else ""
                tensors[prefix + "running_mean"] = moments.mean.to(module.running_mean)
                unbiased = moments.deviation / (moments.count - 1).clamp_min(1)
                tensors[prefix + "running_var"] = unbiased.to(module.running_var)
        return replace(candidate, tensors=tensors)


def _tracking_norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Batch norms that keep running statistics, with their names."""
    for name, module in model.named_modules():
        if is_batch_norm(module) and module.running_mean is not None:
            yield name, module
