"""The scores of a run, dense beside sparse, and the guarantees on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from allot.errors import UsageError
from allot.pruning.request import Request
from allot.run.evaluate import Score
from allot.run.problem import Candidate, Problem
from allot.run.store import Log


def compared_scores(
    problem: Problem, candidate: Candidate, score_of: Callable[..., Score], dense: Score
) -> dict[str, Any]:
    """`scores` of report.json: `{metric, dense, sparse, samples, nll}` and what else the metric says."""
    sparse = score_of(problem.model, tensors=candidate.effective(problem))
    scores: dict[str, Any] = {
        "metric": dense.metric,
        "dense": dense.score,
        "sparse": sparse.score,
        "samples": dense.samples,
        "nll": {"dense": dense.nll, "sparse": sparse.nll},
    }
    if dense.perplexity is not None:
        scores["perplexity"] = {"dense": dense.perplexity, "sparse": sparse.perplexity}
    if dense.values:
        if dense.values.keys() != sparse.values.keys():
            names = f"{', '.join(dense.values)} for the dense model and {', '.join(sparse.values)} for the sparse one"
            raise UsageError(f"the metric returns {names}: the same names are needed.")
        pairs = {name: {"dense": value, "sparse": sparse.values[name]} for name, value in dense.values.items()}
        scores |= {"values": pairs, "lower_is_better": list(dense.lower)}
    return scores | ({"unreadable": dense.unreadable} if dense.unreadable else {})


def is_score_of(scores: Mapping[str, Any] | None, dense: Score | None) -> bool:
    """Whether the scores of a report were taken with the data and the metric that gave this dense score."""
    if scores is None or dense is None:
        return False
    values = {name: pair["dense"] for name, pair in scores.get("values", {}).items()}
    kept = scores["metric"], scores["dense"], scores.get("nll", {}).get("dense"), values
    return kept == (dense.metric, dense.score, dense.nll, dict(dense.values))


def guarantees(request: Request, scores: Mapping[str, Any] | None, log: Log) -> tuple[dict[str, Any], ...]:
    """A row `{kind, asked, limit, found, met, text}` for every guarantee on the quality of the result.

    Raises:
        UsageError: a guarantee that does not fit the score, or on fidelity where nothing was compared.
    """
    rows = []
    if request.max_drop is not None and scores is not None:
        lower = scores["metric"] in scores.get("lower_is_better", ())
        rows.append(request.max_drop.verdict(scores["metric"], scores["dense"], scores["sparse"], lower=lower))
    if request.min_fidelity is not None:
        rows.append(request.min_fidelity.verdict(log.watch, log.fidelity[-1] if log.fidelity else None))
    return tuple(rows)
