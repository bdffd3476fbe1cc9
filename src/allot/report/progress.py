"""A run while it lasts: a bar for the run and one for the stage; in a log, a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from allot.run.activity import Activity, activities

if TYPE_CHECKING:
    from rich.progress import Progress

    from allot.run.driver import Progress as Step

EVERY = 30.0  # seconds between two lines of a log
FIRST = 10.0  # seconds until the first one
_MEASURES = ("loss", "error")
_TITLES = {"measure": "timing layers", "evaluate": "scoring"}  # of steps that belong to no activity
_phases = logging.getLogger("allot.phases")  # of the finish of a run, see `allot.run.driver.phase`
_shown: list[Display] = []  # the display that is open, if any


class Lasting(Console):
    """A console that falls silent when nobody reads it any more; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """What a run is doing, on a console; call it with every `Progress` of the driver.

    Args:
        console: where to; bars if it is a terminal or a notebook, else lines.
        every: seconds between two lines.
        lines: whether outcomes of stages, and phases of the finish with their seconds, are lines of their own.
    """

    def __init__(self, console: Console, *, every: float = EVERY, lines: bool = False) -> None:
        self.console, self.every, self.lines = console, every, lines
        self.drawn = (console.is_terminal or console.is_jupyter) and not console.quiet
        self.bars = _bars(console, drawn=self.drawn)
        self.run = self.bars.add_task("", total=None, visible=False, text="")
        self.stage = self.bars.add_task("", total=None, visible=False, text="")
        self.open: list[str] = []  # names of the activities that last, the innermost last
        self.next_line = time.monotonic() + min(FIRST, every)
        self.since: tuple[float, int] | None = None  # when the stage's first step was seen, and its number
        self.place = (0, 0)  # of the stage in the run
        self.outer = False  # whether the bar of the run counts runs of a sweep

    def begin(self, activity: Activity) -> None:
        """An activity begins."""
        self.open.append(activity.name)
        self.since = None
        self._draw_new(activity.name)
        if activity.of:
            self.place = activity.number, activity.of
            self._draw_run(0.0)
        self.bars.refresh()  # what is short is seen all the same
        self._line(activity.name)

    def end(self) -> None:
        """The innermost activity ended."""
        if self.open:
            self.open.pop()
        self.since = None
        self._draw_new(self.open[-1] if self.open else "")

    def whole(self, title: str, done: int, of: int) -> None:
        """Several runs: `done` of them are finished, and `title` says which one runs."""
        self.outer = True
        self.bars.update(
            self.run, description=title, completed=done, total=of, visible=True, text=f"run {done + 1} of {of}"
        )
        if not self.drawn:
            self.say(f"run {done + 1} of {of}: {title}")

    def __call__(self, step: Step) -> None:
        now, title = time.monotonic(), self.open[-1] if self.open else _TITLES.get(step.stage, step.stage)
        if self.since is None or step.step <= self.since[1]:
            self.since = now, step.step
        left = _time_left(now - self.since[0], step.step - self.since[1], step.steps - step.step)
        measure = next((f"{name} {step.metrics[name]:.3g}" for name in _MEASURES if name in step.metrics), "")
        counts = f"{step.step:,}/{step.steps:,}"
        self._draw(title, step.step, step.steps, ", ".join(filter(None, (counts, measure, left))))
        self._draw_run(step.step / max(step.steps, 1))
        told = f"{step.step:,} of {step.steps:,}"
        self._line(f"{title}: {', '.join(filter(None, (told, measure, left)))}")

    def say(self, line: str) -> None:
        """A line above the bars."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _draw(self, title: str, done: int = 0, of: int | None = None, text: str = "") -> None:
        self.bars.update(self.stage, description=title, completed=done, total=of, text=text, visible=bool(title))

    def _draw_new(self, title: str) -> None:
        self.bars.reset(self.stage, total=None, description=title, text="", visible=bool(title))

    def _draw_run(self, share: float) -> None:
        number, of = self.place
        if of and not self.outer:
            self.bars.update(
                self.run, description="run", completed=number - 1 + share, total=of, visible=True,
                text=f"stage {number} of {of}",
            )  # fmt: skip

    def _line(self, line: str) -> None:
        if not self.drawn and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.every
            self.say(line)


class _Listener(logging.Handler):
    """Hands activities and phases to a display."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.DEBUG)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        begins = record.name == _phases.name and record.levelno == logging.DEBUG
        if begins or getattr(record, "activity", None):
            self.display.begin(getattr(record, "activity", None) or Activity(record.getMessage()))
            return
        if record.name == _phases.name or hasattr(record, "activity"):
            self.display.end()
        if record.levelno >= logging.INFO and self.display.lines:
            self.display.say(record.getMessage())


@contextmanager
def shown(console: Console, *, every: float = EVERY, lines: bool = False) -> Iterator[Display]:
    """While open, what runs are doing is shown on the console; see `Display`.

    >>> with shown(Console(quiet=True)) as display:
    ...     display.begin(Activity("loading model"))
    """
    display = Display(console, every=every, lines=lines)
    listener = _Listener(display)
    with ExitStack() as stack:
        for logger in (activities, _phases):
            stack.callback(logger.setLevel, logger.level)
            logger.addHandler(listener)
            stack.callback(logger.removeHandler, listener)
            logger.setLevel(logging.DEBUG)
        stack.callback(_shown.remove, display)
        _shown.append(display)
        stack.enter_context(display.bars)
        yield display


@contextmanager
def shown_in_python(
    progress: bool | None,  # noqa: FBT001 - the argument of prune
    on_step: Callable[[Step], None] | None,
) -> Iterator[Callable[[Step], None] | None]:
    """`on_step`, which shows the run as well where that is wanted, and no display is open.

    Args:
        progress: None: on a terminal and in a notebook.
    """
    console = Lasting(stderr=True, quiet=sys.stderr is None)
    if progress is None:
        progress = console.is_terminal or console.is_jupyter
    if not progress or _shown:
        yield on_step
        return
    with shown(console, lines=True) as display:

        def both(step: Step) -> None:
            display(step)
            if on_step:
                on_step(step)

        yield both


def _bars(console: Console, *, drawn: bool) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    titles = Column(max_width=36, no_wrap=True)  # beside it, figures fit into 80 columns; the bar takes the rest
    columns: Any = (
        TextColumn("{task.description}", markup=False, table_column=titles),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not drawn, redirect_stdout=False, transient=True, expand=True)


def _time_left(seconds: float, done: int, left: int) -> str:
    """The time that the remaining steps take at the pace so far; empty where there is no pace yet.

    >>> _time_left(10.0, 5, 20), _time_left(60.0, 1, 20), _time_left(3.0, 0, 20)
    ('40 s left', '20 min left', '')
    """
    if done <= 0:
        return ""
    remaining = seconds / done * left
    return f"{remaining / 60:.0f} min left" if remaining >= 120 else f"{remaining:.0f} s left"
