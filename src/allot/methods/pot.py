"""POT: the remaining weights of each layer, adjusted layer by layer (Lazarevich et al., ICCV Workshops 2021).

    w, m     weight as stored and its mask;  w_c row c, an output channel;  x input, y output of a dense layer

The allocation is `global-normalised` (|w| / ||w_l||_2 ranked over the whole net) and is not learned. Then:

weight-moments   r_c = std(w_c) / std(m_c w_c),  d_c = mean(w_c) - mean(r_c m_c w_c),   w <- r_c w + d_c where m
                 mean and spread over the row with its zeros; r_c cut to [1/limit, limit]; needs no data
bias             mean of each output channel, as in `moments.py`; batch norms are re-estimated instead of folded
layerwise        min over w, b:  mean ( layer(x; m w, b) - y )^2 / mean y^2,   every layer by itself, all in one pass
                 x of the dense net, as in POT, or of the sparse net, which also corrects what came before

Differences from POT as released:
    - every output is matched exactly in its mean; there, from a constant input per channel, which borders contradict;
    - a row that lost all its weights is left at zero, not scaled by 1e9;
    - each step of the reconstruction sees the next batch; there, forty steps repeat one batch, and after a step that
      lowered the loss the next one continues with old gradients;
    - steps are shares of a tensor's size (`allot.methods.training.distillation`), there 1e-5 for every weight;
    - one sparsity level: masks stay; there, the same is done ten points below the target first;
    - all layers in scope count for the threshold and are masked; there, ignored ones count and are not masked.
The paper reports, for ResNet-50 on ImageNet at 50 % without data, a loss of about 1.5 points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allot.errors import UsageError, check_number, unknown
from allot.methods.training.batch_loss import check_finite
from allot.methods.training.distillation import Training
from allot.methods.training.losses import relative_error, whole_of
from allot.network.applied_masks import masked
from allot.network.call import call
from allot.network.hooks import Apply, biases_of, watched_layers
from allot.network.layers import Layer
from allot.processes import all_reduce, all_reduce_number
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State

INPUTS = ("dense", "sparse")


@dataclass(frozen=True)
class WeightMoments:
    """Give every row of every weight the mean and spread that it had before it was masked.

    Args:
        limit: largest factor on a row, and the inverse of the smallest; 1 or more.
    Raises:
        UsageError: a limit that is no such number.
    State:
        tensors: layer -> new weight, shape of the weight.
    """

    limit: float = 10.0

    role = "repair"
    needs_data = False

    def __post_init__(self) -> None:
        check_number("limit", self.limit, 1)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": len(problem.scope), "tensors": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        layer = problem.scope.layers[state["step"]]
        w, m = candidate.tensor(problem, layer.name), candidate.masks[layer.name]
        state["tensors"][layer.name] = layer.unmatrix(self.matched(layer.matrix(w), layer.matrix(m))).contiguous()
        state["step"] += 1
        return {"forward": 0, "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return replace(candidate, tensors={**candidate.tensors, **state["tensors"]})

    def matched(self, w: Tensor, m: Tensor) -> Tensor:
        """r_c w_c + d_c where m `[rows, cols]`; masked weights stay as stored."""
        dense = w.double()
        sparse = masked(dense, m)
        before, after = (rows.std(1, correction=0) for rows in (dense, sparse))
        varies = (after > 1e-9 * dense.abs().amax(1)) & (before > 0)
        r = torch.where(varies, before / after.where(varies, torch.ones_like(after)), torch.ones_like(after))
        r = r.clamp(1 / self.limit, self.limit)
        d = torch.where(varies, dense.mean(1) - r * sparse.mean(1), torch.zeros_like(r))
        return torch.where(m, (r[:, None] * dense + d[:, None]).to(w.dtype), w)


@dataclass(frozen=True)
class Layerwise:
    """Train the remaining weights of every layer until its outputs are those of the dense layer; masks stay.

    No gradient passes from layer to layer, so that none of the samples counts as pushed backward.

    Args:
        steps: batches, 1 or more.
        learning_rate: peak step of Adam, as a fraction of each tensor's root mean square.
        inputs: of the "dense" net, or of the "sparse" one with its current weights.
    Raises:
        UsageError: a value out of its range.
    State:
        training: as in `Training`.
    """

    steps: int = 250
    learning_rate: float = 0.01
    inputs: str = "dense"

    role = "repair"
    needs_data = True
    parallel = True
    streams = "result"

    def __post_init__(self) -> None:
        self._training()
        if self.inputs not in INPUTS:
            raise unknown("inputs", str(self.inputs), INPUTS)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": self.steps, "training": self._training().begin(problem, candidate)}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        training = state["training"]
        inputs, samples = problem.inputs().batch(state["step"])
        targets: dict[str, list[Tensor]] = {}
        losses: dict[str, list[float]] = {}
        gradients: dict[str, Tensor] = {}
        rebuild = self._rebuild(problem, candidate, state, losses, gradients)

        def keep(layer: Layer, apply: Apply, output: Tensor) -> None:
            targets.setdefault(layer.name, []).append(output.clone())  # the net may change it in place

        def compare(layer: Layer, apply: Apply, output: Tensor) -> None:
            if not targets.get(layer.name):
                raise UsageError(
                    f"{layer.name} is applied more often in the sparse net than in the dense one: inputs=dense."
                )
            rebuild(layer, apply, targets[layer.name].pop(0))

        dense = self.inputs == "dense"
        with torch.no_grad():
            with watched_layers(problem.model, problem.scope, rebuild if dense else keep):
                call(problem.model, {}, inputs)
            if not dense:
                current = {
                    name: masked(value, candidate.masks[name]) if name in candidate.masks else value
                    for name, value in training["tensors"].items()
                }
                with watched_layers(problem.model, problem.scope, compare):
                    call(problem.model, {n: v.to(problem.dense[n].dtype) for n, v in current.items()}, inputs)
        names = sorted(gradients)
        summed = all_reduce([gradients[name] for name in names])
        self._training().update(training, dict(zip(names, summed, strict=True)))
        state["step"] += 1
        every_loss = [loss for of_layer in losses.values() for loss in of_layer]
        loss = all_reduce_number(sum(every_loss)) / max(len(every_loss), 1)
        return {"loss": loss, "forward": samples * (1 if dense else 2), "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return replace(candidate, tensors=self._training().tensors(problem, candidate, state["training"]))

    def _training(self) -> Training:
        return Training(steps=self.steps, learning_rate=self.learning_rate, loss="mse")

    def _rebuild(
        self,
        problem: Problem,
        candidate: Candidate,
        state: State,
        losses: dict[str, list[float]],
        gradients: dict[str, Tensor],
    ) -> Callable[[Layer, Apply, Tensor], None]:
        """The visit of a layer: compare its output with a target, and add up the gradients of its weight and bias."""
        tensors = state["training"]["tensors"]
        # a tied weight may be used beside several biases: these stay as they are, and so do frozen ones
        biases = biases_of(problem.model, [layer for layer in problem.scope if not layer.aliases])
        biases = {layer: bias for layer, bias in biases.items() if bias[0] in tensors}

        def rebuild(layer: Layer, apply: Apply, target: Tensor) -> None:
            mask = candidate.masks[layer.name]
            w = masked(tensors[layer.name], mask).to(target.dtype).requires_grad_()
            name, part = biases.get(layer.name, ("", slice(0)))
            b = tensors[name][part].to(target.dtype).clone().requires_grad_() if name else None
            with torch.enable_grad():
                loss = relative_error(apply(w, b), target, whole_of(target))
                check_finite(loss, state["step"])
                of_weight, *of_bias = torch.autograd.grad(loss, [w] if b is None else [w, b])
            losses.setdefault(layer.name, []).append(float(loss.detach()))
            G = masked(of_weight.to(tensors[layer.name].dtype), mask)
            gradients[layer.name] = gradients[layer.name] + G if layer.name in gradients else G
            for gradient in of_bias:
                parameter = gradients.setdefault(name, torch.zeros_like(tensors[name]))
                parameter[part] += gradient.to(parameter.dtype)

        return rebuild
