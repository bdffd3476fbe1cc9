"""The verb that looks for the largest sparsity that keeps a score: search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from allot.cli.console import people, print_json, progress, say
from allot.cli.loading import load_inputs, prune_arguments
from allot.cli.options import CHAIN, LIMITS, READING, RULES, SCORING, Json, place, takes
from allot.cli.recipe import RecipeFile
from allot.errors import UsageError, VerificationError
from allot.pruning.search import KINDS, search
from allot.report.table import search_table
from allot.run.driver import Progress as Step
from allot.run.driver import interruptible
from allot.run.places import check_directory_place


@takes("model", "data", *SCORING, *CHAIN, "weights", *RULES, *LIMITS, "seed", *READING, "input", file=True)
def search_command(
    wanted: RecipeFile,
    out: Annotated[
        Path | None, typer.Option(parser=place, metavar="DIR", help="a run for each share that is tried")
    ] = None,
    kind: Annotated[str, typer.Option(metavar="KIND", help=f"what is removed: {' or '.join(KINDS)}")] = "sparsity",
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="runs at most; the answer is within 2^-N")] = 6,
    *,
    as_json: Json = False,
) -> None:
    """Find the largest sparsity of MODEL that keeps the score within --max-drop; the same command resumes."""
    if out is None or wanted.max_drop is None:
        raise UsageError("a search needs --max-drop DROP, like 1pt, and --out DIR.")
    if wanted.budget:
        raise UsageError("a search finds the budget: leave budget out, and say --kind sparsity or --kind macs.")
    check_directory_place(out)
    wanted.required_model()
    source, calibration = load_inputs(wanted)
    arguments = prune_arguments(wanted, source)
    if arguments["test"] is None:
        raise UsageError("a search needs labelled data to score on: give --test DATA.")
    with interruptible() as should_stop, progress() as on_step:
        results = search(
            source.model, calibration, out, max_drop=wanted.max_drop, kind=kind, runs=runs, method=wanted.method,
            seed=wanted.seed, should_stop=should_stop,
            on_run=lambda number, of, budget: on_step(Step("search", number - 1, of, {})),
            recipe=wanted.model_dump(mode="json", exclude_none=True, exclude={"budget", "max_drop"}),
            **arguments,
        )  # fmt: skip
    if as_json:
        print_json({**results, "out": str(out)})
    else:
        people.print(search_table(results))
        say(f"comparison: {out / 'report.html'}   as data: {out / 'results.json'}")
    if results["best"] is None:
        least = min((row for row in results["cells"] if "text" in row), key=lambda row: float(row["removed"]))
        raise VerificationError(f"no run keeps the score; the mildest, {least['budget']}: {least['text']}.")
    if not as_json:
        best = next(row for row in results["cells"] if row.get("run") == results["best"])
        say(f"the largest {kind if kind == 'sparsity' else 'cut of MACs'} found that keeps the score: {best['budget']}")
        say(f"run directory: {out / results['best']}")
