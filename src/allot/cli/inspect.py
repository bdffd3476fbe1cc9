"""Verbs of the command line that show files of runs, methods and recipes."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from allot.cli.console import people, print_json, say
from allot.cli.finished_run import RecordedRecipe, describe_method, find_runs, read_report
from allot.cli.options import Json, RunModel, place, takes
from allot.cli.recipe import RecipeFile, gallery
from allot.errors import UsageError, VerificationError, unknown
from allot.export.certificate.certificate import place_of, verify
from allot.export.export import EVERY, export_run
from allot.methods import METHODS, RECIPES
from allot.report import table
from allot.report.comparison import common_page, comparison_page, page_in
from allot.report.exports import add_export
from allot.report.page import write_run
from allot.run.places import check_file_place
from allot.run.recipes import Recipe
from allot.run.store import write
from allot.sources.load import example_of, load_model

_USUAL = {"score": Recipe.score, "pattern": Recipe.pattern}
LONGEST = 200  # characters of one entry of a check, in the one line of an error


@takes("weights", "input")
def verify_command(
    wanted: RecipeFile,
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run directory or a file that allot wrote")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the model that runs files of tensors; the same forms as in prune"),
    ] = None,
    *,
    trust: Annotated[
        bool, typer.Option("--trust", help="open exported programs (.pt2) too: a program can run any code")
    ] = False,
    as_json: Json = False,
) -> None:
    """Re-open, recount and certify; exit code 4 if anything differs from what was promised."""
    source = load_model(model, weights=wanted.weights, shape=wanted.input) if model else None
    checked = verify(path, source.model if source else None, trust=trust)
    if as_json:
        print_json(checked)
    else:
        people.print(table.certificate_table(checked["rows"]))
        if checked["passed"]:
            unopened = sum(str(row["found"]).startswith("not opened") for row in checked["rows"])
            note = f" ({unopened} of them without opening a program: --trust opens it)" if unopened else ""
            say(f"{path}: all {len(checked['rows'])} checks passed{note}")
    for row in checked["rows"]:
        if not row["passed"]:
            entries = [table.check_text(row[key]) for key in ("check", "promised", "found")]
            check, promised, found = (text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in entries)
            raise VerificationError(f"{place_of(path, row)}: {check}: promised {promised}, found {found}.")


@takes("data", "weights", "input")
def export_command(
    wanted: RecipeFile,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    to: Annotated[str, typer.Option(metavar="FORM", help=", ".join(EVERY))],
    out: Annotated[
        Path | None, typer.Option(parser=place, metavar="PATH", help="of slim, openvino and hf a directory  [in RUN]")
    ] = None,
    model: RunModel = None,
    *,
    as_json: Json = False,
) -> None:
    """Write what a runtime reads, open it again, compare it with the run and time it beside the dense model."""
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


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="finished run directories, or those of sweeps")],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=place, metavar="FILE.html", help="the page  [RUN/report.html; of several: in their common folder]"
        ),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show one run, or several side by side, here and as one offline page."""
    if out is not None:
        check_file_place(out)
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
    people.print(table.run_table(report) if len(runs) == 1 else table.comparison_table(reports))
    say(f"page: {page}")


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a named recipe")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the named recipes, or show one: `allot prune MODEL --recipe NAME` takes it."""
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


def methods_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a method or recipe")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the methods, or describe one: its equations, needs, citation and options."""
    if name is None:
        methods = {key: describe_method(key) for key in METHODS}
        if as_json:
            return print_json({"methods": methods, "recipes": {k: dataclasses.asdict(r) for k, r in RECIPES.items()}})
        people.print(table.methods_table([(key, m["role"], m["needs"], m["summary"]) for key, m in methods.items()]))
        for key, recipe in RECIPES.items():
            say(f"--method {key}: allocate {recipe.allocate}, repair {', '.join(recipe.repair) or 'none'}")
    elif name in METHODS:
        method = describe_method(name)
        if as_json:
            return print_json(method)
        say(f"{name}: {method['role']}, needs {method['needs']}")
        say(method["text"])
        for option, default in method["options"].items():
            say(f"  --set options.{name}.{option}={default if isinstance(default, str) else json.dumps(default)}")
    elif name in RECIPES:
        recipe = RECIPES[name]
        parts = f"--allocate {recipe.allocate} --repair {','.join(recipe.repair) or 'none'}"
        others = {key: getattr(recipe, key) for key in ("score", "pattern") if getattr(recipe, key) != _USUAL[key]}
        parts += "".join(f" --{key} {value}" for key, value in others.items())
        for part, options in recipe.options.items():
            parts += "".join(f" --set options.{part}.{option}={json.dumps(options[option])}" for option in options)
        parts += f" (--score {recipe.score_alone} where no repair chooses masks)" if recipe.score_alone else ""
        if as_json:
            return print_json(dataclasses.asdict(recipe))
        say(f"--method {name}: {parts}; see `allot methods PART`")
    else:
        raise unknown("method", name, {*METHODS, *RECIPES})
    return None
