"""Verbs of the command line that compare and measure: sweep, advise, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from allot.cli.console import people, print_json, progress, say
from allot.cli.finished_run import RecordedRecipe
from allot.cli.loading import load_inputs, prune_arguments
from allot.cli.options import LIMITS, READING, Json, RunModel, place, takes
from allot.cli.recipe import RecipeFile
from allot.errors import UsageError
from allot.export.files.formats import PLAIN
from allot.export.timing.latency import Runtime
from allot.pruning.advise import advise
from allot.pruning.sweep import Cell, budgets_of, cells_of, sweep, with_controls
from allot.report import table
from allot.report.advice import advice_page
from allot.run.driver import Progress as Step
from allot.run.driver import interruptible
from allot.run.evaluate import Score, evaluate
from allot.run.places import check_directory_place, check_file_place
from allot.run.store import write
from allot.sources.load import DATA_FORMS, MODEL_FORMS, example_of, load_data, load_model


@takes(
    "model", "data", "pattern", "repair", "score", "weights", "test", "metric", *READING, *LIMITS, "input", file=True
)
def sweep_command(
    wanted: RecipeFile,
    out: Annotated[
        Path | None, typer.Option(parser=place, metavar="DIR", help="a run for each cell, and the comparison")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=LIMITS", help="sparsity=0.5,0.8,0.9; one with several limits: macs=50% and bytes=3MB"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAMES", help="recipes, joined with commas  [erk]")] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="each cell with seeds 0 to N - 1")] = 3,
    *,
    control: Annotated[bool, typer.Option(help="beside each method, uniform densities with the same repair")] = True,
    as_json: Json = False,
) -> None:
    """Prune MODEL by every method to every budget with several seeds; the same command resumes."""
    budgets = budgets_of(budget or ())
    methods = [name.strip() for name in (method or "erk").split(",")]
    if out is None or wanted.model is None or not budgets:
        raise UsageError("a sweep needs MODEL, --budget KIND=LIMITS and --out DIR.")
    check_directory_place(out)
    source, calibration = load_inputs(wanted)
    cells = cells_of(methods, budgets, seeds)
    if control:
        cells = with_controls(cells, **wanted.model_dump(include={"allocate", "score", "pattern", "repair"}))
    with interruptible() as should_stop, progress() as on_step:

        def on_cell(number: int, of: int, cell: Cell) -> None:
            say(f"cell {number} of {of}: {cell}")
            on_step(Step("sweep", number - 1, of, {}))

        results = sweep(
            source.model, calibration, cells, out, should_stop=should_stop, on_cell=on_cell,
            recipe=wanted.model_dump(mode="json", exclude_none=True, exclude={"method", "budget", "seed"}),
            **prune_arguments(wanted, source),
        )  # fmt: skip
    if as_json:
        print_json({**results, "out": str(out)})
        return
    people.print(table.sweep_table(results))
    say(f"comparison: {out / 'report.html'}   as data: {out / 'results.json'}")


@takes("model", "data", "runtime", "weights", "input")
def advise_command(
    wanted: RecipeFile,
    out: Annotated[Path, typer.Option(parser=place, metavar="FILE.html", help="the page with the curves")] = Path(
        "advice.html"
    ),
    pattern: Annotated[str, typer.Option(metavar="PATTERN", help="in what multiples channels go")] = "channels:8",
    *,
    as_json: Json = False,
) -> None:
    """Measure layers of MODEL here, and say which sparsity pays on this machine, if any."""
    check_file_place(out)
    model = wanted.required_model()
    source = load_model(model, weights=wanted.weights, shape=wanted.input)
    example = example_of(source, wanted.data, skip_corrupt=wanted.skip_corrupt)
    if example is None:
        raise UsageError("layers are timed on an input: give --input C,H,W or --data DATA.")
    with progress() as on_step:
        advice = advise(
            source.model, example, pattern=pattern, runtime=Runtime.parse(wanted.runtime), label=model,
            data=wanted.data or (model if model.startswith("zoo:") else "DATA"), given=_given(wanted),
            on_step=lambda done, of: on_step(Step("measure", done, of, {})),
        )  # fmt: skip
    advice = {"model": model, **advice}
    write(out, advice_page(advice))
    if as_json:
        print_json(advice)
        return
    people.print(table.advice_table(advice))
    say(f"page: {out}")


def _given(wanted: RecipeFile) -> list[str]:
    """The options of `advise` that its advice repeats."""
    shape = ",".join(map(str, wanted.input or ()))
    values = {"--weights": wanted.weights, "--input": shape, "--runtime": wanted.runtime}
    return [word for flag, value in values.items() if value for word in (flag, value)]


@takes("data", "metric", "weights", "device", "input", "workers", "skip_corrupt")
def evaluate_command(
    wanted: RecipeFile,
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help=f"a run directory, or {MODEL_FORMS}")],
    split: Annotated[str, typer.Option(help="of zoo data: test, validation or calibration")] = "test",
    model: RunModel = None,
    *,
    as_json: Json = False,
) -> None:
    """Score a run or a model on labelled data or text: by top-1, perplexity, or a function of yours."""
    data, workers, skip_corrupt, metric = wanted.data, wanted.workers, wanted.skip_corrupt, wanted.metric
    if Path(target).is_dir():
        if wanted.weights:
            raise UsageError(f"{target} has its own weights: leave --weights out, or name a MODEL.")
        recipe = RecordedRecipe.read(Path(target), wanted, model)
        source = recipe.load(weights=str(Path(target) / PLAIN), device=wanted.device)
        zoo = (recipe.recorded.data or "").startswith("zoo:")
        data = data or recipe.value("test") or (recipe.recorded.data if zoo else None)
        workers, skip_corrupt, metric = (recipe.value(key) for key in ("workers", "skip_corrupt", "metric"))
    else:
        if model:
            raise UsageError(f"--model {model}: {target} is no run directory, and evaluate takes one model.")
        source = load_model(target, weights=wanted.weights, shape=wanted.input, device=wanted.device)
    if data is None:
        raise UsageError(f"no data to score on: give --data {DATA_FORMS}.")
    with progress() as on_step:
        score = evaluate(
            source.model,
            load_data(data, source, split=split, skip_corrupt=skip_corrupt),
            metric=metric,
            workers=workers,
            on_batch=lambda done, total: on_step(Step("evaluate", done, total or done, {})),
        )
    if as_json:
        print_json(score.to_json())
    else:
        say(_score_line(score))


def _score_line(score: Score) -> str:
    """The score and what stands beside it.

    >>> _score_line(Score("iou", 0.5, 8, values={"iou": 0.5, "loss": 12.5}, lower=("loss",)))
    'iou 0.5, loss 12.5 (lower is better) on 8 samples'
    """
    perplexity = "" if score.perplexity is None else f", perplexity {score.perplexity:.4g}"
    samples = f" on {score.samples:,} samples" if score.samples else ""
    if not score.values:
        return f"{score.metric} {score.score:.4f}{samples}{perplexity}"
    parts = (f"{name} {x:.4g}{' (lower is better)' * (name in score.lower)}" for name, x in score.values.items())
    return ", ".join(parts) + samples
