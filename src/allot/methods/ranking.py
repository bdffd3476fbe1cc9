"""Allocation by ranking all weights of the net together and counting the survivors of each layer.

    k_l = #{i in layer l : s_i among the r highest scores of the net},   r as large as the budget allows

lamp (Lee et al., ICLR 2021):           s_i = w_i^2 / sum_{j in l: |w_j| >= |w_i|} w_j^2
global (Han et al. 2015):               s_i = |w_i|
global-normalised (POT's and FCPTS' L2-normalised allocation):  s_i = |w_i| / ||w_l||_2

LAMP divides by the energy of the weights that would still be there when w_i goes, in ascending order: these are the
ones not smaller than it. Equal scores go to the layer first by name, then to the lower index. Bounds of a layer cut
its k_l; what that frees or takes is made up by r, and the last rounding by `Budget.counts`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from allot.run import Problem
from allot.scores import lamp_score


def lamp(problem: Problem) -> dict[str, float]:
    """Survivors of the global ranking by LAMP score."""
    return _survivors(problem, "lamp", lamp_score)


def global_magnitude(problem: Problem) -> dict[str, float]:
    """Survivors of the global ranking by |w|."""
    return _survivors(problem, "global", lambda weight: weight.abs())


def global_normalised(problem: Problem) -> dict[str, float]:
    """Survivors of the global ranking by |w| over the norm of its layer."""
    return _survivors(problem, "global-normalised", lambda weight: weight.abs() / weight.norm().clamp_min(1e-300))


def _survivors(problem: Problem, name: str, score: Callable[[Tensor], Tensor]) -> dict[str, float]:
    layers = sorted(problem.scope, key=lambda layer: layer.name)

    def sorted_owners() -> Tensor:
        scores = [score(problem.dense[layer.name].flatten().cpu().double()) for layer in layers]
        owner = torch.repeat_interleave(
            torch.arange(len(layers), dtype=torch.int32), torch.tensor([layer.total for layer in layers])
        )
        return owner[torch.cat(scores).argsort(descending=True, stable=True)]

    ranked = problem.once(name, sorted_owners, seeded=False)  # [N], the layer of each weight, best weight first

    def counts(r: int) -> dict[str, int]:
        kept = torch.bincount(ranked[:r], minlength=len(layers)).tolist()
        return {layer.name: k for layer, k in zip(layers, kept, strict=True)}

    low, high = 0, len(ranked)
    while low < high:
        r = (low + high + 1) // 2
        low, high = (r, high) if problem.budget.fits(problem.budget.clip(counts(r))) else (low, r - 1)
    kept = problem.budget.clip(counts(low))
    return {layer.name: kept[layer.name] / layer.total for layer in layers}
