"""Every error that allot raises on purpose; each carries the exit code that the command line returns for it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class AllotError(Exception):
    """What all of allot's errors have in common: a one-line message and `exit_code`."""

    exit_code = 2


class UsageError(AllotError, ValueError):
    """What was passed in cannot be used: a name, a file, a shape, a combination."""


class CorruptSample(UsageError):
    """A sample that cannot be read, as a broken file of a data set."""

    _WAY_OUT = ": take it away, or leave such samples out with --skip-corrupt (allot.Readable(dataset) in Python)."

    @classmethod
    def of(cls, what: str) -> CorruptSample:
        """The error for `what`: which sample, and why."""
        return cls(what + cls._WAY_OUT)

    @property
    def what(self) -> str:
        """Which sample, and why, without what to do about it."""
        return str(self).removesuffix(self._WAY_OUT)


class BudgetError(AllotError, ValueError):
    """The budget makes no sense, or nothing in scope can meet it."""

    exit_code = 3


class PatternError(BudgetError):
    """The pattern does not fit a layer, or cannot keep what it is asked to keep."""


class VerificationError(AllotError):
    """A file does not hold what its certificate promises."""

    exit_code = 4


class GuaranteeMissed(VerificationError):
    """A finished run misses a guarantee on its quality, like max_drop.

    Args:
        message: by how much.
        result: the finished `Result`; saved, if the run has a directory.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class Lost(AllotError):
    """Another process of the same run ended."""

    exit_code = 1


class Stopped(AllotError):
    """The run was asked to stop; its progress is saved and the same command resumes.

    Args:
        message: what was stopped where.
        saved: whether anything is.
    """

    exit_code = 130

    def __init__(self, message: str, *, saved: bool = True) -> None:
        super().__init__(message)
        self.saved = saved


def unknown(what: str, name: str, accepted: Iterable[str]) -> UsageError:
    """The error for a name that is not in a list, with the nearest name first."""
    names = sorted(accepted)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return UsageError(f"unknown {what} {name!r}{hint} Accepted: {', '.join(names) or 'none'}.")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing.

    >>> first_line(ValueError("no such layer")), first_line(KeyError())
    ('no such layer', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def with_cause(error: BaseException) -> str:
    """What an error says, and the innermost error that it came from, where that says something else.

    >>> try:
    ...     raise RuntimeError("no model") from OSError("disk full")
    ... except RuntimeError as error:
    ...     with_cause(error)
    'no model (OSError: disk full)'
    """
    root, seen = error, {id(error)}
    while (deeper := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
        if id(deeper) in seen:
            break
        seen.add(id(deeper))
        root = deeper
    said, cause = first_line(error), first_line(root)
    return said if cause in said else f"{said} ({type(root).__name__}: {cause})"


def check_flag(name: str, value: object) -> None:
    """Raises:
    UsageError: `value` is neither True nor False.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name}={value!r}: true or false is accepted.")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raises:
    UsageError: `value` is no number (no whole number) from `low` to `high`.
    """
    kind = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or value == math.inf:
        accepted = f"{low} or more" if high == math.inf else f"from {low} to {high}"
        raise UsageError(f"{name}={value!r}: a {'whole ' if whole else ''}number, {accepted}, is accepted.")
