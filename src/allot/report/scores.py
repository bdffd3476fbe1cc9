"""Scores in words: top-1 as a share, the numbers of a user's metric as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Scores = Mapping[str, Any]  # `scores` of report.json

FAR_BELOW = 0.9  # of the dense score, below which a score is called bad
FAR_ABOVE = 1.5  # times the dense score, above which a score is bad where lower is better


def is_share(scores: Scores) -> bool:
    """Whether the score is a share of what was right: top-1; a user's metric has a unit of its own."""
    return "values" not in scores


def lower_is_better(scores: Scores, name: str | None = None) -> bool:
    """Whether lower is better for a number of a metric; None: for the headline score."""
    return (name or scores["metric"]) in scores.get("lower_is_better", ())


def score_text(value: float, scores: Scores) -> str:
    """A score as people read it.

    >>> score_text(0.95, {"metric": "top1"}), score_text(21.3, {"metric": "psnr", "values": {}})
    ('95.0 %', '21.3')
    """
    return f"{100 * value:.1f} %" if is_share(scores) else f"{value:,.4g}"


def change_text(dense: float, sparse: float, scores: Scores) -> str:
    """How far the sparse score is from the dense one.

    >>> change_text(0.9, 0.8, {"metric": "top1"}), change_text(20.0, 21.0, {"metric": "psnr", "values": {}})
    ('-10.00 points', '+1 (+5.0 %)')
    """
    if is_share(scores):
        return f"{100 * (sparse - dense):+.2f} points"
    share = f" ({100 * (sparse - dense) / abs(dense):+.1f} %)" if dense else ""
    return f"{sparse - dense:+,.4g}{share}"


def is_far_off(scores: Scores | None) -> bool:
    """Whether the sparse score is so much worse than the dense one that nobody should overlook it."""
    if scores is None:
        return False
    dense, sparse = scores["dense"], scores["sparse"]
    if lower_is_better(scores):
        return not sparse <= dense * (FAR_ABOVE if dense >= 0 else 1 / FAR_ABOVE)
    return not sparse >= dense * (FAR_BELOW if dense >= 0 else 1 / FAR_BELOW)
