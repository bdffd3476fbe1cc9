"""Uniform: every layer keeps the same share. The control of every comparison."""

from __future__ import annotations

from allot.run import Problem


def uniform(problem: Problem) -> dict[str, float]:
    """The same density everywhere: d_l = c."""
    return {layer.name: 1.0 for layer in problem.scope}
