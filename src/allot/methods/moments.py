"""Output correction: give every output channel of every layer the mean (and spread) that it has in the dense net.

bias (Nagel et al., ICCV 2019, section 4.2):      y' = y + mean_d - mean_s
variance (per-channel scale, for nets without batch norm above all):

    y' = s y + (mean_d - s mean_s),      s = sqrt(var_d / var_s), cut to [1/limit, limit]

with moments over samples and positions, d of the dense net, s of the sparse one. s goes into the rows of the weight,
the shift into the bias where the layer has one; without a bias only s applies. Zeros stay zeros. A layer whose bias is
frozen is left as it is.

Differences from correcting layer by layer, one pass each: the second pass corrects every layer by the moments pooled
so far while it runs, so that the inputs of a layer are corrected already. Two passes for any depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allot.errors import check_number
from allot.network.call import call
from allot.network.hooks import Affine, Moments, biases_of, watched_outputs
from allot.network.layers import Layer, frozen_beside_trained
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class OutputMoments:
    """Match the mean of each output channel (`bias`), and its spread as well (`variance`).

    Tied layers stay as they are, and so do layers whose output goes straight into a batch norm: the statistics of the
    batch norm belong to the output as it is (repair `bn`), and a new scale would make them wrong.

    Args:
        scale: correct the spread as well.
        limit: largest factor on a row, and the inverse of the smallest; 1 or more.
    Raises:
        UsageError: a limit that is no such number.
    State:
        shiftable: layers that have a bias to shift.
        left: layers that stay as they are.
        dense, sparse: layer -> `Moments` of its outputs in this net so far, each `[C_out]`, float64.
    """

    scale: bool
    limit: float = 10.0

    role = "repair"
    needs_data = True
    parallel = True
    streams = "passes"

    def __post_init__(self) -> None:
        check_number("limit", self.limit, 1)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        frozen = frozen_beside_trained(problem.model)
        biases = {layer: name for layer, (name, _) in biases_of(problem.model, problem.scope).items()}
        left = [layer.name for layer in problem.scope if layer.normalised or biases.get(layer.name) in frozen]
        steps = 2 * problem.inputs().batches
        return {"step": 0, "steps": steps, "shiftable": list(biases), "left": left, "dense": {}, "sparse": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One calibration batch: through the dense net in the first pass, through the sparse one in the second."""
        batches = problem.inputs().batches
        inputs, samples = problem.inputs().batch(state["step"] % batches)
        dense = state["step"] < batches
        pooled = state["dense" if dense else "sparse"]
        shiftable = set(state["shiftable"])

        def visit(layer: Layer, moments: Moments) -> Affine | None:
            moments = Moments(**pooled[layer.name]) + moments if layer.name in pooled else moments
            pooled[layer.name] = moments.to_state()
            if dense or layer.name not in state["dense"]:
                return None
            scale, shift = self._affine(Moments(**state["dense"][layer.name]), moments)
            return scale, shift if layer.name in shiftable else torch.zeros_like(shift)

        layers = tuple(layer for layer in problem.scope if layer.name not in state["left"])
        with watched_outputs(problem.model, replace(problem.scope, layers=layers), visit), torch.no_grad():
            call(problem.model, {} if dense else candidate.effective(problem), inputs)
        state["step"] += 1
        return {"forward": samples, "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        tensors = dict(candidate.tensors)
        biases = biases_of(problem.model, problem.scope)

        def current(name: str) -> Tensor:
            return tensors.get(name, problem.dense[name])

        for layer in problem.scope:
            if layer.name not in state["sparse"] or layer.name not in state["dense"]:
                continue
            scale, shift = self._affine(Moments(**state["dense"][layer.name]), Moments(**state["sparse"][layer.name]))
            if self.scale:
                rows = layer.matrix(current(layer.name))
                tensors[layer.name] = layer.unmatrix(rows * scale.to(rows)[:, None]).contiguous()
            if bias := biases.get(layer.name):
                name, part = bias
                value = current(name).clone()
                value[part] = value[part] * scale.to(value) + shift.to(value)
                tensors[name] = value
        return replace(candidate, tensors=tensors)

    def _affine(self, dense: Moments, sparse: Moments) -> Affine:
        scale = torch.ones_like(dense.mean)
        if self.scale:
            # a channel that is constant in either net, but for rounding, has no spread to match
            varies = _varies(dense) & _varies(sparse)
            ratio = (dense.variance / sparse.variance.where(varies, scale)).sqrt()
            scale = torch.where(varies, ratio.clamp(1 / self.limit, self.limit), scale)
        return scale, dense.mean - scale * sparse.mean


def _varies(moments: Moments) -> Tensor:
    """Channels whose values vary by more than float32 rounds them; whatever their scale."""
    return moments.variance > 1e-10 * moments.mean.square()
