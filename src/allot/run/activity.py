"""What a run is doing: said when it begins, to whoever shows it (`allot.report.progress`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

activities = logging.getLogger("allot.activities")


@dataclass(frozen=True)
class Activity:
    """Something that takes time, in the words of the user.

    Attributes:
        name: like "loading model" or "training (polish)".
        number, of: which stage of the run it is; 0 for what is no stage.
    """

    name: str
    number: int = 0
    of: int = 0


@contextmanager
def activity(name: str, number: int = 0, of: int = 0) -> Iterator[None]:
    """While open, `name` is what the run is doing; see `Activity`.

    >>> with activity("measuring MACs"):
    ...     pass
    """
    activities.debug("%s", name, extra={"activity": Activity(name, number, of)})
    try:
        yield
    finally:
        activities.debug("%s: done", name, extra={"activity": None})


def tell(outcome: str) -> None:
    """Say in a line what came of an activity."""
    activities.info("%s", outcome)
