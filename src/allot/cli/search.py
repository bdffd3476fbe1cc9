"""The work of the verb that looks for the largest sparsity that keeps a score: search."""

from __future__ import annotations

from pathlib import Path

from allot.cli.console import people, print_json, progress, say
from allot.cli.loading import load_inputs, prune_arguments
from allot.cli.recipe import RecipeFile
from allot.errors import UsageError, VerificationError
from allot.pruning.search import search
from allot.report.table import search_table
from allot.run.driver import interruptible


def search_command(wanted: RecipeFile, out: Path, kind: str, runs: int, *, as_json: bool) -> None:
    """Run the search, and show every run and the best.

    Raises:
        VerificationError: no run keeps the score.
    """
    assert wanted.max_drop is not None
    with progress() as display:
        source, calibration = load_inputs(wanted)
        arguments = prune_arguments(wanted, source)
        if arguments["test"] is None:
            raise UsageError("a search needs labelled data to score on: give --test DATA.")
        with interruptible() as should_stop:
            results = search(
                source.model, calibration, out, max_drop=wanted.max_drop, kind=kind, runs=runs, method=wanted.method,
                seed=wanted.seed, should_stop=should_stop,
                on_run=lambda number, of, budget: display.whole(budget, number - 1, of),
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
