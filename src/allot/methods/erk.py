"""Erdos-Renyi-Kernel (Mocanu et al. 2018; Evci et al., RigL, ICML 2020, appendix).

    d_l = c * sum(shape_l) / prod(shape_l)          shape_l = (C_out, C_in/groups, k_1, ..) as the weight is stored

Small and narrow layers keep more. c is the largest price that the budget allows, with d_l cut at 1 (`Budget.project`):
the cut layers stay dense and the others share what is left, which is what RigL's loop over dense layers arrives at.
"""

from __future__ import annotations

from allot.run import Problem


def erk(problem: Problem) -> dict[str, float]:
    """Density in proportion to sum(shape) / prod(shape)."""
    return {layer.name: sum(layer.shape) / layer.total for layer in problem.scope}
