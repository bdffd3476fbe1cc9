"""The terminal: lines for people, on standard error, and JSON for programs, on standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from allot.report.progress import EVERY, Display, Lasting, shown
from allot.run.activity import activity

# a log has no width: its tables are not squeezed into 80 columns
people = Lasting(
    stderr=True, width=None if (sys.stderr and sys.stderr.isatty()) or "COLUMNS" in os.environ else 120,
)  # fmt: skip


@contextmanager
def progress(*, lines: bool = False) -> Iterator[Display]:
    """What a run is doing, on standard error: see `Display`; what models and data print meanwhile goes there too.

    Args:
        lines: whether outcomes of stages, and phases of the finish with their seconds, are lines of their own.
    """
    with redirect_stdout(sys.stderr), shown(people, every=EVERY, lines=lines) as display:
        yield display


@contextmanager
def loading() -> Iterator[None]:
    """While open, torch is imported, and a bar says so: that takes seconds."""
    with progress(), activity("loading PyTorch"):
        yield


@contextmanager
def notes() -> Iterator[None]:
    """While open, every warning of the library is printed, in one line."""
    handler = _Notes(logging.WARNING)
    log = logging.getLogger("allot")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Notes(logging.Handler):
    """Prints each message once, also where it comes twice, like that of a file in two data sets."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        if line not in self.lines:
            self.lines.add(line)
            say(f"note: {line}")


def say(line: str) -> None:
    """One line for people, whole even where the terminal is narrow."""
    people.print(line, highlight=False, markup=False, soft_wrap=True)


def say_error(message: str) -> None:
    """One line about an error; of several processes, the first one that meets an error prints."""
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        from allot.processes import first_to_report

        people.quiet = not first_to_report()
    people.print(f"error: {' '.join(message.split())}", style="red", highlight=False, markup=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """One object on standard output."""
    if people.quiet:
        return
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
    sys.stdout.flush()  # a closed pipe raises here, not while Python shuts down
