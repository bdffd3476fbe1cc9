"""Allocations by a rule: one function of the problem, with nothing to learn. The controls of every comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from allot.methods.training.selection import ranked_together
from allot.network.kinds import EXPERTS
from allot.run.problem import Problem
from allot.run.scores import lamp_score


def uniform(problem: Problem) -> dict[str, float]:
    """The same density everywhere: d_l = c. Uniform is the control of every comparison."""
    return {term.name: 1.0 for term in problem.budget.terms}


def erk(problem: Problem) -> dict[str, float]:
    """Density in proportion to sum(shape) / prod(shape): Erdos-Renyi-Kernel.

        d_l = c * sum(shape_l) / prod(shape_l)          shape_l = (C_out, C_in/groups, k_1, ..) as the weight is stored

    Small and narrow layers keep more; a stack of experts counts as one expert, with its shape. c is the largest price
    that the budget allows, with d_l cut at 1 (`Budget.project`): the cut layers stay dense and the others share the
    rest of the budget, as after RigL's loop over dense layers. Mocanu et al. 2018; Evci et al., RigL, ICML 2020,
    appendix.
    """
    shapes = {layer.name: layer.shape[1:] if layer.kind in EXPERTS else layer.shape for layer in problem.scope}
    return {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Given:
    """Densities in the proportions of `wished`; where these use the budget up already, exactly these.

    So a table from an earlier run, edited by hand or not, is replayed.

    Args:
        wished: name -> density of all layers in scope, or of all groups of channels.
    """

    wished: Mapping[str, float]

    def __call__(self, problem: Problem) -> Mapping[str, float]:
        return self.wished


def lamp(problem: Problem) -> dict[str, float]:
    """Survivors of the global ranking by LAMP score (Lee et al., ICLR 2021).

        s_i = w_i^2 / sum_{j in l: |w_j| >= |w_i|} w_j^2

    The sum is the energy of the weights that remain when w_i is removed in ascending order: of the weights that are
    not smaller than w_i.
    """
    return _survivor_densities(problem, lamp_score)


def global_magnitude(problem: Problem) -> dict[str, float]:
    """Survivors of the global ranking by s_i = |w_i| (Han et al. 2015)."""
    return _survivor_densities(problem, lambda weight: weight.abs())


def global_normalised(problem: Problem) -> dict[str, float]:
    """Survivors of the global ranking by s_i = |w_i| / ||w_l||_2, POT's and FCPTS' L2-normalised allocation."""
    return _survivor_densities(problem, lambda weight: weight.abs() / weight.norm().clamp_min(1e-300))


def _survivor_densities(problem: Problem, score: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Densities of the layers when all weights of the net are ranked together; `Budget.counts` rounds them."""
    scores = {layer.name: score(problem.dense[layer.name].flatten().cpu().double()) for layer in problem.scope}
    kept = ranked_together(problem.budget, scores)
    return {layer.name: kept[layer.name] / layer.total for layer in problem.scope}
