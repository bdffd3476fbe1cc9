"""The command line: verbs. Nothing else prints."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from allot import options as option
from allot import verbs
from allot.console import notes, people, print_json, progress, say, say_error
from allot.errors import AllotError, Stopped, UsageError
from allot.evaluate import evaluate
from allot.lookup import recipe_of
from allot.origins import ModelSource
from allot.parts import assemble
from allot.pose import pose
from allot.prune import prune
from allot.realise.advise import advise
from allot.realise.timing import Runtime, latency_of
from allot.recipe import RecipeFile
from allot.report import table
from allot.report.data import layer_rows
from allot.report.page import advice_page
from allot.run import Candidate, drive, interruptible
from allot.run import Progress as Step
from allot.shares import place, sharing, speaks
from allot.sources import DATA_FORMS, MODEL_FORMS, REMOTE, example_of, load_data, load_model
from allot.store import write
from allot.sweep import budgets_of, cells_of, sweep

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
    if place() > 0 and context.invoked_subcommand not in SHARED:
        raise typer.Exit  # the first process does it
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n")
        raise typer.Exit(2)


@app.command("prune")
def prune_command(
    model: option.Model = None,
    data: option.Data = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="run directory; an unfinished one goes on")] = None,
    budget: option.Budget = None,
    method: option.Method = None,
    allocate: option.Allocate = None,
    score: option.Score = None,
    pattern: option.Pattern = None,
    repair: option.Repair = None,
    runtime: option.Runtime = None,
    weights: option.Weights = None,
    test: option.Test = None,
    include: option.Include = None,
    exclude: option.Exclude = None,
    min_density: option.MinDensity = None,
    max_density: option.MaxDensity = None,
    floor: option.Floor = None,
    max_minutes: option.MaxMinutes = None,
    stream: option.Stream = None,
    seed: option.Seed = None,
    samples: option.Samples = None,
    batch_size: option.BatchSize = None,
    workers: option.Workers = None,
    skip_corrupt: option.SkipCorrupt = None,
    shape: option.Shape = None,
    recipe: option.RecipePath = None,
    settings: option.Settings = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Prune MODEL to a budget and write a run directory; resumes if RUN is unfinished."""
    wanted = option.resolved(locals())
    if out is None:
        raise UsageError("no place for the run: give --out RUN.")
    if wanted.model is None:
        raise UsageError(f"no MODEL: {MODEL_FORMS} is accepted.")
    asked_budget = wanted.parsed_budget()
    source = load_model(wanted.model, weights=wanted.weights, shape=wanted.input)
    calibration = load_data(wanted.data, source, skip_corrupt=wanted.skip_corrupt) if wanted.data else None
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
            **_settings(wanted, source),
        )
    report = result.report()
    if as_json:
        print_json({**report, "run": str(out)})
        return
    people.print(table.run_table(report))
    for stage, (asked, left) in report["diagnostics"].get("fit", {}).get("steps", {}).items():
        say(f"cut to fit {wanted.max_minutes:g} minutes: {stage} takes {left:,} of {asked:,} steps")
    checks = len(result.verify()["rows"])
    say(f"certificate: {checks} checks of the re-opened files passed (allot verify {out} shows them)")
    say(f"run directory: {out}")
    say(f"to look at: {out / 'report.html'}")


@app.command("sweep")
def sweep_command(
    model: option.Model = None,
    data: option.Data = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="a run for each cell, and the comparison")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=LIMITS", help="sparsity=0.5,0.8,0.9; one with several limits: macs=50% and bytes=3MB"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAMES", help="recipes, joined with commas  [erk]")] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="each cell with seeds 0 to N - 1")] = 3,
    pattern: option.Pattern = None,
    repair: option.Repair = None,
    score: option.Score = None,
    weights: option.Weights = None,
    test: option.Test = None,
    samples: option.Samples = None,
    batch_size: option.BatchSize = None,
    workers: option.Workers = None,
    skip_corrupt: option.SkipCorrupt = None,
    shape: option.Shape = None,
    recipe: option.RecipePath = None,
    settings: option.Settings = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Prune MODEL by every method to every budget with several seeds; goes on where it was stopped."""
    given = dict(locals())
    budgets = budgets_of(given.pop("budget") or ())
    methods = [name.strip() for name in (given.pop("method") or "erk").split(",")]
    wanted = option.resolved(given)
    if out is None or wanted.model is None or not budgets:
        raise UsageError("a sweep needs MODEL, --budget KIND=LIMITS and --out DIR.")
    source = load_model(wanted.model, weights=wanted.weights, shape=wanted.input)
    calibration = load_data(wanted.data, source, skip_corrupt=wanted.skip_corrupt) if wanted.data else None
    with interruptible() as should_stop, progress() as on_step:
        table_of = sweep(
            source.model,
            calibration,
            cells_of(methods, budgets, seeds),
            out,
            on_cell=lambda number, of, cell: on_step(Step("sweep", number - 1, of, {})),
            recipe=wanted.model_dump(mode="json", exclude_none=True, exclude={"method", "budget", "seed"}),
            should_stop=should_stop,
            **_settings(wanted, source),
        )
    if as_json:
        print_json({**table_of, "out": str(out)})
        return
    people.print(table.sweep_table(table_of))
    say(f"comparison: {out / 'report.html'}   as data: {out / 'results.json'}")


@app.command("advise")
def advise_command(
    model: option.Model = None,
    data: option.Data = None,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="the page with the curves")] = Path("advice.html"),
    pattern: Annotated[str, typer.Option(metavar="PATTERN", help="in what multiples channels go")] = "channels:8",
    runtime: option.Runtime = None,
    weights: option.Weights = None,
    shape: option.Shape = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Measure layers of MODEL here, and say which sparsity pays on this machine, if any."""
    wanted = option.resolved({"model": model, "data": data, "weights": weights, "shape": shape})
    if wanted.model is None:
        raise UsageError(f"no MODEL: {MODEL_FORMS} is accepted.")
    source = load_model(wanted.model, weights=wanted.weights, shape=wanted.input)
    example = example_of(source, wanted.data, skip_corrupt=wanted.skip_corrupt)
    if example is None:
        raise UsageError("layers are timed on an input: give --input C,H,W or --data DATA.")
    with progress() as on_step:
        told = advise(
            source.model,
            example,
            pattern=pattern,
            runtime=Runtime.parse(runtime),
            on_step=lambda done, of: on_step(Step("measure", done, of, {})),
        )
    told = {"model": wanted.model, **told}
    write(out, advice_page(told))
    if as_json:
        print_json(told)
        return
    people.print(table.advice_table(told))
    say(f"page: {out}")


@app.command("plan")
def plan_command(
    model: option.Model = None,
    budget: option.Budget = None,
    method: option.Method = None,
    allocate: option.Allocate = None,
    pattern: option.Pattern = None,
    runtime: option.Runtime = None,
    weights: option.Weights = None,
    data: option.Data = None,
    include: option.Include = None,
    exclude: option.Exclude = None,
    min_density: option.MinDensity = None,
    max_density: option.MaxDensity = None,
    floor: option.Floor = None,
    seed: option.Seed = None,
    shape: option.Shape = None,
    recipe: option.RecipePath = None,
    settings: option.Settings = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="write the allocation, to edit and replay")
    ] = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Show how the budget would be shared out over the layers; needs no data."""
    wanted = option.resolved(locals())
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
        problem = pose(
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


@app.command("evaluate")
def evaluate_command(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help=f"a run directory, or {MODEL_FORMS}")],
    data: option.Data = None,
    split: Annotated[str, typer.Option(help="of zoo data: test, validation or calibration")] = "test",
    weights: option.Weights = None,
    shape: option.Shape = None,
    workers: option.Workers = None,
    skip_corrupt: option.SkipCorrupt = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Score a run or a model on labelled data, or a causal language model on text."""
    asked_shape = option.resolved({"shape": shape}).input
    if Path(target).is_dir():
        if weights:
            raise UsageError(f"{target} has its own weights: leave --weights out, or name a MODEL.")
        wanted = recipe_of(Path(target))
        own = str(Path(target) / "model.safetensors")
        source = load_model(str(wanted.model), weights=own, shape=asked_shape or wanted.input)
        workers, skip_corrupt = workers or wanted.workers, skip_corrupt or wanted.skip_corrupt
        data = data or wanted.test or (wanted.data if (wanted.data or "").startswith("zoo:") else None)
    else:
        source = load_model(target, weights=weights, shape=asked_shape)
    if data is None:
        raise UsageError(f"no data to score on: give --data {DATA_FORMS}.")
    with progress() as on_step:
        score = evaluate(
            source.model,
            load_data(data, source, split=split, skip_corrupt=bool(skip_corrupt)),
            workers=workers or 0,
            on_batch=lambda done, total: on_step(Step("evaluate", done, total or done, {})),
        )
    if as_json:
        print_json(score.to_json())
    else:
        more = "" if score.perplexity is None else f", perplexity {score.perplexity:.4g}"
        say(f"{score.metric} {score.score:.4f} on {score.samples:,} samples{more}")


app.command("verify")(verbs.verify_command)
app.command("export")(verbs.export_command)
app.command("report")(verbs.report_command)
app.command("methods")(verbs.methods_command)
app.command("recipes")(verbs.recipes_command)


def main() -> None:
    """Run the command line; errors are one line on standard error and an exit code."""
    try:
        with sharing(), notes():
            people.quiet = place() > 0
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
        speaks()  # a traceback says it: other processes need not
        raise
    if code == 130:
        say_error("interrupted.")
    sys.exit(code)


def _settings(wanted: RecipeFile, source: ModelSource) -> dict[str, Any]:
    """What `prune` and `sweep` take of a recipe alike."""
    return {
        "allocate": wanted.allocate,
        "score": wanted.score,
        "pattern": wanted.pattern,
        "repair": wanted.repair,
        "options": wanted.options,
        "rules": wanted.rules(),
        "samples": wanted.samples,
        "batch_size": wanted.batch_size,
        "workers": wanted.workers,
        "example": source.example,
        "runtime": wanted.runtime,
        "max_minutes": wanted.max_minutes,
        "stream": wanted.stream,
        "test": _test_data(wanted, source),
        "label": wanted.model,
    }


def _test_data(wanted: RecipeFile, source: ModelSource) -> Any:
    """Held-out data for the score: what --test says, or the test split of zoo data."""
    if wanted.test:
        return load_data(wanted.test, source, split="test", skip_corrupt=wanted.skip_corrupt)
    if wanted.data and wanted.data.startswith("zoo:"):
        return load_data(wanted.data, source, split="test")
    return None
