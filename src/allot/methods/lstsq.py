"""Least squares: layer after layer, the kept weights are refitted until the layer's outputs are the dense net's.

    min over W, b:  sum over samples | A(m W, b) - Y |^2      A the layer on the inputs that it has in the sparse net by
                                                              now, m its mask, Y its outputs in the dense net

Layers are taken in the order in which the model runs them, so that each makes up for the layers before it. This is the
reconstruction of He et al. (ICCV 2017, arXiv:1707.06168) for the consumers of removed channels, for any mask. Solved by
conjugate gradients on the normal equations (CGLS), which need of a layer only A and its transpose: convolutions of any
kind and attention are as good as matrices. Few iterations from the current weights regularise as a ridge would.

Twenty iterations magnify rounding a thousandfold and more, so that processes do not share this work: one of them does
it, and the result is the same whatever their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allot.errors import check_number
from allot.network.applied_masks import masked
from allot.network.call import call
from allot.network.hooks import Apply, biases_of, watched_layers
from allot.network.layers import Layer, frozen_beside_trained
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class LeastSquares:
    """Refit the kept weights of every layer to the dense net's outputs, front to back; no gradient crosses a layer.

    Args:
        batches: of calibration data that each layer is fitted to, 1 or more.
        iterations: of conjugate gradients, 1 or more.
    Raises:
        UsageError: a value out of its range.
    State:
        order: layers in the order in which the model runs them; empty before the first step.
        tensors: parameter -> refitted weight or bias, shape of the parameter.
    """

    batches: int = 4
    iterations: int = 20

    role = "repair"
    needs_data = True
    streams = "result"

    def __post_init__(self) -> None:
        check_number("batches", self.batches, 1, whole=True)
        check_number("iterations", self.iterations, 1, whole=True)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Nothing refitted; the first step finds the order of layers."""
        return {"step": 0, "steps": 1 + len(problem.scope), "order": [], "tensors": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """First the order in which layers run; then one layer."""
        if not state["step"]:
            return self._find_order(problem, candidate, state)
        name = state["order"][state["step"] - 1]
        scope = replace(problem.scope, layers=(problem.scope[name],))
        bias, part = biases_of(problem.model, scope).get(name, ("", slice(0)))
        current = replace(candidate, tensors={**candidate.tensors, **state["tensors"]})
        targets: list[Tensor] = []
        applied: list[Apply] = []
        forward = 0
        with torch.no_grad():
            for k in range(min(self.batches, problem.inputs().batches)):
                inputs, samples = problem.inputs().batch(k)
                with watched_layers(problem.model, scope, lambda _, apply, output: targets.append(output.clone())):
                    call(problem.model, {}, inputs)
                with watched_layers(problem.model, scope, lambda _, apply, output: applied.append(apply)):
                    call(problem.model, current.effective(problem), inputs)
                forward += 2 * samples
        parameter = current.tensor(problem, bias) if bias else None
        # a tied weight may be used beside several biases, and a layer more often in one net than in the other
        if len(targets) == len(applied) and not (bias and scope.layers[0].aliases):
            weight, value = current.effective(problem)[name], None if parameter is None else parameter[part]
            frozen = bias in frozen_beside_trained(problem.model)
            mask = candidate.masks[name]
            weight, value = _refitted(applied, targets, weight, value, mask, self.iterations, frozen=frozen)
            state["tensors"][name] = weight
            if parameter is not None and value is not None:
                state["tensors"][bias] = parameter.clone()
                state["tensors"][bias][part] = value
        state["step"] += 1
        return {"forward": forward, "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return replace(candidate, tensors={**candidate.tensors, **state["tensors"]})

    def _find_order(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        inputs, samples = problem.inputs().batch(0)
        order: dict[str, None] = {}

        def visit(layer: Layer, apply: Apply, output: Tensor) -> None:
            order.setdefault(layer.name)

        with torch.no_grad(), watched_layers(problem.model, problem.scope, visit):
            call(problem.model, candidate.effective(problem), inputs)
        state |= {"order": list(order), "step": 1, "steps": 1 + len(order)}
        return {"forward": samples, "backward": 0}


def _refitted(
    applied: list[Apply],
    targets: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    iterations: int,
    *,
    frozen: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias (unless frozen) after CGLS from their current values: residual r, gradient s, direction d."""
    dtype = targets[0].dtype
    W, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    zero = None if b is None else torch.zeros_like(b)

    def outputs(leaves: list[Tensor]) -> list[Tensor]:
        return [apply(leaves[0], leaves[1] if len(leaves) > 1 else zero) for apply in applied]

    def transposed(r: list[Tensor]) -> list[Tensor]:
        """A^T r, at kept weights."""
        leaves = [torch.zeros_like(value, requires_grad=True) for value in x]
        with torch.enable_grad():
            product = torch.stack([(y * part).sum() for y, part in zip(outputs(leaves), r, strict=True)]).sum()
            gradients = torch.autograd.grad(product, leaves)
        return [masked(gradients[0], mask), *gradients[1:]]

    def forward(leaves: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return outputs(leaves)

    x = [W] if b is None else [W, b]
    r = [y - z for y, z in zip(targets, forward(x), strict=True)]
    x = x[:1] if frozen else x
    s = transposed(r)
    d, size = s, _dot(s, s)
    first = size
    for _ in range(iterations):
        if size <= 1e-12 * first or size == 0:
            break
        q = forward(d)
        step = size / max(_dot(q, q), 1e-300)
        x = [value + step * way for value, way in zip(x, d, strict=True)]
        r = [value - step * way for value, way in zip(r, q, strict=True)]
        s = transposed(r)
        size, before = _dot(s, s), size
        d = [new + size / before * way for new, way in zip(s, d, strict=True)]
    if not all(bool(torch.isfinite(value).all()) for value in x):
        return weight, bias
    return x[0].to(weight.dtype), x[1].to(bias.dtype) if bias is not None and len(x) > 1 else bias


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(one, other, strict=True)))
