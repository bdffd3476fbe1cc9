"""Budgets that are met with much of them unused, because bounds or the pattern allow no more."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from allot.budget.model_budget import ModelBudget
from allot.budget.units import unit

log = logging.getLogger("allot")
MUCH = 0.2  # a larger share of the tightest limit that is unused is reported


def unused(rows: Sequence[Mapping[str, Any]]) -> float:
    """The share of the tightest limit that is unused, of the rows of `ModelBudget.rows`; 0 without rows.

    >>> unused([{"kind": "macs", "limit": 100, "achieved": 60}, {"kind": "sparsity", "limit": 0.5, "achieved": 0.75}])
    0.4
    """
    return min((1 - _used(row) for row in rows), default=0.0)


def warn_unused(budget: ModelBudget, kept: Mapping[str, int]) -> None:
    """Log a warning where these counts leave more than a fifth of every limit unused."""
    rows = budget.rows(kept)
    if unused(rows) <= MUCH:
        return
    row = max(rows, key=_used)
    amounts = f"{row['achieved']:,} of {row['limit']:,} {unit(row['kind'])}"
    if row["kind"] == "sparsity":
        amounts = f"a sparsity of {row['achieved']:.4f} instead of {row['limit']}"
    log.warning(
        "the budget %s=%s is met with %.0f %% of it unused (%s): bounds (--max-density, --exclude) or the pattern "
        "allow no more. Loosen them, or lower the budget.",
        row["kind"], row["asked"], 100 * unused(rows), amounts,
    )  # fmt: skip


def _used(row: Mapping[str, Any]) -> float:
    limit, achieved = float(row["limit"]), float(row["achieved"])
    return (1 - achieved) / (1 - limit) if row["kind"] == "sparsity" else achieved / limit
