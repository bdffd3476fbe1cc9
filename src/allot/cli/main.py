"""The command line: verbs. Nothing else prints."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from allot.cli import inspect as verbs
from allot.cli import measure as comparing
from allot.cli.console import notes, people, print_json, progress, say, say_error
from allot.cli.finished_run import report_of
from allot.cli.options import CHAIN, LIMITS, READING, RULES, Json, takes
from allot.cli.recipe import RecipeFile
from allot.errors import AllotError, Stopped, UsageError, VerificationError
from allot.export.files.formats import OWN
from allot.export.timing.latency import Runtime, latency_of
from allot.processes import first_to_report, on_first_process, rank, sharing
from allot.pruning.assemble import assemble
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.pruning.setup import make_problem
from allot.report import table
from allot.report.data import layer_rows
from allot.run.driver import drive, interruptible
from allot.run.problem import Candidate
from allot.run.store import write
from allot.sources.load import MODEL_FORMS, REMOTE, example_of, load_model

SHARED = ("prune", "sweep", "evaluate")  # what several processes do together
app = typer.Typer(name="allot", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# what typer raises for a command line that it cannot read; some releases of it bring a click of their own
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


@app.command("prune")
@takes("model", "data", "budget", *CHAIN, "weights", "test", *RULES, *LIMITS, "seed", *READING, "input", file=True)
def prune_command(
    wanted: RecipeFile,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="run directory; an unfinished one goes on")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Prune MODEL to a budget and write a run directory; resumes if RUN is unfinished."""
    if out is None:
        raise UsageError("no place for the run: give --out RUN.")
    if wanted.model is None:
        raise UsageError(f"no MODEL: {MODEL_FORMS} is accepted.")
    asked_budget = wanted.parsed_budget()
    source, calibration = comparing.loaded(wanted.model, wanted)
    with interruptible() as should_stop, progress() as on_step:
        result = prune(
            source.model,
            calibration,
            asked_budget,
            method=wanted.method,
            seed=wanted.seed,
            save_to=out,
            recipe=wanted.model_dump(mode="json", exclude_none=True),
            on_step=on_step,
            should_stop=should_stop,
            **comparing.settings_of(wanted, source),
        )
        report = on_first_process(result.timed)
    if as_json:
        print_json({**report_of(out), "run": str(out)})
        return
    people.print(table.run_table(report))
    for stage, (asked, left) in report["diagnostics"].get("fit", {}).get("steps", {}).items():
        say(f"cut to fit {wanted.max_minutes:g} minutes: {stage} takes {left:,} of {asked:,} steps")
    _tell_checks(result, out)
    say(f"run directory: {out}")
    say(f"to look at: {out / 'report.html'}")


def _tell_checks(result: Result, out: Path) -> None:
    """How many checks passed; of exports, which may have gone since, what differs.

    Raises:
        VerificationError: the run's own files are not what was written.
    """
    rows = result.verify()["rows"]
    failed = [row for row in rows if not row["passed"]]
    if any(row["file"] in OWN for row in failed):
        raise VerificationError(f"{out} does not hold what was written there: allot verify {out} shows what differs.")
    for row in failed:
        say(f"note: {row['file']}: {row['check']}: promised {row['promised']}, found {row['found']}")
    passed = len(rows) - len(failed)
    say(f"verified: {passed} checks of the re-opened files passed (allot verify {out} shows them)")


app.command("sweep")(comparing.sweep_command)
app.command("advise")(comparing.advise_command)


@app.command("plan")
@takes(
    "model", "budget", "method", "allocate", "pattern", "runtime", "weights", "data", *RULES, "seed", "input", file=True
)
def plan_command(
    wanted: RecipeFile,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="write the allocation, to edit and replay")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show how the budget would be shared out over the layers; needs no data."""
    if wanted.model is None:
        raise UsageError(f"no MODEL: {MODEL_FORMS} is accepted.")
    asked_budget = wanted.parsed_budget()
    parts = assemble(
        wanted.method, allocate=wanted.allocate, pattern=wanted.pattern, repair=wanted.repair, options=wanted.options
    )
    if parts.allocate.needs_data:
        raise UsageError(
            f"{parts.names.allocate} learns from data and cannot be planned: use `allot prune`, or --allocate uniform."
        )
    origin, _, name = wanted.model.partition(":")
    chosen_weights = wanted.weights or ("random" if origin in REMOTE and not Path(name).exists() else None)
    source = load_model(wanted.model, weights=chosen_weights, shape=wanted.input)
    if chosen_weights == "random" and parts.names.allocate not in ("uniform", "erk"):
        say(f"note: random weights; {parts.names.allocate} depends on the weights: give --weights for a real plan.")
    with redirect_stdout(sys.stderr):
        example = example_of(source, wanted.data, skip_corrupt=wanted.skip_corrupt)
        problem = make_problem(
            source.model,
            asked_budget,
            parts.pattern,
            example=example,
            rules=wanted.rules(),
            seed=wanted.seed,
            latency=partial(latency_of, runtime=Runtime.parse(wanted.runtime), seed=wanted.seed),
        )
    candidate = drive(parts.allocate, problem, Candidate.dense(problem))
    if save:
        write(save, json.dumps({**candidate.allocation.to_json(), "budget": asked_budget.to_json()}, indent=2) + "\n")
    plan = {
        "model": wanted.model,
        "method": parts.method,
        "pattern": parts.names.pattern,
        "budget": problem.budget.rows(candidate.allocation.kept),
        "kept": sum(problem.budget.sizes(candidate.allocation.kept).values()),
        "total": problem.budget.total,
        "layers": layer_rows(problem, candidate.allocation),
        "skipped": dict(problem.scope.skipped),
    }
    if as_json:
        print_json(plan)
        return
    people.print(table.plan_table(plan))


app.command("evaluate")(comparing.evaluate_command)
app.command("verify")(verbs.verify_command)
app.command("export")(verbs.export_command)
app.command("report")(verbs.report_command)
app.command("methods")(verbs.methods_command)
app.command("recipes")(verbs.recipes_command)


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
        first_to_report()  # a traceback says it: other processes need not
        raise
    if code == 130:
        say_error("interrupted.")
    sys.exit(code)
