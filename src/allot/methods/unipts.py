"""UniPTS, the training: base-decayed distillation with dynamic masks (Xie et al., CVPR 2024). The search is beside it.

    t, T    step, steps;  w, m weights as stored and their masks;  z, y logits of the sparse and of the dense net
    b_t     base of the logarithm;  s_t scale;  lambda decay of pruned weights;  f_t share that is exchanged

The objective takes the student's logarithm in a base that falls, so that gradients grow while the two nets come closer:

    L_t = T^2 sum_c Z ( ln Z - log_{b_t} Zs ),    Z = softmax(y / T), Zs = softmax(z / T_s),    ln b_t = ln b_0 r^t

log_b x = ln x / ln b, and Z does not depend on z, so dL_t/dz = dKL/dz / ln b_t: the base is a scale on the step and
nothing else. It is written as that, and the value that is reported is the KL itself:

    s_t = ln b_0 / ln b_t = base_decay^(-t/T),    base_decay = ln b_T / ln b_0   (0.99^100 = 0.366 in the authors' code)

Masks are dynamic: before step t, where it is due, the k_l best-scored of the current weights stay. Gradients reach
pruned weights as well (straight through), which may come back; beside that they shrink by lambda lr_t. With `growth`
"gradient" or "saliency", f_t k_l of the kept weights at most give way to the pruned ones of the largest |G| or |w G|,
f_t = exchange (1 + cos(pi t / (freeze_at T))) / 2, G as Adam averages it. From `freeze_at` T on masks stay.

Differences from the authors' code:
    - T_s is T; there, T = 4 and T_s = 1, whose optimum is z = y / 4: the answers stay, the confidence is lost;
    - the teacher is in eval mode; there, in train mode;
    - Adam, whose steps are shares of a tensor's size; there, SGD (`optimizer=sgd`);
    - masks are selected every few steps by partial sorting, and frozen at the end; there, sorted in every forward pass;
    - the budget comes down from a wider one (`ramp`); there, it is the budget from the first step;
    - base decay, lambda and growth by gradient are off: no clear gain in the ablation (docs/unipts-results.md).
The paper reports 68.6 % for ResNet-50 on ImageNet at 90 % sparsity, where POT has 3.9 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from allot.errors import check_number, unknown
from allot.methods.training.distillation import Training, distil, distilled, distilling
from allot.methods.training.schedule import Schedule, warm_cosine
from allot.methods.training.selection import scored
from allot.network.layers import Layer
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.scores import Evidence
from allot.run.store import State

GROWTH = ("score", "gradient", "saliency")


@dataclass(frozen=True)
class Unipts:
    """Train all weights of the sparse net, its masks moving with them; how much each layer keeps is fixed.

    Args:
        base_decay: ln b_T / ln b_0, above 0, at most 1; 1: the base stays.
        decay: lambda, by how much a pruned weight shrinks in a step of learning rate 1.
        growth: what brings a pruned weight back: "score" (magnitude, unless `--score` says another), "gradient" or
            "saliency".
        exchange: fraction of the kept weights that "gradient" and "saliency" may exchange at first, from 0 to 1.
    Raises:
        UsageError: a value out of its range.
    State:
        training: as in `Training`.
        masks: layer -> m, bool, shape of the weight; empty before the first step.
        squares: sums that the score asks for, as in `CollectedEvidence`.
    """

    training: Training = field(default_factory=Training)
    schedule: Schedule = field(default_factory=lambda: Schedule(ramp=8.0))
    base_decay: float = 1.0
    decay: float = 0.0
    growth: str = "score"
    exchange: float = 0.3

    role = "repair"
    needs_data = True
    parallel = True
    watched = True

    def __post_init__(self) -> None:
        check_number("base_decay", self.base_decay, 1e-6, 1)
        check_number("decay", self.decay, 0)
        check_number("exchange", self.exchange, 0, 1)
        if self.growth not in GROWTH:
            raise unknown("growth", str(self.growth), GROWTH)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return distilling(self.training, problem, candidate)

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        t, T = state["step"], state["steps"]

        def select(evidence: Evidence, kept: Mapping[str, int]) -> dict[str, Tensor]:
            return {l.name: self._mask(problem, state, l, evidence, kept[l.name]) for l in problem.scope}

        metrics = distil(
            self.training, self.schedule, problem, candidate, state, select=select, scale=scale(t, T, self.base_decay)
        )
        if self.decay:
            shrunk = 1 - min(self.decay * self.training.peak * warm_cosine(t, T), 1.0)
            for name, m in state["masks"].items():
                w = state["training"]["tensors"][name]
                w.copy_(torch.where(m, w, shrunk * w))
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return distilled(self.training, problem, candidate, state)

    def _mask(self, problem: Problem, state: State, l: Layer, evidence: Evidence, kept: int) -> Tensor:
        w, before = state["training"]["tensors"][l.name], state["masks"].get(l.name)
        score = scored(problem, l, w, evidence)
        if self.growth == "score" or before is None:
            return problem.pattern.mask(l, score, kept)
        end = self.schedule.last(state["steps"])
        f = self.exchange * (1 + math.cos(math.pi * state["step"] / max(end, 1))) / 2
        G = state["training"]["mean"][l.name].abs()
        growth = G if self.growth == "gradient" else G * w.abs()
        return problem.pattern.mask(l, exchanged(score, growth, before, f, kept), kept)


def scale(t: int, T: int, base_decay: float) -> float:
    """s_t = base_decay^(-t/T)."""
    return float(base_decay ** (-t / T))


def exchanged(score: Tensor, growth: Tensor, before: Tensor, f: float, kept: int) -> Tensor:
    """A score whose `kept` best are the best-scored weights of `before`, a fraction f of them exchanged by `growth`.

    Args:
        before: mask; all shapes are those of the weight.
        f: fraction of `kept` that may change.
    Returns:
        places, the larger the better, in float64: weights that stay come first, then the others by growth.
    """
    total, stay = score.numel(), max(min(int(before.sum()), kept) - math.floor(f * kept), 0)
    down = torch.arange(total, 0, -1, dtype=torch.float64, device=score.device)
    places = torch.empty_like(down)
    places[growth.flatten().argsort(descending=True, stable=True)] = down
    of_kept = score.flatten().double().masked_fill(~before.flatten(), -math.inf)
    places[of_kept.argsort(descending=True, stable=True)[:stay]] = total + down[:stay]
    return places.view_as(score)
