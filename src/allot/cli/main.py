"""The command line: its verbs, and the exit codes of errors. No other package prints."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from allot.budget.units import KINDS
from allot.cli.console import notes, people, say, say_error
from allot.cli.verbs import VERBS
from allot.errors import AllotError, Stopped, in_one_line, raised_at

SHARED = ("prune", "sweep", "search", "evaluate")  # verbs that several processes run together
# the error of typer for a command line that it cannot read; some releases of it bring a click of their own
_Misuse: Any = typer.BadParameter.__base__


def allot_command(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; with any verb.")] = False,
) -> None:
    """Budgeted sparsification: a trained model and a budget in, a sparse model that meets it exactly out."""
    if version:
        from importlib import metadata

        sys.stdout.write(f"allot {metadata.version('allot')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
        raise typer.Exit


def command_line(names: Iterable[str]) -> typer.Typer:
    """The command with these verbs: making all of them takes longer than running some."""
    app = typer.Typer(
        name="allot", pretty_exceptions_enable=False, rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback(invoke_without_command=True)(allot_command)
    for name in names:
        app.command(name, epilog=VERBS[name].epilog)(VERBS[name].function)
    return app


def main() -> None:
    """Run the command line; errors are one line on standard error and an exit code."""
    debug, arguments = "--debug" in sys.argv[1:], [word for word in sys.argv[1:] if word != "--debug"]
    try:
        with _sharing(arguments), notes():
            app = command_line(arguments[:1] if arguments and arguments[0] in VERBS else VERBS)
            code = app(args=arguments, prog_name="allot", standalone_mode=False) or 0
            if code == 130:  # what some releases of click make of Ctrl-C
                raise KeyboardInterrupt
    except BaseException as error:  # noqa: BLE001 - a model or data may raise anything, SystemExit too
        if _nobody_reads(error):
            sys.exit(0)
        if debug:
            traceback.print_exc()
        code = _reported(error)
    sys.exit(code)


def _nobody_reads(error: BaseException) -> bool:
    """Whether rich, which prints the help, ends the process because the reader of the output has left."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, SystemExit) and bool(frames) and frames[-1].name == "on_broken_pipe"


@contextmanager
def _sharing(arguments: list[str]) -> Iterator[None]:
    """While open, some verbs share their work where torchrun started this process: else torch is not imported here."""
    people.quiet = False
    if "WORLD_SIZE" not in os.environ or not arguments or arguments[0] not in SHARED:
        yield
        return
    from allot.processes import rank, sharing

    with sharing():
        people.quiet = rank() > 0
        yield


def _reported(error: BaseException) -> int:
    """Print one line about an error; returns its exit code."""
    code, line = 2, ""
    if isinstance(error, Stopped):
        say(f"{error}: saved; the same command goes on from here." if error.saved else f"{error}.")
        return error.exit_code
    if isinstance(error, AllotError):
        code, line = error.exit_code, "; ".join([str(error), *getattr(error, "__notes__", ())])
    elif isinstance(error, _Misuse):
        verb = error.ctx.command_path if error.ctx else "allot"
        kind = getattr(error, "option_name", "").lstrip("-")
        hint = f"did you mean --budget {kind}=LIMIT? " if kind in KINDS else ""
        line = f"{error.format_message()} ({hint}`{verb} --help` lists what is accepted)"
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        code, line = 130, "interrupted."
    elif isinstance(error, OSError) and not raised_at(error):
        line = f"{error.filename or ''} {error.strerror or error}"
    else:
        line = f"{in_one_line(error)}; --debug shows the traceback."
    say_error(line)
    return code
