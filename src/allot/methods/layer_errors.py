"""Layer errors: how well a refitted layer reproduces its outputs at each density; their sum is minimised.

    G_A, G_B   Gram matrices of a layer's inputs in the dense net, of the first and the second half of every batch
    W(d)       the best weight of density d for G_A, mask and values: the iterations of `admm`, d falling on the way
    e_l(d)     <(W(d) - W_d) G_B, W(d) - W_d>  /  <W_d G_B, W_d>         on inputs that W(d) was not fitted to

    min over d_1..d_L:  sum_l f_l(e_l(d_l)),   the cost of d within the budget

f_l is the weighting:

    relative   e                 all layers count alike
    log        -log(1 - e)       each layer keeps the share 1 - e of its signal; shares multiply
    outputs    L_l e / e_l(r)    L_l: loss of the net, dense but for layer l of density r, against the dense net

e_l is measured at a few densities. Between two of them log e is linear in log d, above the last one e falls to 0 at
d = 1 as (1 - d)^2. The minimum is that of the lower hulls (`allot.methods.training.separable`). No gradient is needed,
and one pass over the data where the matrices of all layers fit into `memory`.

A layer without matrices (a lookup table, one that is never reached, or inputs too large to be squared) has the share of
its squared weights that goes as e_l.

Sources: the layer error as the thing to allocate by is that of Frantar and Alistarh, *Optimal Brain Compression*
(NeurIPS 2022), who solve the sum by dynamic programming on errors of the inputs that the layer was fitted to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from allot.errors import UsageError, check_number
from allot.methods.layerwise.grams import Gram, Statistics
from allot.methods.layerwise.quadratic import Quadratic, column_norms, disagreement, refined, selects
from allot.methods.layerwise.sites import Part, Site, part_of, push, sites_of, together
from allot.methods.training.batch_loss import Distance
from allot.methods.training.selection import allocated
from allot.methods.training.separable import Curve, best_densities, grid
from allot.network.layers import Layer
from allot.network.products import Product
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State

WEIGHTINGS = ("relative", "log", "outputs")
POINTS = 12  # between two measured densities


@dataclass(frozen=True)
class LayerErrors:
    """Allocate the budget by how well each layer reproduces its outputs after a refit, as a function of its density.

    Made for the repair `admm`, whose errors these are. Nothing is trained.

    Args:
        distance: gives L_l of the weighting "outputs", on one calibration batch.
        densities: at which each layer is refitted, ascending from 0, below 1; at 0 the layer keeps its floor.
        iterations: of ADMM at each density, 1 or more.
        refinement: steps of conjugate gradients at each density, 0 or more.
        weighting: relative, log or outputs.
        memory: bytes of the matrices that exist at once; layers beyond that take a pass of their own.
    Raises:
        UsageError: a value out of its range.
    State:
        passes: groups of sites, each of `Site.to_state`: layers whose matrices are summed in one pass; empty before
            the first step.
        error: layer -> [[density, e_l(density)], ...], densities ascending.
        loss: layer -> [r, e_l(r), L_l], for the weighting "outputs".
        answers: batch -> the dense net's outputs on it; None where inputs do not repeat.
    """

    distance: Distance = field(default_factory=Distance)
    densities: tuple[float, ...] = (0.0, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.35, 0.6)
    iterations: int = 4
    refinement: int = 10
    weighting: str = "relative"
    memory: int = 2**29

    role = "allocate"
    needs_data = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "densities", grid(self.densities))
        check_number("iterations", self.iterations, 1, whole=True)
        check_number("refinement", self.refinement, 0, whole=True)
        check_number("memory", self.memory, 0, whole=True)
        if self.weighting not in WEIGHTINGS:
            raise UsageError(f"weighting={self.weighting!r}: {', '.join(WEIGHTINGS)} are accepted.")

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Nothing measured; the first step finds which layers read the same inputs."""
        judges = self.weighting == "outputs" and problem.inputs().repeats()
        steps = 2 + len(problem.scope)  # at most: how many passes there are, the first step finds out
        return {"step": 0, "steps": steps, "passes": [], "error": {}, "loss": {}, "answers": {} if judges else None}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """First the groups of layers; then one group: its matrices, and the curve of each of its layers."""
        if not state["step"]:
            passes = in_passes(problem, sites_of(problem), self.memory)
            state["passes"] = [[site.to_state() for site in sites] for sites in passes]
            state["step"] = 1
            return {"forward": 1 + len(problem.inputs().positions(0)), "backward": 0}
        metrics: Metrics = {"forward": 0, "backward": 0}
        if state["step"] <= len(state["passes"]):
            sites = [Site.from_state(site) for site in state["passes"][state["step"] - 1]]
            statistics = DenseStatistics(problem, together(sites))
            metrics["forward"] += statistics.collect_dense()
            for name in statistics.site.layers:
                parts = statistics.parts(name)
                metrics["forward"] += self._measure(problem, problem.scope[name], parts, state)
        else:
            for layer in problem.scope:
                if layer.name not in state["error"]:
                    metrics["forward"] += self._measure(problem, layer, {}, state)
            state["steps"] = state["step"] + 1
        state["step"] += 1
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the allocation; the measured curves go to the report."""
        curves = {name: self._weighted(curve, state["loss"].get(name)) for name, curve in state["error"].items()}
        kept = problem.budget.counts(best_densities(problem.budget, curves))
        report = {"weighting": self.weighting, "error": state["error"], "loss": state["loss"]}
        return allocated(candidate, kept, {"layer-errors": report})

    def _measure(self, problem: Problem, layer: Layer, parts: Mapping[Part, Gram], state: State) -> int:
        """Fill the layer's curve, and its loss where the weighting asks for it; samples pushed for that."""
        step, fewest, most = problem.pattern.feasible(layer)
        counts = {min(max(round(d * layer.total / step) * step, fewest), most) for d in self.densities}
        dense = problem.dense[layer.name]
        W_d = layer.matrix(dense)
        W_d = W_d if W_d.dtype == torch.float64 else W_d.float()
        curve: Curve = []
        weights: dict[float, tuple[float, Tensor]] = {}
        wanted = problem.budget.project({term.name: 1.0 for term in problem.budget.terms})[layer.name]
        select = selects(problem.pattern, layer)
        for kept, W, error in refits(W_d, parts, select, sorted(counts), self.iterations, self.refinement):
            density = kept / layer.total
            curve.append([density, error])
            if self.weighting == "outputs":
                weights = dict([min([*weights.items(), (density, (error, W))], key=lambda at: abs(at[0] - wanted))])
        state["error"][layer.name] = curve[::-1]
        forward = 0
        for density, (error, W) in weights.items():
            weight = layer.unmatrix(W).to(dense.dtype).contiguous()
            loss, forward = self.distance.judge(problem, {layer.name: weight}, 0, state["answers"])
            state["loss"][layer.name] = [density, error, loss]
        return forward

    def _weighted(self, curve: Curve, loss: Sequence[float] | None) -> Curve:
        """f(e) on a fine grid of densities."""
        if self.weighting == "relative":
            return fine(curve)
        if self.weighting == "log":
            return [[d, -math.log1p(-min(e, 0.999))] for d, e in fine(curve)]
        factor = loss[2] / max(loss[1], 1e-9) if loss else 0.0
        return [[d, factor * e] for d, e in fine(curve)]


def refits(
    W_d: Tensor,
    parts: Mapping[Part, Gram],
    select: Callable[[Tensor, int], Tensor],
    counts: Sequence[int],
    iterations: int,
    refinement: int,
) -> Iterable[tuple[int, Tensor, float]]:
    """(kept, W, its error on the half that it was not fitted to) for each of `counts`, from the largest down.

    The letters are those of `allot.methods.admm`; mask and multipliers of one count are the start of the next.
    """
    size = float(W_d.abs().max()) or 1.0  # errors are relative: no product below overflows for large weights or inputs
    W_d = W_d / size
    fitted, judged, delta = halved(parts)
    quadratic = Quadratic(W_d, fitted, delta)
    X = W_d * quadratic.n
    U = torch.zeros_like(X)
    for kept in reversed(counts):
        for _ in range(iterations):
            M = select((X + U).abs(), kept)
            Z = (X + U) * M
            U = U + X - Z
            X = quadratic.times_R(quadratic.Y + quadratic.rho * (Z - U))
        W = refined(quadratic, X + U, M, refinement) / quadratic.n
        yield kept, W * size, relative_error(W, W_d, judged)


def halved(parts: Mapping[Part, Gram]) -> tuple[dict[Part, Gram], dict[Part, Tensor], float]:
    """(Grams of the first half, matrices of the second half, damping of the first), the largest entry of all being 1.

    Half of the samples has twice the noise: its delta is twice the one of all. Where a half has no samples, both are
    all of them.
    """
    fitted, judged, deltas = {}, {}, [1e-3]
    largest = max((float(half.abs().max()) for gram in parts.values() for half in gram.halves), default=0.0) or 1.0
    for part, gram in parts.items():
        first, second = (half / largest for half in gram.halves)
        whole = replace(gram, halves=[first, second], cross=first + second)
        G = whole.gram
        n = column_norms(G)
        deltas.append(2 * float(disagreement(whole, G / (n[:, :, None] * n[:, None, :]), n).mean()))
        if not first.any() or not second.any():
            first = second = whole.gram
        fitted[part] = replace(gram, halves=[first, torch.zeros_like(first)], cross=first)
        judged[part] = second
    return fitted, judged, max(deltas)


def relative_error(W: Tensor, W_d: Tensor, judged: Mapping[Part, Tensor]) -> float:
    """|W X - W_d X|^2 / |W_d X|^2; |W - W_d|^2 / |W_d|^2 where no product is known."""
    parts = [(slice(start, stop), G) for (_, start, stop), G in judged.items()]
    if not parts:
        parts = [(slice(0, len(W_d)), torch.eye(W_d.shape[1], dtype=W_d.dtype, device=W_d.device)[None])]
    error = energy = 0.0
    for rows, G in parts:
        dense = W_d[rows].unflatten(0, (len(G), -1))
        change = W[rows].unflatten(0, (len(G), -1)) - dense
        error += float(((change @ G) * change).sum(dtype=torch.float64))
        energy += float(((dense @ G) * dense).sum(dtype=torch.float64))
    return max(error, 0.0) / energy if energy > 0 else 0.0


def fine(curve: Curve) -> Curve:
    """The curve on a fine grid, errors falling: log e linear in log d, and (1 - d)^2 above the last density."""
    falling = list(itertools.accumulate(curve, lambda before, at: [at[0], min(before[1], at[1])]))
    points: Curve = []
    steps = [i / POINTS for i in range(POINTS)]
    for (d, e), (d_next, e_next) in itertools.pairwise(falling):
        if d > 0 and e_next > 0:
            points += [[d * (d_next / d) ** i, e * (e_next / e) ** i] for i in steps]
        else:
            points.append([d, e])
    d, e = falling[-1]
    return points + [[d + i * (1 - d), e * (1 - i) ** 2] for i in steps]


def in_passes(problem: Problem, sites: Iterable[Site], memory: int) -> list[list[Site]]:
    """The sites in order, as many together as have matrices within `memory` bytes; one at least."""
    passes: list[list[Site]] = []
    taken = 0
    for site in sites:
        size = 0
        for part in set(site.source.values()):
            layer = problem.scope[part[0]]
            K = layer.total // layer.rows
            size += 3 * 4 * layer.groups * K * K
        if not passes or taken + size > memory:
            passes.append([])
            taken = 0
        passes[-1].append(site)
        taken += size
    return passes


class DenseStatistics(Statistics):
    """Statistics of the dense net, of one process; products are added while the pass runs: no inputs are kept."""

    def __init__(self, problem: Problem, site: Site) -> None:
        super().__init__(problem, site, inputs="dense", targets="dense")

    def collect_dense(self) -> int:
        """Push all calibration batches through the net, each as far as the last product; samples pushed."""
        for k in range(self.problem.inputs().batches):
            batch, samples = self.problem.inputs().batch(k)

            def visit(product: Product, k: int = k, samples: int = samples) -> None:
                self._add(part_of(product), [product], [product], k, samples)

            push(self.problem, self.site, {}, batch, visit)
            self.forward += samples
        return self.forward

    def parts(self, name: str) -> dict[Part, Gram]:
        """The Grams of a layer's parts; none where a sum overflowed."""
        source = {part: self.site.source.get(part, part) for part in self.energy if part[0] == name}
        parts = {part: self.grams[first] for part, first in source.items() if first in self.grams}
        sums = [tensor for gram in parts.values() for tensor in gram.halves]
        return parts if all(bool(torch.isfinite(tensor).all()) for tensor in sums) else {}
