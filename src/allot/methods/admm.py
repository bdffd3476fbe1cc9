"""ADMM: each layer's mask and weights from its second-order statistics, layer after layer.

Boza, *Fast and Effective Weight Update for Pruned Large Language Models* (TMLR 2024, arXiv:2401.02938), for any layer
and any pattern. Meng et al., *ALPS* (NeurIPS 2024), solves the same problem; Frantar and Alistarh, *SparseGPT* (ICML
2023), goes through the columns once. Inputs X_s come from the net that is sparse up to this layer, targets from the
dense net:

    min over W with k nonzeros    |W X_s - W_d X_d|^2 + damping             W_d dense weight, [rows, K]
    G = X_s X_s^T,  C = X_d X_s^T                                           sums over all positions
    n = sqrt(diag G);   A = G / (n n^T) + delta I;   Y = (W_d C) / n + delta W_d n
    R = (A + rho I)^-1,   rho = 1
    X = W_d n;   U = 0
    t = 0 .. T-1:   while t < 3/4 T:  M = the k_t best of |X + U|,  k_t = k + (all - k) (1 - (t+1) / (3/4 T))^3
                    Z = (X + U) M;   U = U + X - Z;   X = (Y + rho (Z - U)) R
    W = (X + U) M, then conjugate gradients on the mask M, then divided by n

Every row is a problem of its own but for M. No gradient, no step size. Outputs before each batch norm match the dense
net's again, so that its statistics stay right.

Differences from the paper's code:
    targets     outputs of the dense net for the dense net's inputs; there: of the dense weights for the inputs at hand
    delta       measured: the share by which halves of the data disagree about G (`damping`); there: .01 of the mean
    pattern     any; k_t rises and falls in the steps of the pattern
    finish      conjugate gradients; there: more iterations with the mask fixed
    layers      convolutions, attention, recurrent layers, experts; there: linear layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from allot.errors import UsageError, check_number
from allot.methods.layerwise.grams import Gram, Part, Site, Statistics, sites_of
from allot.methods.layerwise.streamed_block import FLAG
from allot.network.layers import Layer
from allot.run.patterns import Channels
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State

RHO = 1.0
Select = Callable[[Tensor, int], Tensor]  # (scores [rows, K], kept) -> mask [rows, K]


@dataclass(frozen=True)
class Admm:
    """Choose each layer's mask and refit its weights to the dense net's outputs; no training.

    Takes the allocation, and nothing else that came before: weights start from the dense ones.

    Args:
        iterations: T, 1 or more.
        refinement: steps of conjugate gradients on the final mask, 0 or more.
        damping: delta; None: measured for each layer.
        inputs: "sparse": what the sparse net gives to a layer; "dense": what the dense net gives.
        targets: "dense": the dense net's outputs; "sparse": outputs of the dense weights for the inputs at hand.
    Raises:
        UsageError: a value out of its range.
    State:
        sites: of `Site.to_state`: layers that are repaired together, in order of execution; empty before the first
            step.
        tensors: layer -> refitted weight, shape of the weight.
        masks: layer -> mask, bool.
        errors: layer -> relative squared error of its outputs on the calibration inputs.
    """

    iterations: int = 24
    refinement: int = 20
    damping: float | None = None
    inputs: str = "sparse"
    targets: str = "dense"

    role = "repair"
    needs_data = True
    parallel = True
    streams = "result"
    by_blocks = True
    chooses_masks = True

    def __post_init__(self) -> None:
        check_number("iterations", self.iterations, 1, whole=True)
        check_number("refinement", self.refinement, 0, whole=True)
        if self.damping is not None:
            check_number("damping", self.damping, 0)
        for option, value in (("inputs", self.inputs), ("targets", self.targets)):
            if value not in ("sparse", "dense"):
                raise UsageError(f"{option}={value!r}: sparse or dense is accepted.")

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Nothing refitted; the first step finds the order of layers."""
        return {"step": 0, "steps": 1 + len(problem.scope), "sites": [], "tensors": {}, "masks": {}, "errors": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """First the order in which layers run; then one site: the layers that read the same inputs."""
        if not state["step"]:
            state["sites"] = [site.to_state() for site in sites_of(problem)]
            state |= {"step": 1, "steps": 1 + len(state["sites"])}
            return {"forward": 1, "backward": 0}
        site = Site.from_state(state["sites"][state["step"] - 1])
        flags = {name: tensor for name, tensor in candidate.tensors.items() if name == FLAG}
        statistics = Statistics(problem, site, inputs=self.inputs, targets=self.targets)
        statistics.collect(flags | state["tensors"])
        state["step"] += 1
        metrics: Metrics = {"forward": statistics.forward, "backward": 0}
        if statistics.finite:  # else inputs are too large to be squared: the layers stay as they were selected
            for name in site.layers:
                solved = self._solved(problem, candidate, problem.scope[name], site, statistics)
                state["tensors"][name], state["masks"][name], state["errors"][name] = solved
            metrics["error"] = max(state["errors"][name] for name in site.layers)
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        scope = {layer.name for layer in problem.scope}
        tensors = {name: tensor for name, tensor in candidate.tensors.items() if name == FLAG}
        tensors |= {name: t for name, t in candidate.tensors.items() if name in scope and name not in state["tensors"]}
        diagnostics = {**candidate.diagnostics, "admm": {"errors": dict(state["errors"])}}
        masks = {**candidate.masks, **state["masks"]}
        return replace(candidate, masks=masks, tensors=tensors | state["tensors"], diagnostics=diagnostics)

    def _solved(
        self, problem: Problem, candidate: Candidate, layer: Layer, site: Site, statistics: Statistics
    ) -> tuple[Tensor, Tensor, float]:
        """(weight, mask, relative error) of one layer."""
        dense = problem.dense[layer.name]
        W_d = layer.matrix(dense)
        W_d = W_d if W_d.dtype == torch.float64 else W_d.float()
        parts = {
            part: statistics.grams[site.source.get(part, part)] for part in statistics.energy if part[0] == layer.name
        }
        quadratic = Quadratic(W_d, parts, self.damping)
        if isinstance(problem.pattern, Channels):
            X, mask = W_d * quadratic.n, layer.matrix(candidate.masks[layer.name])
        else:
            kept = candidate.allocation.kept[layer.name]
            step = problem.pattern.feasible(layer)[0]

            def select(score: Tensor, k: int) -> Tensor:
                k = min(-(-k // step) * step, layer.total)
                return layer.matrix(problem.pattern.mask(layer, layer.unmatrix(score), k))

            X, mask = alternated(quadratic, select, kept, self.iterations)
        W = refined(quadratic, X, mask, self.refinement) / quadratic.n
        energy = float(sum(statistics.energy[part] for part in parts))
        error = quadratic.error(W, energy)
        weight = layer.unmatrix(W).to(dense.dtype)
        return weight.contiguous(), layer.unmatrix(mask).contiguous(), error


def alternated(problem: Quadratic, select: Select, kept: int, T: int) -> tuple[Tensor, Tensor]:
    """(X + U, M) after T iterations; both `[rows, K]`, columns times n."""
    X = problem.W_d * problem.n
    U, M = torch.zeros_like(X), torch.ones_like(X, dtype=torch.bool)
    total, moving = X.numel(), max(1, round(0.75 * T))
    for t in range(T):
        if t < moving:
            k_t = kept + (total - kept) * (1 - (t + 1) / moving) ** 3
            M = select((X + U).abs(), round(k_t))
        Z = (X + U) * M
        U += X - Z
        X = problem.times_R(problem.Y + RHO * (Z - U))
    return X + U, M


def refined(problem: Quadratic, X: Tensor, M: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for min <X A, X> - 2 <Y, X> on the mask M, every row by itself."""
    X = X * M
    r = (problem.Y - problem.times_A(X)) * M
    d, size = r, r.square().sum(1, keepdim=True)
    first = size
    for _ in range(steps):
        if bool((size <= 1e-12 * first).all()):
            break
        q = problem.times_A(d) * M
        step = size / (d * q).sum(1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
        X = X + step * d
        r = r - step * q
        size, before = r.square().sum(1, keepdim=True), size
        d = r + size / before.clamp_min(torch.finfo(X.dtype).tiny) * d
    return X


class Quadratic:
    """The layer error as a function of X = W n; the parts of a weight that read other inputs have a G each.

    Attributes:
        n: norm of each column, `[rows, K]`.
        Y: `[rows, K]`.
        damping: delta, the mean over the parts.
    """

    def __init__(self, W_d: Float[Tensor, "rows K"], parts: Mapping[Part, Gram], damping: float | None) -> None:
        self.W_d = W_d
        self.n = torch.ones_like(W_d)  # rows that no product computes stay as they are: A = I
        self.Y = W_d.clone()
        self._grams = [(slice(start, stop), gram) for (_, start, stop), gram in parts.items()]
        self._A: list[tuple[slice, Tensor]] = []
        self._R: list[tuple[slice, Tensor]] = []
        deltas = []
        for rows, gram in self._grams:
            S = gram.gram  # G so far; changed in place from here, as K x K may be most of the memory
            energy = S.diagonal(dim1=1, dim2=2)  # [groups, K]
            floor = 1e-3 * energy.mean()  # a column that these samples do not use
            n = (energy + floor if floor > 0 else torch.ones_like(energy)).sqrt()
            S /= n[:, :, None] * n[:, None, :]
            delta = disagreement(gram, S, n) if damping is None else S.new_full((len(S),), damping)
            A = plus_diagonal(S, delta[:, None])
            self._A.append((rows, A))
            self._R.append((rows, torch.cholesky_inverse(torch.linalg.cholesky(plus_diagonal(A.clone(), RHO)))))
            dense = W_d[rows].unflatten(0, (len(A), -1))  # [groups, rows, K]
            Y = dense @ gram.cross / n[:, None] + delta[:, None, None] * dense * n[:, None]
            self.n[rows] = n[:, None].expand_as(dense).flatten(0, 1)
            self.Y[rows] = Y.flatten(0, 1)
            deltas.append(float(delta.mean()))
        self.damping = sum(deltas) / max(1, len(deltas))

    def times_A(self, X: Float[Tensor, "rows K"]) -> Float[Tensor, "rows K"]:  # noqa: N802
        return _product(X, self._A)

    def times_R(self, X: Float[Tensor, "rows K"]) -> Float[Tensor, "rows K"]:  # noqa: N802
        return _product(X, self._R)

    def error(self, W: Tensor, energy: float) -> float:
        """|W X_s - W_d X_d|^2 over |W_d X_d|^2."""
        total = energy
        for rows, gram in self._grams:
            G = gram.gram
            grouped, dense = (w[rows].unflatten(0, (len(G), -1)) for w in (W, self.W_d))
            total += float(((grouped @ G - 2 * (dense @ gram.cross)) * grouped).sum(dtype=torch.float64))
        return max(total, 0.0) / energy if energy else 0.0


def _product(X: Tensor, matrices: list[tuple[slice, Tensor]]) -> Tensor:
    """The rows of X, each times the matrix of its part and group."""
    product = X.clone()
    for rows, matrix in matrices:
        product[rows] = (X[rows].unflatten(0, (len(matrix), -1)) @ matrix).flatten(0, 1)
    return product


def plus_diagonal(matrices: Float[Tensor, "groups K K"], value: Tensor | float) -> Float[Tensor, "groups K K"]:
    """The matrices, with the value added to their diagonals in place."""
    matrices.diagonal(dim1=1, dim2=2).add_(value)
    return matrices


def disagreement(gram: Gram, S: Float[Tensor, "groups K K"], n: Float[Tensor, "groups K"]) -> Float[Tensor, " groups"]:
    """delta: how much of the distance of G from the identity, columns scaled by n, is noise of the sample.

        s = |D|^2 / |S - I|^2,   delta = s / (1 - s)        S = G / (n n^T),  D the half difference of both halves

    After Ledoit and Wolf (2004): s is the weight of the identity in the best mix of it with S.
    """
    D = gram.halves[0] - gram.halves[1]
    D /= n[:, :, None] * n[:, None, :]
    noise = D.square_().sum((1, 2))
    del D
    distance = plus_diagonal(S.clone(), -1.0).square_().sum((1, 2))
    share = (noise / distance.clamp_min(torch.finfo(S.dtype).tiny)).clamp(max=0.9)
    return (share / (1 - share)).clamp_min(1e-3)
