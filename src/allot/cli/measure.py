"""The work of the verbs that compare and measure: sweep, advise, evaluate."""

from __future__ import annotations

from pathlib import Path

from allot.cli.console import people, print_json, progress, say
from allot.cli.finished_run import RecordedRecipe
from allot.cli.loading import load_inputs, prune_arguments
from allot.cli.recipe import RecipeFile
from allot.errors import UsageError
from allot.export.files.formats import PLAIN
from allot.export.timing.latency import Runtime
from allot.pruning.advise import advise
from allot.pruning.sweep import Cell, budgets_of, cells_of, sweep, with_controls
from allot.report import table
from allot.report.advice import advice_page
from allot.run.activity import activity
from allot.run.driver import Progress as Step
from allot.run.driver import interruptible
from allot.run.evaluate import Score, evaluate
from allot.run.store import write
from allot.run.untrained import sentence, sign_in_score
from allot.sources.load import example_of, load_data, load_model
from allot.sources.names import DATA_FORMS


def sweep_command(
    wanted: RecipeFile,
    out: Path,
    budget: list[str],
    methods: list[str],
    seeds: int,
    *,
    control: bool,
    as_json: bool,
) -> None:
    """Run every cell, and show the comparison."""
    cells = cells_of(methods, budgets_of(budget), seeds)
    if control:
        asked = len(cells)
        cells = with_controls(cells, **wanted.model_dump(include={"allocate", "score", "pattern", "repair"}))
        if added := len(cells) - asked:
            say(f"{added} more as controls: uniform densities with the same repair (--no-control leaves them out)")
    with progress() as display:
        source, calibration = load_inputs(wanted)

        def on_cell(number: int, of: int, cell: Cell) -> None:
            display.whole(str(cell), number - 1, of)

        with interruptible() as should_stop:
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


def advise_command(wanted: RecipeFile, out: Path, pattern: str, *, as_json: bool) -> None:
    """Time layers of the model, and write and show the advice."""
    model = wanted.required_model()
    with progress() as display:
        with activity("loading model"):
            source = load_model(model, weights=wanted.weights, shape=wanted.input)
            example = example_of(source, wanted.data, skip_corrupt=wanted.skip_corrupt)
        if example is None:
            raise UsageError("layers are timed on an input: give --input C,H,W or --data DATA.")
        advice = advise(
            source.model, example, pattern=pattern, runtime=Runtime.parse(wanted.runtime), label=model,
            data=wanted.data or (model if model.startswith("zoo:") else "DATA"), given=_given(wanted),
            on_step=lambda done, of: display(Step("measure", done, of, {})),
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


def evaluate_command(wanted: RecipeFile, target: str, split: str, model: str | None, *, as_json: bool) -> None:
    """Show the score of a run or a model."""
    data, workers, skip_corrupt, metric = wanted.data, wanted.workers, wanted.skip_corrupt, wanted.metric
    if run := Path(target).is_dir():
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
    with progress() as display:
        score = evaluate(
            source.model,
            load_data(data, source, split=split, skip_corrupt=skip_corrupt),
            metric=metric,
            workers=workers,
            on_batch=lambda done, total: display(Step("evaluate", done, total or done, {})),
        )
    if score.at_chance:
        sign = sign_in_score(score.metric, score.score)
        say(f"note: {sign}; `allot report` shows that of the dense net." if run else f"note: {sentence([sign])}")
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
