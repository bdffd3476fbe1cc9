"""The command line: its verbs, and the exit codes of errors. No other package prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from typing import Annotated, Any

import typer

from allot.cli import inspect, measure, prune, search
from allot.cli.console import notes, people, say, say_error
from allot.errors import AllotError, Stopped
from allot.processes import first_to_report, rank, sharing

SHARED = ("prune", "sweep", "search", "evaluate")  # verbs that several processes run together
app = typer.Typer(name="allot", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# the error of typer for a command line that it cannot read; some releases of it bring a click of their own
_Misuse: Any = typer.BadParameter.__base__


@app.callback(invoke_without_command=True)
def allot_command(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Budgeted sparsification: a trained model and a budget in, a sparse model that meets it exactly out."""
    if version:
        sys.stdout.write(f"allot {metadata.version('allot')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n")
        raise typer.Exit(2)


_VERBS: dict[str, Callable[..., None]] = {
    "prune": prune.prune_command,
    "sweep": measure.sweep_command,
    "search": search.search_command,
    "advise": measure.advise_command,
    "plan": prune.plan_command,
    "evaluate": measure.evaluate_command,
    "verify": inspect.verify_command,
    "export": inspect.export_command,
    "report": inspect.report_command,
    "methods": inspect.methods_command,
    "recipes": inspect.recipes_command,
}
for _verb, _command in _VERBS.items():
    app.command(_verb)(_command)


def main() -> None:
    """Run the command line; errors are one line on standard error and an exit code."""
    try:
        with sharing() if sys.argv[1:2] and sys.argv[1] in SHARED else nullcontext(), notes():
            people.quiet = rank() > 0
            code = app(prog_name="allot", standalone_mode=False) or 0
    except Stopped as stop:
        say(f"{stop}: saved; the same command goes on from here." if stop.saved else f"{stop}.")
        sys.exit(stop.exit_code)
    except AllotError as error:
        say_error(str(error))
        sys.exit(error.exit_code)
    except _Misuse as error:
        verb = error.ctx.command_path if error.ctx else "allot"
        say_error(f"{error.format_message()} (`{verb} --help` lists what is accepted)")
        sys.exit(2)
    except OSError as error:
        say_error(f"{error.filename or ''} {error.strerror or error}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception:
        first_to_report()  # the traceback reports it: other processes need not
        raise
    if code == 130:
        say_error("interrupted.")
    sys.exit(code)
