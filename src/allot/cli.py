"""The command line: verbs. Nothing else prints."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import allot
from allot.errors import AllotError, UsageError, VerificationError, unknown
from allot.methods import METHODS, RECIPES
from allot.parts import assemble
from allot.prune import pose, prune
from allot.realise.certificate import verify
from allot.recipe import RecipeFile
from allot.report import table
from allot.report.data import layer_rows
from allot.run import Candidate, Rule, drive, interruptible
from allot.run import Progress as Step
from allot.sources import DATA_FORMS, MODEL_FORMS, ModelSource, load_data, load_model
from allot.store import read_run, write

app = typer.Typer(
    name="allot",
    help="Budgeted sparsification: a trained model and a budget in, a sparse model that meets it exactly out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
people = Console(stderr=True)

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_FORMS)]
Weights = Annotated[str | None, typer.Option(help="safetensors or tensor-only .pt; or: default, random")]
Data = Annotated[str | None, typer.Option(metavar="DATA", help=DATA_FORMS)]
BudgetWords = Annotated[
    list[str] | None,
    typer.Option("--budget", help="sparsity=0.9, params=20k, macs=50%, bytes=3MB; several: repeat or join with commas"),
]
MethodName = Annotated[str | None, typer.Option("--method", help="recipe to start from: see `allot methods`")]
Allocate = Annotated[str | None, typer.Option(help="allocator, an allocation.json, or a RUN to take it from")]
Pattern = Annotated[str | None, typer.Option(help="unstructured, or N:M like 2:4")]
Score = Annotated[str | None, typer.Option(help="magnitude, lamp, wanda or random")]
Repair = Annotated[str | None, typer.Option(help="repairs in order, joined with commas; none for none")]
Include = Annotated[
    list[str] | None, typer.Option(help="only layers that match: glob, or regular expression after re:")
]
Exclude = Annotated[list[str] | None, typer.Option(help="layers that stay dense: glob, or re:...")]
MinDensity = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN=D", help="fewest weights a layer keeps, as a share")
]
MaxDensity = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN=D", help="most weights a layer keeps, as a share")
]
Floor = Annotated[str | None, typer.Option(help="what every layer keeps: weights (1), per row (1/row) or a share (5%)")]
Seed = Annotated[int | None, typer.Option(help="decides every draw")]
Shape = Annotated[str | None, typer.Option("--input", metavar="C,H,W", help="shape of one input, without the batch")]
RecipePath = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE.yaml", help="the same as these options, in a file")
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one key of the recipe")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


@app.command("prune")
def prune_command(
    model: Model = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="run directory; an unfinished one goes on")] = None,
    budget: BudgetWords = None,
    method: MethodName = None,
    allocate: Allocate = None,
    score: Score = None,
    pattern: Pattern = None,
    repair: Repair = None,
    weights: Weights = None,
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="labelled data for the score before and after")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    min_density: MinDensity = None,
    max_density: MaxDensity = None,
    floor: Floor = None,
    seed: Seed = None,
    samples: Annotated[int | None, typer.Option(help="calibration samples used (512)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="calibration samples at a time (64)")] = None,
    shape: Shape = None,
    recipe: RecipePath = None,
    settings: Settings = None,
    *,
    as_json: Json = False,
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
            recipe=wanted.model_dump(mode="json"),
            on_step=on_step,
            should_stop=should_stop,
        )
    report = result.report()
    if as_json:
        _print_json({**report, "run": str(out)})
        return
    people.print(table.run_table(report))
    people.print(table.certificate_table(result.verify()["rows"]))
    people.print(f"run directory: {out}")


@app.command("plan")
def plan_command(
    model: Model = None,
    budget: BudgetWords = None,
    method: MethodName = None,
    allocate: Allocate = None,
    pattern: Pattern = None,
    weights: Weights = None,
    data: Data = None,
    include: Include = None,
    exclude: Exclude = None,
    min_density: MinDensity = None,
    max_density: MaxDensity = None,
    floor: Floor = None,
    seed: Seed = None,
    shape: Shape = None,
    recipe: RecipePath = None,
    settings: Settings = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="write the allocation, to edit and replay")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show how the budget would be shared out over the layers; needs no data."""
    wanted = _resolved(locals())
    if wanted.model is None:
        raise UsageError(f"no MODEL: {MODEL_FORMS} is accepted.")
    asked_budget = wanted.parsed_budget()
    parts = assemble(
        wanted.method, allocate=wanted.allocate, pattern=wanted.pattern, repair="none", options=wanted.options
    )
    remote = wanted.model.split(":")[0] in ("torchvision", "timm", "hf")
    chosen_weights = wanted.weights or ("random" if remote else None)
    source = load_model(wanted.model, weights=chosen_weights, shape=wanted.input)
    if chosen_weights == "random" and not as_json and parts.names.allocate not in ("uniform", "erk"):
        people.print(
            f"note: random weights; {parts.names.allocate} depends on the weights: give --weights for a real plan."
        )
    problem = pose(
        source.model, asked_budget, parts.pattern, example=source.example, rules=wanted.rules(), seed=wanted.seed
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
    data: Data = None,
    split: Annotated[str, typer.Option(help="of zoo data: test, validation or calibration")] = "test",
    weights: Weights = None,
    shape: Shape = None,
    *,
    as_json: Json = False,
) -> None:
    """Score a run or a model on labelled data."""
    if Path(target).is_dir():
        wanted = _recipe_of(Path(target))
        source = load_model(str(wanted.model), weights=str(Path(target) / "model.safetensors"), shape=wanted.input)
        data = data or wanted.test or (wanted.data if (wanted.data or "").startswith("zoo:") else None)
    else:
        source = load_model(target, weights=weights, shape=_resolved({"shape": shape}).input)
    if data is None:
        raise UsageError(f"no data to score on: give --data {DATA_FORMS}.")
    score = allot.evaluate(source.model, load_data(data, source, split=split))
    if as_json:
        _print_json(score.to_json())
    else:
        people.print(f"{score.metric} {score.score:.4f} on {score.samples:,} samples")


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run directory or a file that allot wrote")],
    *,
    as_json: Json = False,
) -> None:
    """Re-open, recount and certify; exit code 4 if anything differs from what was promised."""
    found = verify(path)
    if as_json:
        _print_json(found)
    else:
        people.print(table.certificate_table(found["rows"]))
    if not found["passed"]:
        failed = next(row for row in found["rows"] if not row["passed"])
        raise VerificationError(
            f"{path}: {failed['file']}: {failed['check']}: promised {failed['promised']}, found {failed['found']}."
        )


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="finished run directories")],
    *,
    as_json: Json = False,
) -> None:
    """Show one run, or several side by side."""
    reports = [(str(run), _report_of(run)) for run in runs]
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
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a method")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the methods, or tell what one does, needs and cites, with its options."""
    if name is not None and name not in METHODS:
        raise unknown("method", name, METHODS)
    told = {key: _told(key) for key in ([name] if name else METHODS)}
    if as_json:
        _print_json(
            told[name] if name else {"methods": told, "recipes": {k: dataclasses.asdict(r) for k, r in RECIPES.items()}}
        )
    elif name:
        people.print(f"{name}: {told[name]['role']}, needs {told[name]['needs']}", highlight=False)
        people.print(told[name]["text"], highlight=False, markup=False)
        for option, default in told[name]["options"].items():
            people.print(f"  --set options.{name}.{option}={default}", highlight=False)
    else:
        rows = [(key, t["role"], t["needs"], t["summary"]) for key, t in told.items()]
        people.print(table.methods_table(rows))
        for key, chain in RECIPES.items():
            people.print(
                f"--method {key}: allocate {chain.allocate}, repair {', '.join(chain.repair)}", highlight=False
            )


def main() -> None:
    """Run the command line; errors are one line on standard error and an exit code."""
    try:
        app()
    except AllotError as error:
        people.print(
            f"error: {' '.join(str(error).split())}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        if error.exit_code == 130:
            people.print("saved: the same command goes on from here.")
        sys.exit(error.exit_code)
    except OSError as error:
        people.print(f"error: {error.filename or ''} {error.strerror or error}".strip(), style="red", markup=False)
        sys.exit(2)


def _resolved(given: dict[str, Any]) -> RecipeFile:
    """The recipe that a command's arguments, its recipe file and its settings make together."""
    names = {"shape": "input"}
    keys = set(RecipeFile.model_fields) | set(names)
    chosen = {names.get(key, key): value for key, value in given.items() if key in keys}
    for bound in ("min_density", "max_density"):
        if chosen.get(bound):
            chosen[bound] = dict(_bound(text) for text in chosen[bound])
    return RecipeFile.resolve(given.get("recipe"), chosen, given.get("settings") or ())


def _bound(text: str) -> tuple[str, float]:
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, float(value)
    except ValueError as error:
        raise UsageError(f"density bound {text!r}: write PATTERN=DENSITY, like fc=0.2.") from error


def _test_data(wanted: RecipeFile, source: ModelSource) -> Any:
    """Held-out data for the score: what --test says, or the test split of zoo data."""
    if wanted.test:
        return load_data(wanted.test, source, split="test")
    if wanted.data and wanted.data.startswith("zoo:"):
        return load_data(wanted.data, source, split="test")
    return None


def _recipe_of(run: Path) -> RecipeFile:
    content = read_run(run)
    if content["state"] != "done":
        raise UsageError(f"{run} is not finished: run the same prune command again to go on.")
    if not content.get("recipe", {}).get("model"):
        raise UsageError(f"{run} was made in Python and does not say where its model comes from: use result.model().")
    return RecipeFile.resolve(None, content["recipe"], ())


def _report_of(run: Path) -> dict[str, Any]:
    if read_run(run)["state"] != "done":
        raise UsageError(f"{run} is not finished: run the same prune command again to go on.")
    try:
        return dict(json.loads((run / "report.json").read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run}/report.json cannot be read: {error}") from error


def _told(name: str) -> dict[str, Any]:
    method: Any = METHODS[name]
    described = method.densities if isinstance(method, Rule) else type(method)
    text = "\n\n".join((inspect.getdoc(described) or "", inspect.getdoc(inspect.getmodule(described)) or ""))
    options = {
        f.name: getattr(method, f.name) for f in dataclasses.fields(method) if not callable(getattr(method, f.name))
    }
    return {
        "role": method.role,
        "needs": "calibration data" if method.needs_data else "no data",
        "summary": text.splitlines()[0],
        "text": text,
        "options": options,
    }


@contextmanager
def _progress() -> Iterator[Callable[[Step], None]]:
    """A bar a stage with time left, on standard error."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=people, disable=not people.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def on_step(step: Step) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, total=step.steps)
            bars.update(tasks[step.stage], completed=step.step)

        yield on_step


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
