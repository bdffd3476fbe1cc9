"""A given allocation, replayed: a table from an earlier run, edited by hand or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from allot.run import Problem


@dataclass(frozen=True)
class Given:
    """Densities in the proportions of `wished`; where they use the budget up already, exactly these.

    Args:
        wished: name -> density of all layers in scope, or of all groups of channels.
    """

    wished: Mapping[str, float]

    def __call__(self, problem: Problem) -> Mapping[str, float]:
        """The wish, for `Rule`."""
        return self.wished
