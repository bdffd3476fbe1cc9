"""Uniform: every layer, or group of channels, keeps the same share. The control of every comparison."""

from __future__ import annotations

from allot.run import Problem


def uniform(problem: Problem) -> dict[str, float]:
    """The same density everywhere: d_l = c."""
    return {term.name: 1.0 for term in problem.budget.terms}
