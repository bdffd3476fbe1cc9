"""Every error that allot raises on purpose; each carries the exit code that the command line returns for it."""

from __future__ import annotations

import difflib
import dis
import math
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any


class AllotError(Exception):
    """What all of allot's errors have in common: a one-line message and `exit_code`."""

    exit_code = 2


class UsageError(AllotError, ValueError):
    """What was passed in cannot be used: a name, a file, a shape, a combination."""


class ModelFailed(UsageError):
    """The model raised on its inputs; the cause is what it raised."""


class CannotWrite(UsageError):
    """A file cannot be written, as where the disk is full."""


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


class InvalidBudget(BudgetError, UsageError):
    """Text that is no budget, or a value outside of its definition, like sparsity=1.5, for any model."""

    exit_code = 2


class InvalidPattern(PatternError, UsageError):
    """Text that is no pattern, or numbers outside of its definition, like 4:2, for any model."""

    exit_code = 2


class NotFinite(AllotError):
    """A loss, a gradient or a weight became nan or infinite."""


class NothingInScope(BudgetError, UsageError):
    """The model has no weight that can be pruned, or the rules leave none."""


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


@contextmanager
def users_errors(doing: str) -> Iterator[None]:
    """While open, what the user's model or data raise leaves as the user's own exception, with a note.

    `ModelFailed` from a `raise` in the model's code is replaced by that exception, and becomes its note; from an error
    of torch about inputs it stays.

    Args:
        doing: the function of allot that is running, for the note.

    >>> with users_errors("allot.prune"):
    ...     raise KeyError("label")
    Traceback (most recent call last):
    KeyError: 'label'
    in allot.prune
    """
    own = None
    try:
        yield
    except AllotError as error:
        failed: BaseException | None = error
        while failed and not isinstance(failed, ModelFailed):  # the error of a stage has that of the model as its cause
            failed = failed.__cause__
        own = failed.__cause__ if failed else None
        if own is None or not _is_raised_by_user(own):
            raise
        _note(own, f"in {doing}: {error}")
    except Exception as error:
        _note(error, f"in {doing}")
        raise
    if own:  # outside of the handler: the error of allot is not its context
        raise own


def _note(error: BaseException, text: str) -> None:
    """Add the note, unless a function of allot further inside has added one."""
    if not any(note.startswith("in ") for note in getattr(error, "__notes__", ())):
        error.add_note(text)


def in_one_line(error: BaseException) -> str:
    r"""An exception of the user's code: its type, what it says, where it was raised, and its notes.

    >>> in_one_line(ValueError("no such file\nor directory"))
    'ValueError: no such file or directory'
    """
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the class is the user's
        text = ""
    place = raised_at(error)
    if "Traceback (most recent call last)" in text:  # of a worker of a DataLoader: the exception comes last
        places = [match for match in _PLACE.findall(text) if _is_users(match[0])]
        place = "{}:{}, in {}".format(PurePath(places[-1][0]).name, *places[-1][1:]) if places else place
        text = text.rpartition(f"\n{type(error).__name__}: ")[2]
    says = f"{type(error).__name__}: {' '.join(text.split())}".removesuffix(": ")
    details = [place, *getattr(error, "__notes__", ())]
    return f"{says} ({'; '.join(filter(None, details))})" if any(details) else says


def raised_at(error: BaseException) -> str:
    """The last line of the user's code that an exception passed through, like "net.py:12, in forward"; or ""."""
    users = [entry for entry in _entries(error) if _is_users(entry.tb_frame.f_code.co_filename)]
    if not users:
        return ""
    code = users[-1].tb_frame.f_code
    return f"{PurePath(code.co_filename).name}:{users[-1].tb_lineno}, in {code.co_name}"


def _entries(error: BaseException) -> Iterator[TracebackType]:
    entry = error.__traceback__
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _is_raised_by_user(error: BaseException) -> bool:
    """Whether a `raise` (or `assert`) in the user's code raised it, and no call from there into torch or Python."""
    *_, last = [None, *_entries(error)]
    if last is None or not _is_users(last.tb_frame.f_code.co_filename):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


_ALLOT, _STANDARD = Path(__file__).parent, Path(sysconfig.get_path("stdlib"))
_INSTALLED = ("site-packages", "dist-packages")
_BETWEEN = ("torch", "numpy", "jaxtyping", "typer", "click")  # packages between allot and the user's code
_PLACE = re.compile(r'File "(.+)", line (\d+), in (\S+)')


def _is_users(file: str) -> bool:
    """Whether a source file is neither of allot nor of Python, torch or numpy."""
    path = PurePath(file)
    if file.startswith("<") or path.is_relative_to(_ALLOT):
        return False
    folder = next((i for i, part in enumerate(path.parts) if part in _INSTALLED), None)
    return path.parts[folder + 1] not in _BETWEEN if folder else not path.is_relative_to(_STANDARD)


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
