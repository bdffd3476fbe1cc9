"""FCPTS: learn how much each layer keeps, inside the distillation (Gong, Yong, Wang, Guo, Wei, Ma, Liu; AAAI 2024).

    l       layer; n_l weights w_l, p_l cost of one more of them, d_l density, k_l weights kept
    T, t    steps, step;  G_l = dL / d(w_l m_l) at every entry (`allot.methods.training.distillation`)
    C_t     what the budget allows in step t: wider at first, then the budget itself (`Schedule`)

`Fcpts`, the default. The paper learns a threshold per layer and needs an estimate of the weights' density to know how
many weights a threshold removes. Over sorted scores that bridge is exact: the threshold that keeps k weights is the
k-th score. So the density is what is learned, and the budget holds in every step by construction:

    k_l  = counts of c * d_l,   c the largest price that C_t allows                    (bisection, `Budget.counts`)
    m_l  = the k_l best-scored of the current weights
    A_l  = ranks k_l - h .. k_l + h,  h = k_l / 2, within 16 .. 16,384:  the weights on both sides of the cut
    a_l <- 0.9 a_l + 0.1 mean_{A_l}( -G w )       how much the loss falls per weight more: the marginal gain
    b_l <- 0.9 b_l + 0.1 mean_{A_l}( |G w| )      how much these weights matter at all

and when masks are selected, after `learn_from` T, with u_l = p_l n_l d_l (1 - d_l), <x> = sum u_l x_l / sum u_l:

    r_l = absolute ( log(b_l/p_l) - <log(b/p)> )
    logit d_l <- logit d_l + clip( eta_t r_l, -1/2, 1/2 ),   then d <- Budget.project(d)

eta_t falls as a cosine and adds up to `distance`. Layers that are free move until b/p is the same in all of them. At an
optimum a/p is the same in all of them: it is reported, and moves nothing. First averages are plain means, prices count
as at least a thousandth of the largest, A_l ends at a layer's bounds, and d_l above 0.95 moves down from there.

`FcptsPaper`, for comparison. With s_l the learnable score of a layer, M_l a scale:

    t_l  = M_l sigmoid(s_l)                                   threshold
    m_l  = 1[|w_l| > t_l],   d m / d u = 1/2 [|u| < 1],  u = (|w_l| - t_l) / M_l              straight-through
    S_l  = #{|w_l| <= t_l} / n_l,   dS_l/dt_l = 1/n sum_i ( phi((t - |w_i|)/h) + phi((t + |w_i|)/h) ) / h    the bridge
    L    = T^2 KL(dense || net(w m)) + lambda | sum_l p_l n_l (1 - S_l) - C | / sum_l p_l n_l       by SGD on w and s

Differences from the authors' code:
    - thresholds get the gradient of the reconstruction loss; there, the mask is computed without gradients;
    - a kernel density estimate, as in the paper, of a width that no outlier moves; there, a histogram of 100 bins;
    - thresholds reach M_l = max(1, 10 upper quartile of |w|), there at most 1: a larger start has no logit;
    - a weight at its threshold is pruned; there, it is halved;
    - the teacher is in eval mode; there, in train mode, with its dropout on;
    - gradients are scaled down to norm 10: a step on a net with huge weights does not end in nan;
    - the budget is met exactly at the end, by a common shift of all s_l; there, it ends where SGD leaves it.
The paper reports, for ResNet-50 on ImageNet at 80 %, more than 30 % above earlier post-training methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import get_total_norm

from allot.budget.bisection import bracket
from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError, check_number
from allot.methods.training.distillation import Training, distilled
from allot.methods.training.schedule import Schedule, warm_cosine
from allot.methods.training.selection import CollectedEvidence, allocated
from allot.run.patterns import indices_of
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.scores import magnitude
from allot.run.store import State

PerLayer = Mapping[str, float]  # layer -> number
MOVABLE = 0.95  # the density that whole layers move down from: their log-odds are infinite
SAMPLED = 65_536  # the most weights of a layer that its bridge is estimated from
STEEPEST = 10.0  # norm of all gradients together, above which they are scaled down


@dataclass(frozen=True)
class Fcpts:
    """Learn how much each layer keeps while the weights are distilled; the budget holds exactly in every step.

    Args:
        start: allocator whose densities learning starts from.
        learn_from: fraction of the steps after which densities move, until `freeze_at`.
        distance: how far a layer moves in all where its r_l stays 1, in units of log-odds; 0 learns nothing.
        window: h over k_l.
        absolute: factor on r_l.
    Raises:
        UsageError: a value out of its range.
    State:
        start: state of the start.
        started: diagnostics of the start.
        training: as in `Training`.
        density: layer -> d_l.
        kept: layer -> k_l.
        masks: layer -> m_l, bool, shape of the weight.
        windows: layer -> A_l as flat indices, int32 `[at most 2 h]`.
        a, b: layer -> a_l, b_l, in units of the loss per weight.
        seen: how many steps a and b are averages of.
        squares: sums that the score asks for, as in `CollectedEvidence`.
        trajectory: {"step", "limit": kind -> ceiling, "kept": layer -> k_l} of every selection.
    """

    start: Method
    training: Training = field(default_factory=Training)
    schedule: Schedule = field(default_factory=lambda: Schedule(ramp=8.0))
    learn_from: float = 0.1
    distance: float = 1.0
    window: float = 0.5
    absolute: float = 1.0

    role = "allocate"
    needs_data = True
    parallel = True

    def __post_init__(self) -> None:
        check_number("learn_from", self.learn_from, 0, 1)
        for name in ("distance", "window", "absolute"):
            check_number(name, getattr(self, name), 0)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        start = self.start.init(problem, candidate)
        return {"step": 0, "steps": start["steps"] + self.training.fixed_length, "start": start}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of the start, or one calibration batch."""
        state["step"] += 1
        if not finished(state["start"]):
            return self.start.step(problem, candidate, state["start"])
        if "training" not in state:
            state |= self._begin_training(problem, candidate, state)
        training = state["training"]
        t, T = training["step"], training["steps"]
        budget = self.schedule.budget(problem.budget, t, T)
        evidence = CollectedEvidence(problem, candidate, state["squares"])
        limits = {limit.kind: limit.ceiling for limit in budget.limits}
        allocation: Metrics = {f"limit.{kind}": ceiling for kind, ceiling in limits.items()}
        if self.schedule.due(t, T):
            if eta := self.distance * self.schedule.fraction(t, T, self.learn_from):
                state["density"] = moved(problem.budget, state["density"], state["b"], eta, self.absolute)
            kept = state["kept"] = budget.counts(state["density"])
            low, high = _window_bounds(problem.budget, kept, self.window)
            state["masks"], wide, narrow = self.training.select_each(problem, training, evidence, (kept, high, low))
            state["windows"] = {l: indices_of(wide.pop(l) & ~narrow.pop(l)).int() for l in kept}
            allocation |= {f"density.{name}": kept[name] / total for name, total in candidate.allocation.total.items()}
            state["trajectory"].append({"step": t, "limit": limits, "kept": kept})
        gradients, metrics = self.training.gradients(problem, training, state["masks"])
        if t < self.schedule.last(T):
            _update_signals(state, gradients)
        self.training.update(training, gradients)
        allocation |= {f"cost.{kind}": budget.cost(kind, state["kept"]) for kind in limits}
        return metrics | allocation | {"forward": metrics["forward"] + evidence.forward}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        p = problem.budget.prices(state["kept"])
        signals = {
            word: {l: state[x][l] / p[l] for l in p if p[l]} for word, x in (("gain", "a"), ("sensitivity", "b"))
        }
        diagnostics = state["started"] | {"fcpts": {"trajectory": state["trajectory"], **signals}}
        return distilled(self.training, problem, allocated(candidate, state["kept"], diagnostics), state)

    def _begin_training(self, problem: Problem, candidate: Candidate, state: State) -> State:
        started = self.start.finish(problem, candidate, state["start"])
        return {
            "training": self.training.begin(problem, candidate),
            "density": dict(problem.budget.project(started.allocation)),
            "squares": {},
            "a": dict.fromkeys(started.allocation, 0.0),
            "b": dict.fromkeys(started.allocation, 0.0),
            "seen": 0,
            "trajectory": [],
            "started": dict(started.diagnostics),
        }


def moved(budget: ModelBudget, density: PerLayer, b: PerLayer, eta: float, absolute: float = 1.0) -> dict[str, float]:
    """Densities d_l after one update by b_l, using up the budget; where b_l is 0, proportions stay."""
    price = budget.prices(budget.counts(density))
    least = max(price.values()) * 1e-3 or 1.0  # a layer may cost nothing more
    p = {l: max(price[l], least) for l in density}
    d = {l: min(max(density[l], 1e-9), MOVABLE) for l in density}
    free = [term for term in budget.terms if term.lower < term.upper and b[term.name] > 0]
    u = {term.name: p[term.name] * term.total * d[term.name] * (1 - d[term.name]) for term in free}
    new = dict(density)
    if u:
        weight = {l: math.log(b[l]) - math.log(p[l]) for l in u}  # b/p may underflow
        mean = math.fsum(u[l] * weight[l] for l in u) / math.fsum(u.values())
        for l in u:
            r = absolute * (weight[l] - mean)
            z = math.log(d[l] / (1 - d[l])) + min(max(eta * r, -0.5), 0.5)
            shifted = 1 / (1 + math.exp(-z))
            new[l] = shifted if r < 0 else max(shifted, density[l])
    return dict(budget.project(new))


def _window_bounds(
    budget: ModelBudget, kept: Mapping[str, int], window: float
) -> tuple[dict[str, int], dict[str, int]]:
    """k_l - h and k_l + h, whole steps of the pattern, within each layer's bounds."""
    h = {t.name: -(-min(max(16, math.ceil(window * kept[t.name])), 16_384) // t.step) * t.step for t in budget.terms}
    return budget.clip({l: kept[l] - h[l] for l in h}), budget.clip({l: kept[l] + h[l] for l in h})


def _update_signals(state: State, gradients: Mapping[str, Tensor]) -> None:
    """Bring a_l and b_l up to date; one transfer from the device for all layers."""
    reached = {name: index for name, index in state["windows"].items() if name in gradients and len(index)}
    state["seen"] += 1
    if not reached:
        return
    keep = min(0.9, 1 - 1 / state["seen"])  # a plain mean at first
    gw = [
        gradients[name].flatten().index_select(0, index).double()
        * state["training"]["tensors"][name].flatten().index_select(0, index)
        for name, index in reached.items()
    ]
    seen = torch.stack([torch.stack([-x.mean(), x.abs().mean()]) for x in gw]).tolist()
    for name, (a, b) in zip(reached, seen, strict=True):
        state["a"][name] = keep * state["a"][name] + (1 - keep) * a
        state["b"][name] = keep * state["b"][name] + (1 - keep) * b


@dataclass(frozen=True)
class FcptsPaper:
    """The paper's form: thresholds through a sigmoid, a kernel bridge and a penalty; the budget is met at the end.

    Args:
        start: allocator whose densities set the first thresholds.
        training: learning_rate is that of plain SGD here, in absolute units.
        momentum, decay: of SGD; no decay on s_l.
        penalty: lambda.
    Raises:
        UsageError: a value out of its range.
    State:
        start: state of the start.
        started: diagnostics of the start.
        training: as in `Training`.
        M: layer -> M_l.
        s: layer -> s_l, 0-dim.
        speed: layer -> momentum of s_l, 0-dim.
        trajectory: {"step", "kept": layer -> weights above t_l} of every tenth step.
        kept, masks: layer -> weights kept, mask; at the end only.
    """

    start: Method
    training: Training = field(default_factory=lambda: Training(steps=1600, learning_rate=0.01, temperature=4.0))
    momentum: float = 0.9
    decay: float = 3e-4
    penalty: float = 1.0

    role = "allocate"
    needs_data = True
    parallel = True

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum, 0, 1)
        check_number("decay", self.decay, 0)
        check_number("penalty", self.penalty, 0)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Before the first step of the start.

        Raises:
            UsageError: a score other than magnitude, which thresholds on |w| cannot follow.
        """
        if problem.score is not magnitude:
            raise UsageError("fcpts-paper has thresholds on magnitudes: use --score magnitude, or --method fcpts.")
        start = self.start.init(problem, candidate)
        return {"step": 0, "steps": start["steps"] + self.training.fixed_length, "start": start}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of the start, or one calibration batch."""
        state["step"] += 1
        if not finished(state["start"]):
            return self.start.step(problem, candidate, state["start"])
        if "training" not in state:
            state |= self._begin_training(problem, candidate, state)
        training, M, tensors = state["training"], state["M"], state["training"]["tensors"]
        w = {name: tensors[name].detach().requires_grad_() for name in training["mean"]}
        s = {name: value.detach().requires_grad_() for name, value in state["s"].items()}
        with torch.enable_grad():
            t = {name: M[name] * torch.sigmoid(s[name]) for name in s}
            wm = {name: w[name] * keep((w[name].abs() - t[name]) / M[name]) for name in s}
            S = {name: pruned(t[name], w[name].detach().abs()) for name in s}
            placed = {name: value.to(problem.dense[name].dtype) for name, value in (tensors | w | wm).items()}
            off, sparsity = _missed_cost(problem.budget, S)
        loss, G, forward = self.training.loss_of(problem, training, placed)
        outputs, weights = [*(placed[name] for name in G), off], [*G.values(), torch.full_like(off, self.penalty)]
        gradients = torch.autograd.grad(outputs, [*w.values(), *s.values()], weights, allow_unused=True)
        moving = [(tensors[name], training["mean"][name], self.decay) for name in w]
        moving += [(state["s"][name], state["speed"][name], 0.0) for name in s]
        norm = float(get_total_norm([gradient for gradient in gradients if gradient is not None]))
        lr = self.training.peak * warm_cosine(training["step"], training["steps"])
        for (value, speed, decay), gradient in zip(moving, gradients, strict=True):
            if gradient is not None:
                speed.mul_(self.momentum).add_(gradient / max(norm / STEEPEST, 1.0) + decay * value)
                value.sub_(lr * speed)
        metrics = {"loss": loss, "penalty": float(off.detach()), "sparsity": sparsity}
        metrics |= {"forward": forward, "backward": len(problem.inputs().positions(training["step"]))}
        if training["step"] % 10 == 0:
            state["trajectory"].append({"step": training["step"], "kept": _counts(S, problem.budget)})
        training["step"] += 1
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate after the exact projection: a common shift of all s_l, then whole numbers."""
        tensors, total = state["training"]["tensors"], candidate.allocation.total
        ranked = {name: tensors[name].abs().flatten().sort().values for name in total}

        def thresholds(shift: float) -> dict[str, Tensor]:
            return {name: state["M"][name] * torch.sigmoid(s + shift) for name, s in state["s"].items()}

        def above(shift: float) -> dict[str, int]:
            t = thresholds(shift)
            return {l: total[l] - int(torch.searchsorted(ranked[l], t[l].to(ranked[l]), right=True)) for l in t}

        budget = problem.budget
        _, shift = bracket(lambda shift: not budget.fits(budget.clip(above(shift))), -40.0, 40.0, rounds=60)
        state["kept"] = budget.counts({l: k / total[l] for l, k in above(shift).items()})
        state["masks"] = self.training.select(
            problem, state["training"], CollectedEvidence(problem, candidate, {}), state["kept"]
        )
        report = {"trajectory": state["trajectory"], "threshold": {l: float(t) for l, t in thresholds(shift).items()}}
        diagnostics = state["started"] | {"fcpts-paper": report}
        return distilled(self.training, problem, allocated(candidate, state["kept"], diagnostics), state)

    def _begin_training(self, problem: Problem, candidate: Candidate, state: State) -> State:
        started = self.start.finish(problem, candidate, state["start"])
        training = self.training.begin(problem, candidate)
        M, s = {}, {}
        for name, kept in started.allocation.kept.items():
            magnitudes = training["tensors"][name].abs().flatten()
            M[name] = _threshold_scale(magnitudes)
            # a weight at the threshold is pruned: it is the largest of the removed ones
            removed = len(magnitudes) - kept
            t = magnitudes.kthvalue(removed).values if removed else magnitudes.min() / 2
            s[name] = torch.logit((t / M[name]).clamp(1e-12, 1 - 1e-3))
        return {
            "training": training,
            "M": M,
            "s": s,
            "speed": {name: torch.zeros_like(value) for name, value in s.items()},
            "trajectory": [],
            "started": dict(started.diagnostics),
        }


def _missed_cost(budget: ModelBudget, S: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """(fraction of the dense cost by which the tightest limit is missed, sparsity)."""
    total = {term.name: term.total for term in budget.terms}
    kept = _counts(S, budget)
    limit = max(budget.limits, key=lambda limit: budget.cost(limit.kind, kept) / max(limit.ceiling, 1))
    p = budget.prices(kept)
    room = limit.ceiling - budget.cost(limit.kind, kept)
    spent = torch.stack([p[l] * total[l] * (1 - S[l].double()) for l in S]).sum()
    dense = math.fsum(p[l] * total[l] for l in S) or 1.0
    return (spent - spent.detach() - room).abs() / dense, 1 - sum(kept.values()) / budget.total


def _counts(S: Mapping[str, Tensor], budget: ModelBudget) -> dict[str, int]:
    return {term.name: round((1 - float(S[term.name].detach())) * term.total) for term in budget.terms}


def keep(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1[u > 0]; its gradient is that of clip((1 + u)/2, 0, 1), straight through."""
    through = ((1 + u) / 2).clamp(0, 1)
    return (u > 0).to(u.dtype) + (through - through.detach())


def pruned(t: Float[Tensor, ""], magnitudes: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """S(t), the exact fraction of magnitudes not above t; its gradient is the bridge."""
    return (magnitudes <= t).to(t.dtype).mean() + bridge(t.detach(), magnitudes) * (t - t.detach())


def bridge(t: Float[Tensor, ""], magnitudes: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Density of the magnitudes at t: Gaussian kernels, reflected at 0, of width h = 0.9 IQR/1.34 n^(-1/5).

    From at most 65,536 weights, evenly spaced; h is at least a hundredth of t, where weights are few or equal.
    """
    x = _evenly_spaced(magnitudes)
    low, high = torch.quantile(x, x.new_tensor([0.25, 0.75]))
    h = torch.maximum(0.9 * (high - low) / 1.34 * len(x) ** -0.2, t.abs() / 100).clamp_min(1e-12)
    kernels = torch.exp(-(((t - x) / h) ** 2) / 2) + torch.exp(-(((t + x) / h) ** 2) / 2)
    return (kernels.mean() / (h * math.sqrt(2 * math.pi))).to(t.dtype)


def _evenly_spaced(magnitudes: Tensor) -> Tensor:
    flat = magnitudes.flatten().double()
    return flat[:: -(-len(flat) // SAMPLED)]


def _threshold_scale(magnitudes: Tensor) -> float:
    """M_l, the largest threshold; from a quartile, which one outlier does not move."""
    x = _evenly_spaced(magnitudes)
    return max(1.0, 10 * float(torch.quantile(x[x > 0], 0.75))) if bool((x > 0).any()) else 1.0
