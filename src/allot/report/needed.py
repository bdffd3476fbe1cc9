"""What a report has to hold, said in one line where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jinja2

from allot.errors import UsageError


@contextmanager
def needed(run: object) -> Iterator[None]:
    """While open, what report.json of `run` lacks, or holds in another form, is one clear error.

    Raises:
        UsageError: it does.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.UndefinedError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"report.json of {run} does not hold what a report needs ({what}).") from error
