"""Commands score on few pictures of the zoo's test split: on all 3,000, most of their time would go there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allot.sources import load

FEW = 64


def few_of_the_zoo(opened: Callable[..., Any] = load._open_data) -> Callable[..., Any]:
    """`load._open_data` that gives the first pictures of a test split."""

    def shortened(spec: str, source: Any, split: str) -> Any:
        data = opened(spec, source, split)
        return type(data)(*data[:FEW]) if spec.startswith("zoo:") and split == "test" else data

    return shortened


def score_on_few() -> None:
    """For a whole process."""
    load._open_data = few_of_the_zoo()
