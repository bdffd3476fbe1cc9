"""Costs of an allocation of channels and their gradients, from tables of the budget's formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allot.budget.channels import channel_budget
from allot.run.problem import Problem


class Costs:
    """F / B of every limit and its gradient by alpha, fast: all tensors of the model at once.

    Args:
        room: how many times every budget may be used.

    A tensor's size is w prod_d (f_d + R_d n), n = alpha C: w, f and R are the rows of three tables.
    """

    def __init__(self, problem: Problem, *, room: float = 1.0) -> None:
        self.budget = budget = channel_budget(problem.budget)
        self.names = [group.name for group in problem.scope.groups]
        index = {group.name: k for k, group in enumerate(problem.scope.groups)}
        self.total = torch.tensor([group.total for group in problem.scope.groups], dtype=torch.float64)
        extents = [e for e in budget.extents if e.counted or any(limit.kind == "bytes" for limit in budget.limits)]
        moving = [[dim for dim in extent.dims if dim[1]] for extent in extents]
        width = max(map(len, moving))
        self.fixed = torch.ones(len(extents), width, dtype=torch.float64)
        self.places = torch.zeros(len(extents), width, len(index), dtype=torch.float64)
        constant = torch.ones(len(extents), dtype=torch.float64)
        for i, extent in enumerate(extents):
            constant[i] = extent.rest * math.prod(fixed for fixed, groups in extent.dims if not groups)
            for d, (fixed, groups) in enumerate(moving[i]):
                self.fixed[i, d] = fixed
                for name, each in groups:
                    self.places[i, d, index[name]] += each
        self.weights: list[tuple[Tensor | None, float, float]] = []
        for limit in budget.limits:
            if limit.kind == "latency":  # read off its own tables
                self.weights.append((None, 0.0, room * max(limit.ceiling, 1)))
                continue
            bytes_ = limit.kind == "bytes"
            price = [
                {"bytes": e.place_bytes, "macs": float(e.uses), "params": 1.0, "sparsity": 1.0}[limit.kind]
                for e in extents
            ]
            counted = [float(bytes_ or e.counted) for e in extents]
            weight = constant * torch.tensor(price, dtype=torch.float64) * torch.tensor(counted, dtype=torch.float64)
            self.weights.append((weight, budget.header if bytes_ else 0, room * max(limit.ceiling, 1)))

    def __call__(self, alpha: Tensor) -> list[tuple[float, Tensor]]:
        """(F / B, its gradient) of every limit."""
        sizes = self.fixed + self.places @ (alpha * self.total)  # [tensors, dims]
        costs = []
        for weight, header, ceiling in self.weights:
            if weight is None:
                time, by_group = self.budget.time(dict(zip(self.names, (alpha * self.total).tolist(), strict=True)))
                by_index = torch.tensor([by_group[name] for name in self.names], dtype=torch.float64)
                costs.append((time / ceiling, by_index * self.total / ceiling))
                continue
            slope = torch.zeros_like(alpha)
            for d in range(sizes.shape[1]):
                others = sizes[:, [j for j in range(sizes.shape[1]) if j != d]].prod(1)
                slope += (weight * others) @ self.places[:, d]
            costs.append(((header + float(weight @ sizes.prod(1))) / ceiling, slope * self.total / ceiling))
        return costs

    def fits(self, alpha: Tensor) -> bool:
        return all(cost <= 1 for cost, _ in self(alpha))
