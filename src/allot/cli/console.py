"""The terminal: lines for people, on standard error, and JSON for programs, on standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from allot.processes import first_to_report
from allot.run.driver import Progress as Step
from allot.run.driver import phases

# a log has no width: its tables are not squeezed into 80 columns
people = Console(stderr=True, width=None if sys.stderr.isatty() or "COLUMNS" in os.environ else 120)
EVERY = 30.0  # seconds between lines about progress where there is no terminal to draw a bar on


@contextmanager
def progress(*, finish: bool = False) -> Iterator[Callable[[Step], None]]:
    """A bar for each stage with the time left, on standard error; in a log, a line every `EVERY` seconds.

    What models and data print meanwhile goes to standard error too.

    Args:
        finish: whether each phase of the finish of a run is a line with its seconds.
    """
    columns = (
        TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[measure]}"),
    )  # fmt: skip
    quiet = not people.is_terminal or people.quiet
    bars = Progress(*columns, console=people, disable=quiet, redirect_stdout=False)
    with redirect_stdout(sys.stderr), bars, _phase_lines(bars) if finish else nullcontext():
        tasks: dict[str, TaskID] = {}
        reported = time.monotonic()

        def on_step(step: Step) -> None:
            nonlocal reported
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, total=step.steps, measure="")
            measure = next(
                (f"{name} {step.metrics[name]:.3g}" for name in ("loss", "error") if name in step.metrics), ""
            )
            bars.update(tasks[step.stage], completed=step.step, total=step.steps, measure=measure)
            if not people.is_terminal and time.monotonic() - reported >= EVERY:
                reported = time.monotonic()
                say(f"{step.stage}: {step.step:,} of {step.steps:,}{f', {measure}' if measure else ''}")

        yield on_step


@contextmanager
def _phase_lines(bars: Progress) -> Iterator[None]:
    """While open, a phase is a bar while it lasts, and a line when it has ended."""
    handler, level = _Phases(bars), phases.level
    phases.addHandler(handler)
    phases.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        phases.setLevel(level)
        phases.removeHandler(handler)


class _Phases(logging.Handler):
    def __init__(self, bars: Progress) -> None:
        super().__init__(logging.DEBUG)
        self.bars, self.tasks = bars, list[TaskID]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.DEBUG:
            self.tasks.append(self.bars.add_task(record.getMessage(), total=None, measure=""))
        else:
            self.bars.remove_task(self.tasks.pop())
            say(record.getMessage())


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
    people.quiet = not first_to_report()
    people.print(f"error: {' '.join(message.split())}", style="red", highlight=False, markup=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """One object on standard output."""
    if people.quiet:
        return
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
    sys.stdout.flush()  # a closed pipe raises here, not while Python shuts down
