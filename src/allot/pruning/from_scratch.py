"""DSA from scratch: weights and densities of channels learned in one training (Ning et al., ECCV 2020), with labels.

    1  warm-up          weights only, so that |gamma| begins to tell channels apart
    2  together         weights by batches of one split under masks m ~ Bernoulli(p), one draw a group and step; every
                        few steps the densities alpha by a batch of the other split. The budget comes down from the
                        dense cost; steepness grows; importances are taken again from the weights
    3  fine-tuning      alpha becomes whole numbers, the other channels are cut, and the slim net trains on all data

One learning-rate schedule, linear then a cosine, runs over all three. The split is the paper's guard against densities
that are learned on what the weights have seen already; both splits train the weights once densities stand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from allot.budget.budget import Budget
from allot.budget.channels import channel_budget
from allot.errors import UsageError, check_number, unknown
from allot.methods.dsa import Dsa
from allot.methods.rules import uniform
from allot.methods.training.channel_gates import gated
from allot.methods.training.selection import CollectedEvidence, Selection
from allot.network.call import call
from allot.network.channels import ChannelPlan, copied, slimmed
from allot.network.draws import generator, numbered
from allot.network.trees import as_arguments, map_tensors
from allot.pruning.setup import make_problem
from allot.run.driver import Progress, drive, repeatable
from allot.run.patterns import Channels, parse
from allot.run.problem import Candidate, Problem, Rule
from allot.run.scores import CHANNEL_SCORES

Batch = tuple[Any, Tensor]  # inputs and labels
Batches = Callable[[str, int], Batch]  # (split, k) -> batch k of the split


@dataclass(frozen=True)
class JointTraining:
    """How weights and densities are trained together.

    Args:
        steps: batches that train weights, in all three phases.
        warm, together: fractions of the steps; fine-tuning takes the rest.
        every: weight steps for one step of the densities, 1 or more.
        rate, momentum, decay: of SGD with Nesterov momentum; `decay` on matrices and kernels.
        smoothing: of the labels.
        refresh: weight steps after which importances are taken again.
        dsa: how densities are learned; its training of weights is not used.
    Raises:
        UsageError: a value out of its range.
    """

    steps: int = 4000
    warm: float = 0.05
    together: float = 0.5
    every: int = 2
    rate: float = 0.05
    momentum: float = 0.9
    decay: float = 5e-4
    smoothing: float = 0.1
    refresh: int = 50
    dsa: Dsa = field(default_factory=lambda: Dsa(rate=0.05, steepness=(1.0, 50.0), sampled=True))

    def __post_init__(self) -> None:
        for name in ("steps", "every", "refresh"):
            check_number(name, getattr(self, name), 1, whole=True)
        for name in ("warm", "together", "momentum", "smoothing"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("rate", "decay"):
            check_number(name, getattr(self, name), 0)
        if self.warm + self.together > 1:
            raise UsageError(f"warm={self.warm} and together={self.together} are more than all steps.")

    @property
    def begin(self) -> int:
        """The first step in which densities are learned."""
        return round(self.warm * self.steps)

    @property
    def stop(self) -> int:
        """The first step of fine-tuning."""
        return round((self.warm + self.together) * self.steps)


@dataclass(frozen=True)
class TrainedNet:
    """A slim net, and the cost of its training.

    Attributes:
        model: the trained net, cut, in eval mode.
        plan: the channels that it kept of the model passed in.
        macs: {"dense", "slim"} multiply-accumulates.
        images: samples pushed {"forward", "backward"}.
        moved: [step, density of each group] during the training.
    """

    model: nn.Module
    plan: ChannelPlan
    macs: dict[str, int]
    images: dict[str, int]
    seconds: float
    moved: list[Any]


def train(
    model: nn.Module,
    batches: Batches,
    budget: Budget | str | float | Mapping[str, float | int | str],
    *,
    recipe: JointTraining | None = None,
    score: str = "scale",
    pattern: str | Channels = "channels",
    seed: int = 0,
    on_step: Callable[[Progress], None] | None = None,
) -> TrainedNet:
    """A copy of `model` whose weights and densities of channels were trained together, cut to the budget.

    Args:
        model: its weights are where training begins, usually fresh ones; it is not changed.
        batches: (split, k) -> (inputs, labels) of batch k of the split "weights", "densities" or "all"; see `split`.
        budget: as for `prune`.
    Raises:
        UsageError, BudgetError: the input cannot be used; the message says why, in one line.
    """
    recipe = recipe or JointTraining()
    if score not in CHANNEL_SCORES:
        raise unknown("score", score, CHANNEL_SCORES)
    started = time.monotonic()
    net = copied(model).train()
    budget = Budget.of(budget)
    structure = parse(pattern) if isinstance(pattern, str) else pattern
    if budget.latency is not None:
        raise UsageError("a budget of latency is measured after training: use macs=, and allot.prune for latency=.")
    if not callable(batches):
        raise UsageError(
            f"batches: {type(batches).__name__} cannot be called: pass allot.pruning.from_scratch.split(data)."
        )
    inputs, labels = batches("weights", 0)
    problem = make_problem(
        net,
        budget,
        structure,
        example=map_tensors(lambda tensor: tensor[:1], inputs),
        score=CHANNEL_SCORES[score],
        seed=seed,
    )
    images = {"forward": 0, "backward": 0}

    def report(step: int, split: str, loss: float, samples: int) -> None:
        images["forward"], images["backward"] = images["forward"] + samples, images["backward"] + samples
        if on_step:
            metrics: dict[str, float | int] = {"loss": loss, "forward": samples, "backward": samples}
            on_step(Progress(split, step + 1, recipe.steps, metrics))

    state = _train_jointly(problem, recipe, batches, seed, report)
    whole = Candidate.dense(problem)
    allocated = recipe.dsa.finish(problem, whole, state) if state else drive(Rule(uniform), problem, whole)
    plan = ChannelPlan.of(net, problem.scope.groups, drive(Selection(), problem, allocated).channels)
    slim = slimmed(net, plan)
    optimizer = _sgd(slim, recipe)
    for t in range(recipe.stop, recipe.steps):
        with repeatable(slim, seed, "scratch", t):
            inputs, labels = batches("all", t)
            args, kwargs = as_arguments(inputs)
            loss = _loss(slim.train()(*args, **kwargs), labels, recipe)
            optimizer.zero_grad()
            loss.backward()
            _step(optimizer, recipe, t)
            report(t, "all", float(loss.detach()), len(labels))
    macs = {
        "dense": problem.budget.cost("macs", whole.allocation.kept),
        "slim": problem.budget.cost("macs", allocated.allocation.kept),
    }
    return TrainedNet(slim.eval(), plan, macs, images, time.monotonic() - started, state.get("moved", []))


def split(data: Any, *, batch_size: int = 64, held_out: float = 0.1, seed: int = 0) -> Batches:
    """Batches of a labelled data set in the three splits, drawn anew in every pass.

    Args:
        data: a Dataset of (input, label).
        held_out: fraction of the samples that the densities are learned on, above 0, below 1.
    Raises:
        UsageError: too few samples for two splits.
    """
    from torch.utils.data import default_collate

    check_number("held_out", held_out, 0.0, 1.0)
    order = torch.randperm(len(data), generator=generator(seed)).tolist()
    cut = round(held_out * len(order))
    parts = {"densities": order[:cut], "weights": order[cut:], "all": order}
    if not parts["densities"] or not parts["weights"]:
        raise UsageError(f"held_out={held_out} of {len(order)} samples leaves a split empty.")

    def batch(part: str, k: int) -> Batch:
        indices = parts[part]
        count = max(len(indices) // batch_size, 1)
        shuffled = torch.randperm(len(indices), generator=generator(numbered(seed, k // count + 1))).tolist()
        chosen = shuffled[(k % count) * batch_size : (k % count + 1) * batch_size]
        inputs, labels = default_collate([data[indices[i]] for i in chosen])
        return inputs, labels

    return batch


def _train_jointly(
    problem: Problem, recipe: JointTraining, batches: Batches, seed: int, report: Callable[[int, str, float, int], None]
) -> dict[str, Any]:
    """Train the net in place in the first two phases; the state of the densities, empty where none were learned."""
    net, optimizer = problem.model, _sgd(problem.model, recipe)
    height = channel_budget(problem.budget).height(Candidate.dense(problem).allocation.kept)
    state: dict[str, Any] = {}
    length = recipe.stop - recipe.begin
    for t in range(recipe.stop):
        with repeatable(net, seed, "scratch", t):
            gates = {}
            if (done := t - recipe.begin) >= 0:
                progress = done / max(length - 1, 1)
                room = max(1.0, 1 + (height - 1) * (1 - progress / 0.6)) if progress < 0.6 else 1.0
                if not state:
                    state = recipe.dsa.begin(problem, _evidence(problem))
                elif t % recipe.refresh == 0:
                    state["place"] = recipe.dsa.places(problem, _evidence(problem))
                if done % recipe.every == 0:
                    batch = batches("densities", done // recipe.every)
                    report(t, "densities", *_learn_densities(problem, recipe, state, batch, progress, room))
                drawn = recipe.dsa.masks(problem, state, progress, room=room)
                gates = {name: gate.detach() for name, gate in drawn.gates.items()}
                if done % max(length // 50, 1) == 0:
                    state["moved"].append([t, drawn.alpha.tolist()])
            report(t, "weights", *_learn_weights(problem, recipe, gates, batches("weights", t), optimizer, t))
    return state


def _learn_densities(
    problem: Problem, recipe: JointTraining, state: dict[str, Any], batch: Batch, progress: float, room: float
) -> tuple[float, int]:
    """(loss, samples) of one step of the densities."""
    drawn = recipe.dsa.masks(problem, state, progress, room=room)
    tensors = gated(problem, {}, drawn.gates)
    loss, gradients = _gradients(problem.model, recipe, tensors, batch, list(drawn.gates.values()))
    recipe.dsa.learn(problem, state, drawn, gradients)
    return loss, len(batch[1])


def _learn_weights(
    problem: Problem, recipe: JointTraining, gates: dict[str, Tensor], batch: Batch, optimizer: Optimizer, t: int
) -> tuple[float, int]:
    """(loss, samples) of one step of the weights, in place."""
    parameters = dict(problem.model.named_parameters())
    tensors = (gated(problem, parameters, gates) if gates else parameters) | dict(problem.model.named_buffers())
    loss, gradients = _gradients(problem.model, recipe, tensors, batch, list(parameters.values()))
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.grad = gradient
    _step(optimizer, recipe, t)
    return loss, len(batch[1])


def _gradients(
    net: nn.Module, recipe: JointTraining, tensors: Any, batch: Batch, by: list[Any]
) -> tuple[float, tuple[Tensor | None, ...]]:
    """(loss, its gradients by the tensors `by`) of the net with other `tensors`, in train mode."""
    inputs, labels = batch

    def differentiate(output: Any) -> tuple[float, tuple[Tensor | None, ...]]:
        loss = _loss(output, labels, recipe)
        return float(loss.detach()), torch.autograd.grad(loss, by, allow_unused=True)

    return call(net, tensors, inputs, training=lambda _: True, then=differentiate)


def _loss(output: Any, labels: Tensor, recipe: JointTraining) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        raise UsageError("training from scratch needs logits [B, classes] and one label a sample.")
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
    if not bool(torch.isfinite(loss)):
        raise UsageError(f"the loss is {float(loss)}: lower rate.")
    return loss


def _sgd(net: nn.Module, recipe: JointTraining) -> Optimizer:
    wide = [p for p in net.parameters() if p.dim() > 1]
    flat = [p for p in net.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": wide, "weight_decay": recipe.decay}, {"params": flat}]
    return torch.optim.SGD(groups, lr=recipe.rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _step(optimizer: Optimizer, recipe: JointTraining, t: int) -> None:
    warm = max(1, recipe.steps // 20)
    falling = 0.5 * (1 + math.cos(math.pi * (t - warm) / max(recipe.steps - warm, 1)))
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate * ((t + 1) / warm if t < warm else falling)
    optimizer.step()


def _evidence(problem: Problem) -> CollectedEvidence:
    return CollectedEvidence(problem, Candidate.dense(problem), {})
