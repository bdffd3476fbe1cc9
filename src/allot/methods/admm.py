"""ADMM: each layer's mask and weights from its second-order statistics, layer after layer.

Boza, *Fast and Effective Weight Update for Pruned Large Language Models* (TMLR 2024, arXiv:2401.02938), for any layer
and any pattern. Meng et al., *ALPS* (NeurIPS 2024), solves the same problem; Frantar and Alistarh, *SparseGPT* (ICML
2023), goes through the columns once. Inputs X_s come from the net that is sparse up to this layer, targets from the
dense net:

    min over W with k nonzeros    |W X_s - W_d X_d|^2 + damping             W_d dense weight, [rows, K]
    G = X_s X_s^T,  C = X_d X_s^T                                           sums over all positions
    n = sqrt(diag G);   A = G / (n n^T) + delta I;   Y = (W_d C) / n + delta W_d n
    R = (A + rho I)^-1,   rho = 1 + delta, the diagonal of A
    X = W_d n;   U = 0
    t = 0 .. T-1:   while t < 3/4 T:  M = the k_t best of |X + U|,  k_t = k + (all - k) (1 - (t+1) / (3/4 T))^3
                    Z = (X + U) M;   U = U + X - Z;   X = (Y + rho (Z - U)) R
    small layers: M after exchanges of two weights, until none lowers the error (layerwise/swaps.py)
    W = (X + U) M, then conjugate gradients on the mask M, then divided by n

Where a batch norm follows, it takes the mean of every output away: X_s and X_d are taken minus their means, and the
norm's running mean becomes that of the sparse net's outputs.

Every row is a problem of its own but for M. No gradient, no step size. The variances of batch norms stay right, because
outputs before them match the dense net's again.

Differences from the paper's code:
    targets     outputs of the dense net for the dense net's inputs; there: of the dense weights for the inputs at hand
    delta       measured: the share by which halves of the data disagree about G (`damping`); there: .01 of the mean
    pattern     any; k_t rises and falls in the steps of the pattern
    finish      exchanges in small layers, conjugate gradients; there: more iterations with the mask fixed
    layers      convolutions, attention, recurrent layers, experts; there: linear layers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from allot.errors import UsageError, check_number
from allot.methods.layerwise.grams import Gram, Statistics
from allot.methods.layerwise.quadratic import Quadratic, alternated, refined, selects
from allot.methods.layerwise.sites import DenseProducts, Part, Site, sites_of
from allot.methods.layerwise.streamed_block import FLAG
from allot.methods.layerwise.swaps import exchanged, is_small
from allot.network.hooks import watched_norms
from allot.network.layers import Layer
from allot.run.patterns import Channels
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


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
        views: of each input that is a picture, how many random crops enter the statistics beside it.
    Raises:
        UsageError: a value out of its range.
    State:
        sites: of `Site.to_state`: layers that are repaired together, in order of execution; empty before the first
            step.
        norm_means: layer -> running mean of the batch norm that its output goes into.
        tensors: parameter or buffer -> refitted value.
        masks: layer -> mask, bool.
        errors: layer -> relative squared error of its outputs on the calibration inputs.
    """

    iterations: int = 24
    refinement: int = 20
    damping: float | None = None
    inputs: str = "sparse"
    targets: str = "dense"
    views: int = 0

    _live: ClassVar[Any] = None
    role = "repair"
    needs_data = True
    parallel = True
    streams = "dense"
    by_blocks = True
    chooses_masks = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_live", {})  # the run of the last step, and what is kept of the dense net in it
        check_number("iterations", self.iterations, 1, whole=True)
        check_number("refinement", self.refinement, 0, whole=True)
        check_number("views", self.views, 0, whole=True)
        if self.damping is not None:
            check_number("damping", self.damping, 0)
        for option, value in (("inputs", self.inputs), ("targets", self.targets)):
            if value not in ("sparse", "dense"):
                raise UsageError(f"{option}={value!r}: sparse or dense is accepted.")

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """Nothing refitted; the first step finds the order of layers."""
        state: State = {"step": 0, "steps": 1 + len(problem.scope)}
        return state | {"sites": [], "norm_means": {}, "tensors": {}, "masks": {}, "errors": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """First the order in which layers run; then one site: the layers that read the same inputs.

        Layers whose inputs are too large to be squared, or that no batch reaches, stay as they were selected.
        """
        if not state["step"]:
            after: dict[str, set[str]] = {}
            with watched_norms(problem.model, problem.scope, after):
                state["sites"] = [site.to_state() for site in sites_of(problem)]
            state["norm_means"] = _norm_means(problem, after)
            state |= {"step": 1, "steps": 1 + len(state["sites"])}
            return {"forward": 1 + len(problem.inputs().positions(0)), "backward": 0}
        sites = [Site.from_state(site) for site in state["sites"]]
        site, dense = sites[state["step"] - 1], self._dense_products(problem, state, sites)
        flags = {name: tensor for name, tensor in candidate.tensors.items() if name == FLAG}
        statistics = Statistics(problem, site, inputs=self.inputs, targets=self.targets, dense=dense)
        statistics.collect(flags | state["tensors"])
        dense.leave(site)
        state["step"] += 1
        metrics: Metrics = {"forward": statistics.forward, "backward": 0}
        if statistics.finite:
            for name in site.layers:
                self._solve(problem, candidate, state, problem.scope[name], statistics)
            metrics["error"] = max((state["errors"].get(name, 0.0) for name in site.layers), default=0.0)
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        self._live.clear()
        scope = {layer.name for layer in problem.scope}
        tensors = {name: tensor for name, tensor in candidate.tensors.items() if name == FLAG}
        tensors |= {name: t for name, t in candidate.tensors.items() if name in scope and name not in state["tensors"]}
        left = [layer.name for layer in problem.scope if layer.name not in state["errors"]]
        diagnostics = {**candidate.diagnostics, "admm": {"errors": dict(state["errors"]), "not_repaired": left}}
        masks = {**candidate.masks, **state["masks"]}
        return replace(candidate, masks=masks, tensors=tensors | state["tensors"], diagnostics=diagnostics)

    def _dense_products(self, problem: Problem, state: State, sites: list[Site]) -> DenseProducts:
        """The reader of the dense net, which the steps of one run share."""
        live: dict[str, Any] = self._live
        if live.get("problem") is not problem or live.get("state") is not state:
            live.clear()
            live.update(problem=problem, state=state, products=DenseProducts(problem, sites))
        products: DenseProducts = live["products"]
        return products

    def _solve(
        self, problem: Problem, candidate: Candidate, state: State, layer: Layer, statistics: Statistics
    ) -> None:
        """Put one layer's weight, mask and relative error into the state, and the mean of the norm after it."""
        dense = problem.dense[layer.name]
        W_d = layer.matrix(dense)
        source = statistics.site.source
        parts = {part: statistics.grams[source.get(part, part)] for part in statistics.energy if part[0] == layer.name}
        if not parts:  # no batch reached it
            return
        W_d = W_d.to(next(iter(parts.values())).cross.dtype)
        energy = float(sum(statistics.energy[part] for part in parts))
        norm_mean = state["norm_means"].get(layer.name)
        if norm_mean:
            energy -= sum(_energy_of_mean(W_d, part, gram) for part, gram in parts.items())
        grams = {part: gram.centred() if norm_mean else gram for part, gram in parts.items()}
        quadratic = Quadratic(W_d, grams, self.damping)
        if isinstance(problem.pattern, Channels):
            X, mask = W_d * quadratic.n, layer.matrix(candidate.masks[layer.name])
        else:
            kept, select = candidate.allocation.kept[layer.name], selects(problem.pattern, layer)
            X, mask = alternated(quadratic, select, kept, self.iterations)
            if is_small(layer, problem.pattern):
                magnitude = (W_d * quadratic.n).abs()
                starts = [mask, select(magnitude, kept), select(-magnitude, kept)]
                mask = exchanged(quadratic.A_of_rows(), quadratic.Y, starts, layer, problem.pattern)
        W = refined(quadratic, X, mask, self.refinement) / quadratic.n
        state["errors"][layer.name] = quadratic.error(W, energy)
        state["tensors"][layer.name] = layer.unmatrix(W).to(dense.dtype).contiguous()
        state["masks"][layer.name] = layer.unmatrix(mask).contiguous()
        if norm_mean:
            moved = problem.dense[norm_mean].clone()
            for (_, first, last), gram in parts.items():
                mean, dense_mean = gram.means
                change = _outputs(W[first:last], mean) - _outputs(W_d[first:last], dense_mean)
                moved[first:last] += change.to(moved.dtype)
            state["tensors"][norm_mean] = moved


def _norm_means(problem: Problem, after: Mapping[str, set[str]]) -> dict[str, str]:
    """Layer -> running mean of the one batch norm that its output goes into."""
    buffers = dict(problem.model.named_buffers())
    means = {name: [f"{norm}.running_mean".lstrip(".") for norm in norms] for name, norms in after.items()}
    return {
        name: buffer[0]
        for name, buffer in means.items()
        if len(buffer) == 1 and buffer[0] in buffers and not problem.scope[name].aliases
    }


def _energy_of_mean(W_d: Tensor, part: Part, gram: Gram) -> float:
    outputs = _outputs(W_d[part[1] : part[2]], gram.means[1])
    return sum(gram.positions) * float(outputs.square().sum(dtype=torch.float64))


def _outputs(rows: Tensor, mean: Float[Tensor, "groups K"]) -> Float[Tensor, " rows"]:
    """The outputs of these rows for one column of inputs a group."""
    return (rows.unflatten(0, (len(mean), -1)) * mean[:, None]).sum(2).flatten()
