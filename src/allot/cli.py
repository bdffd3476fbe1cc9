"""The command line: verbs. Nothing else prints."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from allot import options as option
from allot.calibration import Calibration
from allot.errors import AllotError, Stopped, UsageError, VerificationError, unknown
from allot.evaluate import evaluate
from allot.lookup import recipe_of, report_of, told_of
from allot.methods import METHODS, RECIPES
from allot.parts import assemble
from allot.pose import pose
from allot.prune import prune
from allot.realise.certificate import verify
from allot.realise.export import exported
from allot.recipe import RecipeFile
from allot.report import table
from allot.report.data import layer_rows
from allot.run import Candidate, drive, interruptible
from allot.run import Progress as Step
from allot.sources import DATA_FORMS, MODEL_FORMS, REMOTE, ModelSource, load_data, load_model
from allot.store import write

app = typer.Typer(name="allot", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
# a log has no width of its own: tables are not squeezed into 80 columns there
people = Console(stderr=True, width=None if sys.stderr.isatty() or "COLUMNS" in os.environ else 120)

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
    weights: option.Weights = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="labelled data for the score before and after  [test split of zoo data]"),
    ] = None,
    include: option.Include = None,
    exclude: option.Exclude = None,
    min_density: option.MinDensity = None,
    max_density: option.MaxDensity = None,
    floor: option.Floor = None,
    seed: option.Seed = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="calibration samples used  [512]")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="calibration samples at a time  [64]")] = None,
    shape: option.Shape = None,
    recipe: option.RecipePath = None,
    settings: option.Settings = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Prune MODEL to a budget and write a run directory; resumes if RUN is unfinished."""
    wanted = _resolved(locals())
    if out is None:
        raise UsageError("no place for the run: give --out RUN.")
    if wanted.model is None:
        raise UsageError(f"no MODEL: {MODEL_FORMS} is accepted.")
    asked_budget = wanted.parsed_budget()
    source = load_model(wanted.model, weights=wanted.weights, shape=wanted.input)
    calibration = load_data(wanted.data, source) if wanted.data else None
    with interruptible() as should_stop, _progress() as on_step:
        result = prune(
            source.model,
            calibration,
            asked_budget,
            method=wanted.method,
            allocate=wanted.allocate,
            score=wanted.score,
            pattern=wanted.pattern,
            repair=wanted.repair,
            options=wanted.options,
            rules=wanted.rules(),
            seed=wanted.seed,
            samples=wanted.samples,
            batch_size=wanted.batch_size,
            example=source.example,
            test=_test_data(wanted, source),
            label=wanted.model,
            save_to=out,
            recipe=wanted.model_dump(mode="json", exclude_none=True),
            on_step=on_step,
            should_stop=should_stop,
        )
    report = result.report()
    if as_json:
        _print_json({**report, "run": str(out)})
        return
    people.print(table.run_table(report))
    checks = len(result.verify()["rows"])
    _say(f"certificate: {checks} checks of the re-opened files passed (allot verify {out} shows them)")
    _say(f"run directory: {out}")


@app.command("plan")
def plan_command(
    model: option.Model = None,
    budget: option.Budget = None,
    method: option.Method = None,
    allocate: option.Allocate = None,
    pattern: option.Pattern = None,
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
    wanted = _resolved(locals())
    if wanted.model is None:
        raise UsageError(f"no MODEL: {MODEL_FORMS} is accepted.")
    asked_budget = wanted.parsed_budget()
    parts = assemble(
        wanted.method, allocate=wanted.allocate, pattern=wanted.pattern, repair="none", options=wanted.options
    )
    origin, _, name = wanted.model.partition(":")
    chosen_weights = wanted.weights or ("random" if origin in REMOTE and not Path(name).exists() else None)
    source = load_model(wanted.model, weights=chosen_weights, shape=wanted.input)
    if chosen_weights == "random" and parts.names.allocate not in ("uniform", "erk"):
        _say(f"note: random weights; {parts.names.allocate} depends on the weights: give --weights for a real plan.")
    with redirect_stdout(sys.stderr):
        example = source.example
        if example is None and wanted.data:
            example = Calibration.of(load_data(wanted.data, source), samples=1, dtype=source.dtype).example()
        problem = pose(
            source.model, asked_budget, parts.pattern, example=example, rules=wanted.rules(), seed=wanted.seed
        )
    if parts.allocate.needs_data:
        raise UsageError(f"{parts.names.allocate} needs calibration data: use `allot prune`.")
    candidate = drive(parts.allocate, problem, Candidate.dense(problem))
    if save:
        write(save, json.dumps({**candidate.allocation.to_json(), "budget": asked_budget.to_json()}, indent=2) + "\n")
    plan = {
        "model": wanted.model,
        "method": parts.method,
        "pattern": parts.names.pattern,
        "budget": problem.budget.rows(candidate.allocation.kept),
        "kept": sum(candidate.allocation.kept.values()),
        "total": problem.budget.total,
        "layers": layer_rows(problem, candidate.allocation),
        "skipped": dict(problem.scope.skipped),
    }
    if as_json:
        _print_json(plan)
        return
    people.print(table.plan_table(plan))


@app.command("evaluate")
def evaluate_command(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help=f"a run directory, or {MODEL_FORMS}")],
    data: option.Data = None,
    split: Annotated[str, typer.Option(help="of zoo data: test, validation or calibration")] = "test",
    weights: option.Weights = None,
    shape: option.Shape = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Score a run or a model on labelled data."""
    asked_shape = _resolved({"shape": shape}).input
    if Path(target).is_dir():
        if weights:
            raise UsageError(f"{target} has its own weights: leave --weights out, or name a MODEL.")
        wanted = recipe_of(Path(target))
        own = str(Path(target) / "model.safetensors")
        source = load_model(str(wanted.model), weights=own, shape=asked_shape or wanted.input)
        data = data or wanted.test or (wanted.data if (wanted.data or "").startswith("zoo:") else None)
    else:
        source = load_model(target, weights=weights, shape=asked_shape)
    if data is None:
        raise UsageError(f"no data to score on: give --data {DATA_FORMS}.")
    with _progress() as on_step:
        score = evaluate(
            source.model,
            load_data(data, source, split=split),
            on_batch=lambda done, total: on_step(Step("evaluate", done, total or done, {})),
        )
    if as_json:
        _print_json(score.to_json())
    else:
        _say(f"{score.metric} {score.score:.4f} on {score.samples:,} samples")


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run directory or a file that allot wrote")],
    *,
    as_json: option.Json = False,
) -> None:
    """Re-open, recount and certify; exit code 4 if anything differs from what was promised."""
    found = verify(path)
    if as_json:
        _print_json(found)
    else:
        people.print(table.certificate_table(found["rows"]))
    if not found["passed"]:
        failed = next(row for row in found["rows"] if not row["passed"])
        where = path / failed["file"] if path.is_dir() else path
        raise VerificationError(f"{where}: {failed['check']}: promised {failed['promised']}, found {failed['found']}.")


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    to: Annotated[str, typer.Option(metavar="FORM", help="slim, program (torch.export) or onnx")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="[RUN/model.pt2 or .onnx; slim: RUN]")] = None,
    data: option.Data = None,
    shape: option.Shape = None,
    *,
    as_json: option.Json = False,
) -> None:
    """Write what a runtime reads, open it again, compare it with the run and time it beside the dense model."""
    report, wanted = report_of(run), recipe_of(run)
    asked_shape = _resolved({"shape": shape}).input or wanted.input
    source = load_model(str(wanted.model), weights=wanted.weights, shape=asked_shape)
    data = data or wanted.data
    example = source.example
    if example is None and data:
        example = Calibration.of(load_data(data, source), samples=1, dtype=source.dtype).example()
    if example is None:
        raise UsageError("no input to run the model on: give --input or --data.")
    row = exported(source.model, run, report, example, to, out)
    if as_json:
        _print_json(row)
    else:
        people.print(table.export_table(row))


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="finished run directories")],
    *,
    as_json: option.Json = False,
) -> None:
    """Show one run, or several side by side."""
    reports = [(str(run), report_of(run)) for run in runs]
    if as_json:
        _print_json(
            {**reports[0][1], "run": reports[0][0]}
            if len(reports) == 1
            else {"runs": [{**r, "run": n} for n, r in reports]}
        )
    elif len(reports) == 1:
        people.print(table.run_table(reports[0][1]))
    else:
        people.print(table.comparison_table(reports))


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a method or recipe")] = None,
    *,
    as_json: option.Json = False,
) -> None:
    """List the methods, or tell what one does, needs and cites, with its options."""
    if name in RECIPES and name not in METHODS:
        chain = RECIPES[name]
        said = f"--method {name}: --allocate {chain.allocate} --repair {','.join(chain.repair)}"
        return _print_json(dataclasses.asdict(chain)) if as_json else _say(f"{said}; see `allot methods PART`")
    if name is not None and name not in METHODS:
        raise unknown("method", name, {*METHODS, *RECIPES})
    told = {key: told_of(key) for key in ([name] if name else METHODS)}
    if as_json:
        _print_json(
            told[name] if name else {"methods": told, "recipes": {k: dataclasses.asdict(r) for k, r in RECIPES.items()}}
        )
    elif name:
        _say(f"{name}: {told[name]['role']}, needs {told[name]['needs']}")
        _say(told[name]["text"])
        for option, default in told[name]["options"].items():
            _say(f"  --set options.{name}.{option}={default if isinstance(default, str) else json.dumps(default)}")
    else:
        rows = [(key, t["role"], t["needs"], t["summary"]) for key, t in told.items()]
        people.print(table.methods_table(rows))
        for key, chain in RECIPES.items():
            _say(f"--method {key}: allocate {chain.allocate}, repair {', '.join(chain.repair)}")
    return None


def main() -> None:
    """Run the command line; errors are one line on standard error and an exit code."""
    try:
        code = app(prog_name="allot", standalone_mode=False) or 0
    except Stopped as stop:
        _say(f"{stop}: saved; the same command goes on from here.")
        sys.exit(stop.exit_code)
    except AllotError as error:
        _say_error(str(error))
        sys.exit(error.exit_code)
    except _Misuse as error:
        verb = error.ctx.command_path if error.ctx else "allot"
        _say_error(f"{error.format_message()} (`{verb} --help` lists what is accepted)")
        sys.exit(2)
    except OSError as error:
        _say_error(f"{error.filename or ''} {error.strerror or error}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        _say_error("interrupted.")
    sys.exit(code)


def _resolved(given: dict[str, Any]) -> RecipeFile:
    """The recipe that a command's arguments, its recipe file and its settings make together."""
    names = {"shape": "input"}
    keys = set(RecipeFile.model_fields) | set(names)
    chosen = {names.get(key, key): value for key, value in given.items() if key in keys}
    return RecipeFile.resolve(given.get("recipe"), chosen, given.get("settings") or ())


def _test_data(wanted: RecipeFile, source: ModelSource) -> Any:
    """Held-out data for the score: what --test says, or the test split of zoo data."""
    if wanted.test:
        return load_data(wanted.test, source, split="test")
    if wanted.data and wanted.data.startswith("zoo:"):
        return load_data(wanted.data, source, split="test")
    return None


@contextmanager
def _progress() -> Iterator[Callable[[Step], None]]:
    """A bar a stage with time left, on standard error; there too goes what models and data print meanwhile."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=people, disable=not people.is_terminal, redirect_stdout=False)
    with redirect_stdout(sys.stderr), bars:
        tasks: dict[str, TaskID] = {}

        def on_step(step: Step) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, total=step.steps)
            bars.update(tasks[step.stage], completed=step.step)

        yield on_step


def _say(line: str) -> None:
    """One line for people, whole even where the terminal is narrow."""
    people.print(line, highlight=False, markup=False, soft_wrap=True)


def _say_error(message: str) -> None:
    people.print(f"error: {' '.join(message.split())}", style="red", highlight=False, markup=False, soft_wrap=True)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
    sys.stdout.flush()  # a reader that is gone shows here, not while Python shuts down
