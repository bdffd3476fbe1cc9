"""Blocks: one block after another (decoder, encoder or residual block) is trained until its output is the dense one's.

    b        a block;  w_d its dense tensors, w its current ones as stored, m their masks
    x_d, x_s inputs of the block in the dense net, and in the sparse net, whose blocks before b are finished
    y = b(x_d; w_d)      target          z = b(x_s; w m)      output; of a block that returns a tuple, the hidden

    L = sum (z - y)^2 / sum y^2                         over a batch of calibration samples
    w <- w - lr (1 - t/T) rms(w_d) Adam(G),             G = dL / d(w m) in step t of T of this block

Everything in the block that is floating point learns: weights, biases, gains of norms. Steps are shares of the dense
tensor's size: a repair before this one may have inflated the sparse one's. Batch norms are in eval mode, and keep their
statistics: these belong to the outputs of the dense layers, which the outputs here come back to.

Masks stay as they are, pruned weights as they are stored. With `moving` the k_l best-scored of the current weights of
layer l stay, selected again every few steps as in `unipts`, k_l as before; pruned weights learn too, by G.

Guard: an eighth of the samples trains nothing. L on these is measured before the first step and after every pass over
the others. A pass that does not lower L is undone, and from there on steps are a third as long: no block ends worse
than it began, and no step size has to be right for all nets.

Cost for each block and sample: in each pass a forward pass of the dense block, and a forward and a backward pass of the
sparse one, about four forward passes; the default of 8 passes about 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from allot.errors import NotFinite, UsageError, check_flag, check_number
from allot.methods.layerwise.streamed_block import FLAG, BlockPart, ModelPart
from allot.methods.training.distillation import Training, step_scale
from allot.methods.training.losses import relative_error, size
from allot.methods.training.schedule import Schedule
from allot.methods.training.selection import CollectedEvidence
from allot.network.applied_masks import masked
from allot.network.call import call
from allot.run.calibration import Calibration, cut
from allot.run.outputs import wide
from allot.run.patterns import Channels
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Blocks:
    """Train the sparse net block by block to the outputs of the dense blocks; how much each layer keeps is fixed.

    In no recipe: `--repair admm,blocks`. Modules outside of the blocks stay as they are, and so do blocks without a
    layer in scope.

    Args:
        passes: over the samples that train a block, 1 or more; in batches of the calibration's size.
        learning_rate: first step of Adam, as a fraction of the dense tensor's root mean square; see the guard.
        moving: whether masks are selected again while weights train. Masks of channels stay.
        every: steps from one selection to the next, 1 or more.
    Raises:
        UsageError: a value out of its range. From `init`: a model that is not given block by block.
    State:
        training: as in `Training`; empty before the first step.
        masks: layer -> mask, bool, shape of the weight; empty until masks have moved.
        squares: sums that the score asks for, as in `CollectedEvidence`.
        factor: on the loss, so that gradients in float16 are within its range.
        shrink: factor on the learning rate, a third after every pass that was undone.
        before, error, best: L on the held-out samples at the start, after the last pass, and the lowest.
        best_step: steps before the lowest was measured.
        best_tensors, best_masks: parameter -> value and layer -> mask at that time, parameters in the model's dtype;
            empty where that is the start.
    """

    passes: int = 8
    learning_rate: float = 0.05
    moving: bool = False
    every: int = 5

    role = "repair"
    needs_data = True
    streams = "result"
    by_blocks = "needed"

    def __post_init__(self) -> None:
        check_number("passes", self.passes, 1, whole=True)
        check_number("learning_rate", self.learning_rate, 0)
        check_flag("moving", self.moving)
        check_number("every", self.every, 1, whole=True)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Nothing measured; no steps outside of the blocks, and in a block without a layer in scope."""
        part = problem.model
        if not isinstance(part, ModelPart):
            raise UsageError(
                f"blocks: {type(part).__name__} has no blocks as it is given here: allot.prune cuts a model into its "
                "blocks, and Streamed(method, device) does for a method that is driven by itself."
            )
        trains = isinstance(part, BlockPart) and len(problem.scope)
        steps = self.passes * _train_and_held_out(problem)[0].batches if trains else 0
        state: State = {"step": 0, "steps": steps, "training": {}, "masks": {}, "squares": {}}
        state |= {"factor": 0.0, "shrink": 1.0, "before": 0.0, "error": 0.0}
        return state | {"best": 0.0, "best_step": 0, "best_tensors": {}, "best_masks": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One batch; before the first one, and after each pass, the held-out samples.

        Raises:
            NotFinite: outputs of the block that are not finite at the start.
            UsageError: outputs of the block that carry no gradients.
        """
        train, held_out = _train_and_held_out(problem)
        forward = 0
        if not state["step"]:
            forward += self._begin(problem, candidate, state, held_out)
            if not state["best"]:  # as good as can be, like a block before the first pruned weight
                state |= {"step": 1, "steps": 1}
                return {"loss": 0.0, "error": 0.0, "forward": forward, "backward": 0}
        training, t = state["training"], state["step"]
        forward += self._move_masks(problem, candidate, state)
        masks = {**candidate.masks, **state["masks"]}
        inputs, samples = train.batch(t)
        loss, gradients = self._gradients(problem, candidate, state, masks, inputs, samples)
        metrics: Metrics = {"loss": loss, "forward": forward + 2 * samples, "backward": samples}
        if not self.moving:
            gradients = {n: masked(G, masks[n]) if n in masks else G for n, G in gradients.items()}
        lr = self.learning_rate * state["shrink"] * (1 - t / state["steps"])
        self._training(state).descend(training, gradients, lr)
        state["step"] += 1
        if not gradients:  # not finite
            self._undo(problem, candidate, state)
            metrics["loss"] = state["best"]
        if state["step"] % train.batches == 0:
            metrics["forward"] += self._measure(problem, candidate, state, masks, held_out)
        return metrics | {"error": state["error"]}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate in its best state, and the errors of the block."""
        if not state["training"]:
            return candidate
        row = {"before": state["before"], "after": state["best"], "best_step": state["best_step"]}
        return replace(
            candidate,
            tensors={**candidate.tensors, **state["best_tensors"]},
            masks={**candidate.masks, **state["best_masks"]},
            diagnostics={**candidate.diagnostics, "blocks": {_name(problem): row | {"steps": state["steps"]}}},
        )

    def _training(self, state: State) -> Training:
        return Training(steps=max(state["steps"], 1), learning_rate=self.learning_rate, loss="mse")

    def _begin(self, problem: Problem, candidate: Candidate, state: State, held_out: list[int]) -> int:
        """Fills the state; returns samples pushed forward."""
        training = self._training(state).begin(problem, candidate)
        training["scale"] = {name: step_scale(wide(problem.dense[name])) for name in training["mean"]}
        state["training"] = training
        error, forward = _error(problem, _placed(problem, candidate, training, candidate.masks), held_out)
        if not math.isfinite(error):
            raise NotFinite(
                f"blocks: the output of {_name(problem)} is not finite, or not that of the dense net: repair=none "
                "shows where it comes from."
            )
        state |= {"before": error, "error": error, "best": error}
        return forward

    def _measure(
        self, problem: Problem, candidate: Candidate, state: State, masks: Mapping[str, Tensor], held_out: list[int]
    ) -> int:
        """Keeps the state where it is the best so far, or goes back to the best; returns samples pushed forward."""
        training = state["training"]
        error, forward = _error(problem, _placed(problem, candidate, training, masks), held_out)
        state["error"] = error if math.isfinite(error) else state["best"]
        if not error < state["best"]:  # so is nan
            self._undo(problem, candidate, state)
            return forward
        tensors = self._training(state).tensors(problem, candidate, training)
        learned = (name for name in training["mean"] if name != FLAG and name in tensors)
        state["best_tensors"] = {name: tensors[name].clone() for name in learned}
        state |= {"best": error, "best_step": state["step"], "best_masks": dict(state["masks"])}
        return forward

    def _undo(self, problem: Problem, candidate: Candidate, state: State) -> None:
        """Back to the best state, with shorter steps and a fresh Adam."""
        training = state["training"]
        for name in training["mean"]:
            training["tensors"][name].copy_(state["best_tensors"].get(name, candidate.tensor(problem, name)))
            training["mean"][name].zero_()
            training["square"][name].zero_()
        training["step"] = 0
        state |= {"shrink": state["shrink"] / 3, "factor": 0.0, "masks": dict(state["best_masks"])}

    def _move_masks(self, problem: Problem, candidate: Candidate, state: State) -> int:
        """Selects masks where they are due; returns samples pushed forward."""
        t, schedule = state["step"], Schedule(every=self.every)
        if not self.moving or not t or not schedule.due(t, state["steps"]) or isinstance(problem.pattern, Channels):
            return 0
        kept = {layer.name: int(candidate.masks[layer.name].sum()) for layer in problem.scope}
        evidence = CollectedEvidence(problem, candidate, state["squares"])
        state["masks"] = self._training(state).select(problem, state["training"], evidence, kept)
        return evidence.forward

    def _gradients(
        self,
        problem: Problem,
        candidate: Candidate,
        state: State,
        masks: Mapping[str, Tensor],
        inputs: Any,
        samples: int,
    ) -> tuple[float, Gradients]:
        """(L on a batch, G of every tensor that L depends on; none where these are not finite)."""
        part, compute = problem.model, replace(problem.compute, compile=False, checkpoint=False)  # one block, by number
        pieces = [cut(inputs, *piece) for piece in compute.pieces(samples)]
        with torch.no_grad():
            targets = [call(part, {}, piece, compute=compute) for piece in pieces]
        whole = sum(size(target, "mse") for target in targets) if len(pieces) > 1 else None
        placed = _placed(problem, candidate, state["training"], masks)
        leaves = {name: placed[name].detach().requires_grad_() for name in state["training"]["mean"] if name != FLAG}
        placed |= leaves
        is_half = compute.amp == "fp16" or any(leaf.dtype == torch.float16 for leaf in leaves.values())
        if not state["factor"]:  # makes dL/dz about z - y
            state["factor"] = 2.0 ** round(math.log2(sum(t.numel() for t in targets))) if is_half else 1.0
        while True:
            loss = 0.0
            for piece, target in zip(pieces, targets, strict=True):

                def learn(output: Tensor, target: Tensor = target) -> float:
                    if not output.requires_grad:
                        raise UsageError(
                            f"the output of {_name(problem)} carries no gradients: take no_grad and detach out of it."
                        )
                    error = relative_error(output, target, whole)
                    torch.autograd.backward(error * state["factor"], inputs=list(leaves.values()))
                    return float(error.detach())

                with torch.enable_grad():
                    loss += call(part, placed, piece, compute=compute, then=learn)
            found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            if math.isfinite(loss) and all(bool(G.isfinite().all()) for G in found.values()):
                tensors = state["training"]["tensors"]
                return loss, {name: G.to(tensors[name].dtype) / state["factor"] for name, G in found.items()}
            if state["factor"] <= 1 or not math.isfinite(loss):
                return loss, {}
            state["factor"] /= 2
            for leaf in leaves.values():
                leaf.grad = None


def _train_and_held_out(problem: Problem) -> tuple[Calibration, list[int]]:
    """(the samples that train, positions of the others): an eighth is held out, at least one of two; one does both."""
    calibration = problem.inputs()
    count = len(calibration)
    held = max(count // 8, 1)
    held_out = [(2 * i + 1) * count // (2 * held) for i in range(held)]
    train = sorted(set(range(count)) - set(held_out)) or held_out
    return replace(calibration, indices=tuple(calibration.indices[i] for i in train)), held_out


def _placed(problem: Problem, candidate: Candidate, training: State, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to put in place of the block's: current ones, masked, in the model's dtypes."""
    placed = {name: value for name, value in candidate.tensors.items() if name not in training["mean"]}
    for name in training["mean"]:
        w = training["tensors"][name]
        placed[name] = (masked(w, masks[name]) if name in masks else w).to(problem.dense[name].dtype)
    return placed


def _error(problem: Problem, placed: Mapping[str, Tensor], positions: list[int]) -> tuple[float, int]:
    """(L on the samples at these positions, samples pushed forward)."""
    calibration = problem.inputs()
    squares = whole = 0.0
    with torch.no_grad():
        for first in range(0, len(positions), calibration.batch_size):
            inputs = calibration.pick(positions[first : first + calibration.batch_size])
            target, output = call(problem.model, {}, inputs), call(problem.model, placed, inputs)
            weight = max(size(target, "mse"), 1e-12 * target.numel())
            squares += float(relative_error(output, target)) * weight
            whole += weight
    return squares / whole, 2 * len(positions)


def _name(problem: Problem) -> str:
    """Names of the block's modules in the model."""
    names = [module_call.name for module_call in problem.model.calls] if isinstance(problem.model, BlockPart) else []
    return " to ".join(dict.fromkeys((names[0], names[-1]))) if names else "the model"
