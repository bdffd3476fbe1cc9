"""DSA: differentiable allocation of channels under a budget (Ning et al., ECCV 2020, arXiv:2004.02164), after training.

    C, n      channels a group of coupled channels has, channels it keeps
    alpha     keep density of a group, the only thing that is learned: alpha = eps + (top - eps) sigma(a), top at most 1
    x_i       importance of channel i: its rank among the C as 4 (rank + 1/2) / C - 2, or log b_i (`space`)
    p_i, tau  soft mask of channel i, threshold of the group;  beta  steepness, from beta_1 to beta_2 in equal ratios
    F, B      cost of an allocation, budget;  h = F / B - 1;  rho, lambda  penalty, multiplier

One number a group becomes a soft mask, through the threshold at which the wanted fraction is kept on average:

    p_i = sigma(beta (x_i - tau)),    tau such that sum_i p_i = alpha C                   (the expectation condition)

By the implicit function theorem, with s_i = p_i (1 - p_i),

    dp_i / dalpha = C s_i / sum_j s_j       so that  dL/dalpha = C sum_i w_i dL/dp_i,   w = s / sum_j s_j

w is computed as a softmax of ln s, since s underflows where beta is large. p gates the channels where consumers read
them (`allot.methods.training.channel_gates`); L is the KL of the gated net, batch norms normalising by the batch, to
the dense one. Three ways to hold the budget, `hold`:

    implicit     alpha = eps + (top - eps) sigma(a - mu), mu such that F(alpha) = B: the same trick once more, exact in
                 every step. dL/da_k = s_k (L_k - F_k sum_j s_j L_j / sum_j s_j F_j),  s_k = dalpha_k / da_k
    lagrangian   L + (max(0, lambda + rho h)^2 - lambda^2) / (2 rho),  lambda <- max(0, lambda + rho h / 5)
    admm         L + rho/2 |alpha - Z + U|^2,  Z the projection of alpha + U on F <= B,  U <- U + alpha - Z

admm is the paper's. rho grows in equal ratios from 0.5 to 50. At the end `counts` makes whole numbers of channels that
meet the budget exactly.

Differences from the authors' code, which has no training loop:
    - after training: weights stay as they are while alpha is learned; `allot.pruning.from_scratch` trains both;
    - soft masks, no draws: in a hundred steps the noise of Bernoulli masks costs more than it explores (`sampled`);
    - ranks, not log |gamma|: the same steepness for every group, whatever its scales (`space=log`);
    - the root to 1e-11, batched over groups; there, scipy to 0.02 on the CPU, for one group after the other;
    - no floor added outside the condition, which made their gradient wrong at channels near it;
    - gates where channels are read, for any group; there, behind the batch norm of convs that were rewritten.
The paper reports ResNet-56 on CIFAR-10 allocated, trained and fine-tuned in 5 GPU hours, where others take up to 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from allot.budget.bisection import bracket, largest
from allot.budget.channels import channel_budget
from allot.errors import UsageError, check_flag, check_number, unknown
from allot.methods.training.channel_costs import Costs
from allot.methods.training.channel_gates import gated
from allot.methods.training.distillation import Training
from allot.methods.training.selection import CollectedEvidence, allocated, importance
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.scores import ChannelEvidence
from allot.run.store import State

HOLDS = ("implicit", "lagrangian", "admm")
SPACES = ("rank", "log")


@dataclass(frozen=True)
class Dsa:
    """Learn how many channels each group keeps, by the gradient of soft masks, under the budget.

    Args:
        training: steps, loss and temperature; its learning rate is not used, weights stay.
        rate: step of Adam on the logits a, above 0.
        steepness: beta_1 and beta_2, above 0.
        hold: how the budget is held: "implicit", "lagrangian" or "admm".
        space: which x tau is a threshold on: "rank" or "log" of the importance.
        sampled: draw 0 or 1 from p in each step, gradients straight through, as the paper.
        least: eps, from 0, below 1; a group keeps one channel at least in any case.
    Raises:
        UsageError: a value out of its range.
    State:
        training: as in `Distance`.
        place: group -> x, `[C]`, float64.
        a: logits of all groups, `[K]`, float64.
        mean, square: Adam's averages of their gradients, `[K]`, float64.
        learned: steps of Adam.
        lambda: lambda of each limit.
        z, u: Z, U, `[K]`, float64.
        rho: of the last step; with `hold=admm`, from the first step on.
        moved: [step, [alpha of each group]] at about fifty steps.
        asked: samples that the score pushed [forward, backward] and that no step has reported yet.
    """

    training: Training = field(default_factory=lambda: Training(steps=100))
    rate: float = 0.08
    steepness: tuple[float, float] = (2.0, 16.0)
    hold: str = "implicit"
    space: str = "rank"
    sampled: bool = False
    least: float = 0.03

    role = "allocate"
    needs_data = True
    parallel = True
    allocates = ("channels",)

    def __post_init__(self) -> None:
        check_number("rate", self.rate, 1e-9)
        check_number("least", self.least, 0, 0.99)
        check_flag("sampled", self.sampled)
        steepness: Any = self.steepness
        if not isinstance(steepness, list | tuple) or len(steepness) != 2:
            raise UsageError(f"steepness={steepness!r}: two numbers are accepted, at first and at last, like [2, 16].")
        for value in steepness:
            check_number("steepness", value, 1e-3)
        object.__setattr__(self, "steepness", tuple(map(float, steepness)))
        for name, value, accepted in (("hold", self.hold, HOLDS), ("space", self.space, SPACES)):
            if value not in accepted:
                raise unknown(name, str(value), accepted)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Importances of all channels, and logits at the uniform allocation that meets the budget."""
        evidence = CollectedEvidence(problem, candidate, {})
        state = self.begin(problem, evidence) | {"training": self.training.reading(problem)}
        return state | {"step": 0, "steps": self.training.fixed_length, "asked": [evidence.forward, evidence.backward]}

    def begin(self, problem: Problem, evidence: ChannelEvidence) -> State:
        """The part of the state that `masks` and `learn` read."""
        start = channel_budget(problem.budget).project({group.name: 1.0 for group in problem.scope.groups})
        least, top = self._bounds(problem)
        alpha = torch.tensor([start[group.name] for group in problem.scope.groups], dtype=torch.float64)
        inside = ((alpha - least) / (top - least).clamp_min(1e-9)).clamp(1e-3, 1 - 1e-3)
        a = (inside / (1 - inside)).log()
        return {
            "place": self.places(problem, evidence),
            "a": a,
            "mean": torch.zeros_like(a),
            "square": torch.zeros_like(a),
            "learned": 0,
            "lambda": [0.0] * len(channel_budget(problem.budget).limits),
            "z": alpha.clone(),
            "u": torch.zeros_like(a),
            "moved": [],
        }

    def places(self, problem: Problem, evidence: ChannelEvidence) -> dict[str, Tensor]:
        """x, which tau is a threshold on, group by group."""
        return {g.name: _place(importance(problem, g, evidence), self.space) for g in problem.scope.groups}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One calibration batch: the gradient of every alpha, and a step of Adam on the logits."""
        t, T = state["step"], state["steps"]
        drawn = self.masks(problem, state, t / max(T - 1, 1))
        with torch.enable_grad():
            tensors = gated(problem, candidate.effective(problem), drawn.gates)
        loss, G, forward = self.training.loss_of(problem, state["training"], tensors)
        gates = list(drawn.gates.values())
        gradients = torch.autograd.grad([tensors[name] for name in G], gates, list(G.values()), allow_unused=True)
        spent = self.learn(problem, state, drawn, gradients)
        if t % max(T // 50, 1) == 0 or t == T - 1:
            state["moved"].append([t, drawn.alpha.tolist()])
        samples = len(problem.inputs().positions(t))
        state["training"]["step"] = state["step"] = t + 1
        pushed, state["asked"] = state["asked"], [0, 0]
        return {"loss": loss, "forward": forward + pushed[0], "backward": samples + pushed[1], "spent": spent}

    def masks(self, problem: Problem, state: State, progress: float, *, room: float = 1.0) -> Drawn:
        """The masks of all groups at the current logits.

        Args:
            progress: from 0 to 1: steepness and penalty grow with it.
            room: how many times the budget may be used.
        """
        costs = Costs(problem, room=room)
        alpha, slope = self._densities(problem, costs, state["a"])
        beta = self.steepness[0] * (self.steepness[1] / self.steepness[0]) ** progress
        x, filled = padded([state["place"][group.name] for group in problem.scope.groups])
        p, w = soft_masks(x, filled, alpha, beta)
        draws = torch.bernoulli(p.float()) if self.sampled else p
        gates = {g.name: draws[k, : g.total].float().requires_grad_() for k, g in enumerate(problem.scope.groups)}
        return Drawn(gates, alpha, slope, filled.sum(1)[:, None] * w, costs, 0.5 * 100**progress)

    def learn(self, problem: Problem, state: State, drawn: Drawn, gradients: Iterable[Tensor | None]) -> float:
        """One step of Adam on the logits, by the gradients of the gates; returns F / B of the tightest limit."""
        dp = torch.zeros_like(drawn.jacobian)
        for k, (group, gradient) in enumerate(zip(problem.scope.groups, gradients, strict=True)):
            if gradient is not None:
                dp[k, : group.total] = gradient.double().cpu()
        spent = drawn.costs(drawn.alpha)
        dalpha = (drawn.jacobian * dp).sum(1)
        self._adam_step(state, self._logit_gradient(state, drawn.alpha, drawn.slope, dalpha, spent, drawn.rho))
        self._update_dual(problem, state, drawn.costs, drawn.rho)
        return max(cost for cost, _ in spent)

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with whole numbers of channels; the path of the densities goes to the report."""
        report = {"groups": [group.name for group in problem.scope.groups], "densities": state["moved"]}
        return allocated(candidate, self.counts(problem, state), {"dsa": report})

    def counts(self, problem: Problem, state: State) -> dict[str, int]:
        """Whole numbers of channels that meet the budget, nearest to the learned densities."""
        alpha = state["z"] if self.hold == "admm" else self._densities(problem, Costs(problem), state["a"])[0]
        names = [group.name for group in problem.scope.groups]
        return problem.budget.counts(dict(zip(names, alpha.tolist(), strict=True)))

    def _bounds(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of every alpha: of rules, one channel, and eps; of rules, and 0.999 for the solver."""
        by_name = {term.name: term for term in problem.budget.terms}
        terms = [by_name[group.name] for group in problem.scope.groups]
        top = [min(term.upper / term.total, 0.999) for term in terms]
        least = [min(max(term.lower / term.total, self.least), t) for term, t in zip(terms, top, strict=True)]
        return torch.tensor(least, dtype=torch.float64), torch.tensor(top, dtype=torch.float64)

    def _densities(self, problem: Problem, costs: Costs, a: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, dalpha/da at fixed mu)."""
        least, top = self._bounds(problem)

        def alpha_at(mu: float) -> Tensor:
            return least + (top - least) * torch.sigmoid(a - mu)

        mu = 0.0
        if self.hold == "implicit":
            low, high = float(a.min()) - 40, float(a.max()) + 40
            mu = high - largest(lambda room: costs.fits(alpha_at(high - room)), high - low)
        sigma = torch.sigmoid(a - mu)
        return alpha_at(mu), (top - least) * sigma * (1 - sigma)

    def _logit_gradient(
        self, state: State, alpha: Tensor, slope: Tensor, dalpha: Tensor, spent: list[tuple[float, Tensor]], rho: float
    ) -> Tensor:
        """dL/da."""
        if self.hold == "implicit":
            price = max(spent, key=lambda cost: cost[0])[1]  # of the limit that binds
            level = (slope * dalpha).sum() / (slope * price).sum().clamp_min(1e-30)
            return slope * (dalpha - level * price)
        if self.hold == "lagrangian":
            for (cost, price), multiplier in zip(spent, state["lambda"], strict=True):
                dalpha = dalpha + max(0.0, multiplier + rho * (cost - 1)) * price
            return slope * dalpha
        return slope * (dalpha + rho * (alpha - state["z"] + state["u"]))

    def _update_dual(self, problem: Problem, state: State, costs: Costs, rho: float) -> None:
        if self.hold == "lagrangian":
            pairs = zip(state["lambda"], costs(self._densities(problem, costs, state["a"])[0]), strict=True)
            state["lambda"] = [max(0.0, value + 0.2 * rho * (cost - 1)) for value, (cost, _) in pairs]
        if self.hold == "admm":
            alpha = self._densities(problem, costs, state["a"])[0]
            state["z"] = projected(costs, alpha + state["u"], *self._bounds(problem))
            grown = rho / state.get("rho", rho)  # the dual is scaled by rho
            state |= {"u": state["u"] / grown + alpha - state["z"], "rho": rho}

    def _adam_step(self, state: State, gradient: Tensor) -> None:
        t = state["learned"] = state["learned"] + 1
        state["mean"].mul_(0.9).add_(0.1 * gradient)
        state["square"].mul_(0.99).add_(0.01 * gradient.square())
        mean, square = state["mean"] / (1 - 0.9**t), state["square"] / (1 - 0.99**t)
        state["a"] -= self.rate * mean / (square.sqrt() + 1e-12)


@dataclass(frozen=True)
class Drawn:
    """Masks of one step: gates by group, alpha, dalpha/da, dp/dalpha, the costs of alpha, and the penalty rho."""

    gates: dict[str, Tensor]
    alpha: Tensor
    slope: Tensor
    jacobian: Tensor
    costs: Costs
    rho: float


def soft_masks(
    x: Float[Tensor, "K C"], filled: Float[Tensor, "K C"], alpha: Float[Tensor, " K"], beta: float
) -> tuple[Float[Tensor, "K C"], Float[Tensor, "K C"]]:
    """(p, w): soft masks whose sum is alpha C in every group, and dp/dalpha = C w; float64.

    Newton's method inside the exact bracket [min x, max x] + logit(1 - alpha) / beta, halved where a step leaves it.

    Args:
        x: importances, one row a group.
        filled: 1 where a row has a channel, 0 in its padding.
        alpha: in (0, 1).
        beta: above 0.
    """
    count = filled.sum(1)
    channels = torch.where(filled > 0, x, math.nan)
    shift = ((1 - alpha) / alpha).log() / beta
    low, high = channels.nan_to_num(math.inf).amin(1) + shift, channels.nan_to_num(-math.inf).amax(1) + shift
    tau = (low + high) / 2
    for _ in range(200):
        p = torch.sigmoid(beta * (x - tau[:, None])) * filled
        error = p.sum(1) - alpha * count
        if bool((error.abs() < 1e-11 * count).all()):
            break
        low, high = torch.where(error > 0, tau, low), torch.where(error > 0, high, tau)
        newton = tau + error / (beta * (p * (1 - p)).sum(1)).clamp_min(1e-300)
        tau = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    z = beta * (x - tau[:, None])
    log_s = torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z)
    return torch.sigmoid(z) * filled, torch.softmax(log_s.masked_fill(filled == 0, -math.inf), 1)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one table, and 1 where it is filled, 0 elsewhere: float64 `[K, C]` both.

    >>> padded([torch.ones(1), torch.ones(2)])[1].tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    table, filled = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.float64).unbind()
    for k, row in enumerate(rows):
        table[k, : len(row)], filled[k, : len(row)] = row, 1.0
    return table, filled


def projected(costs: Costs, wished: Tensor, least: Tensor, top: Tensor) -> Tensor:
    """The densities nearest to `wished` in squares that fit: argmin |Z - wished|^2 with F(Z) <= B, least <= Z <= top.

    Z = clip(wished - sum_l nu_l dF_l/dZ(Z)), by fixed point; each nu_l in turn by bisection, since F_l falls as it
    grows.
    """
    nu = [0.0] * len(costs.weights)
    z = wished.clamp(min=least, max=top)

    def z_at(values: list[float], z: Tensor) -> Tensor:
        for _ in range(40):
            pull = torch.stack([v * price for v, (_, price) in zip(values, costs(z), strict=True)]).sum(0)
            new = (wished - pull).clamp(min=least, max=top)
            if bool((new - z).abs().max() < 1e-9):
                break
            z = (z + new) / 2
        return z

    def over(values: list[float], limit: int) -> bool:
        return costs(z_at(values, z))[limit][0] > 1

    for _ in range(8 if len(nu) > 1 else 1):  # limits pull on each other
        before = list(nu)
        for i in range(len(nu)):
            nu[i] = 0.0
            if not over(nu, i):
                continue
            low, high = 0.0, max(2 * before[i], 1e-3)
            while over([*nu[:i], high, *nu[i + 1 :]], i) and high < 1e6:
                low, high = high, 2 * high
            nu[i] = bracket(lambda value: over([*nu[:i], value, *nu[i + 1 :]], i), low, high, rounds=30)[1]  # noqa: B023
        z = z_at(nu, z)
        if all(abs(new - old) <= 1e-6 * max(new, 1e-9) for new, old in zip(nu, before, strict=True)):
            break
    return z


def _place(score: Tensor, space: str) -> Tensor:
    """X of importances, which tau is a threshold on; of equal ones the lower index is larger."""
    if space == "log":
        return score.clamp_min(score.max().clamp_min(1e-30) * 1e-6).log()
    order = score.argsort(stable=True, descending=True)
    rank = torch.empty(len(score), dtype=torch.float64)
    rank[order] = torch.arange(len(score) - 1, -1, -1, dtype=torch.float64)
    return (rank + 0.5) / len(score) * 4 - 2
