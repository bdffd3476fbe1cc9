"""The work of the verbs that show files of runs, and recipes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from allot.cli.console import people, print_json, say
from allot.cli.finished_run import RecordedRecipe, find_runs, read_report
from allot.cli.recipe import RecipeFile, gallery
from allot.errors import UsageError, VerificationError, unknown
from allot.export.certificate.certificate import place_of, verify
from allot.export.export import export_run
from allot.export.files.formats import BITMASK
from allot.report import table
from allot.report.comparison import common_page, comparison_page, page_in
from allot.report.exports import add_export
from allot.report.headline import headline_line
from allot.report.page import write_run
from allot.run.store import write
from allot.sources.load import example_of, load_model

LONGEST = 200  # characters of one entry of a check, in the one line of an error


def verify_command(
    wanted: RecipeFile, path: Path, model: str | None, *, trust: bool, every: bool, as_json: bool
) -> None:
    """Show what was checked of each file, or `every` check.

    Raises:
        VerificationError: a check failed.
    """
    source = load_model(model, weights=wanted.weights, shape=wanted.input) if model else None
    checked = verify(path, source.model if source else None, trust=trust)
    if as_json:
        print_json(checked)
    else:
        people.print((table.certificate_table if every else table.verified_table)(checked["rows"]))
        if checked["passed"]:
            unopened = sum(str(row["found"]).startswith("not opened") for row in checked["rows"])
            note = f" ({unopened} of them without opening a program: --trust opens it)" if unopened else ""
            say(f"{path}: all {len(checked['rows'])} checks passed{note}")
    for row in checked["rows"]:
        if not row["passed"]:
            entries = [table.check_text(row[key]) for key in ("check", "promised", "found")]
            check, promised, found = (text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in entries)
            raise VerificationError(f"{place_of(path, row)}: {check}: promised {promised}, found {found}.")


def export_command(
    wanted: RecipeFile, run: Path, to: str, out: Path | None, model: str | None, *, as_json: bool
) -> None:
    """Write an export of a run, and show it beside the dense model."""
    report, recipe = read_report(run), RecordedRecipe.read(run, wanted, model)
    source = recipe.load()
    data = recipe.value("data") if source.example is None else None
    example = example_of(source, data, skip_corrupt=recipe.value("skip_corrupt"))
    if example is None:
        raise UsageError("no input to run the model on: give --input or --data.")
    row = export_run(source.model, run, report, example, to, out)
    add_export(run, row)
    if as_json:
        print_json(row)
    else:
        people.print(table.export_table(row))
        if row["bytes"] >= row["dense_bytes"] and (small := run / BITMASK).exists():
            say(
                f"{row['form']} stores zeros like other weights: the small file is {small}, "
                f"{small.stat().st_size:,} bytes"
            )


def report_command(runs: list[Path], out: Path | None, *, as_json: bool) -> None:
    """Show runs, and write their page."""
    runs = [run for path in runs for run in find_runs(path)]
    reports = [(str(run), read_report(run)) for run in runs]
    name, report = reports[0]
    if len(runs) == 1:
        page, content = write_run(runs[0], report, out), {**report, "run": name}
    else:
        page, content = out or common_page(runs), {"runs": [{**report, "run": name} for name, report in reports]}
        write(page, comparison_page(reports, links=partial(page_in, seen_from=page.parent)))
    if as_json:
        print_json(content)
        return
    if len(runs) == 1:
        people.print(headline_line(report), soft_wrap=True)
    people.print(table.run_table(report) if len(runs) == 1 else table.comparison_table(reports))
    say(f"page: {page}")


def recipes_command(name: str | None, *, as_json: bool) -> None:
    """Show the named recipes, or one of them."""
    recipes = {key: path.read_text() for key, path in gallery().items()}
    if name is not None and name not in recipes:
        raise unknown("recipe", name, recipes)
    if as_json:
        print_json({"recipes": recipes} if name is None else {name: recipes[name]})
    elif name:
        say(recipes[name].rstrip())
    else:
        for key, text in recipes.items():
            say(f"{key:<12} {text.splitlines()[0].removeprefix('# ')}")
