"""Verbs of the command line that look at what is there: files of runs, and methods."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from allot.cli.console import people, print_json, say
from allot.cli.finished_run import recipe_of, report_of, runs_of, told_of
from allot.cli.options import Json, takes
from allot.cli.recipe import RecipeFile, gallery
from allot.errors import UsageError, VerificationError, unknown
from allot.export.certificate.certificate import place_of, verify
from allot.export.export import EVERY, export_run
from allot.methods import METHODS, RECIPES
from allot.report import table
from allot.report.exports import add_export
from allot.report.page import comparison_page, write_run
from allot.run.store import write
from allot.sources.load import example_of, load_model

LONGEST = 200  # characters of what a check says, in the one line of an error


@takes("weights", "input")
def verify_command(
    wanted: RecipeFile,
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run directory or a file that allot wrote")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="to ask exported files that hold tensors only, as in prune")
    ] = None,
    *,
    trust: Annotated[
        bool, typer.Option("--trust", help="open exported programs (.pt2) too: a program can run any code")
    ] = False,
    as_json: Json = False,
) -> None:
    """Re-open, recount and certify; exit code 4 if anything differs from what was promised."""
    source = load_model(model, weights=wanted.weights, shape=wanted.input) if model else None
    found = verify(path, source.model if source else None, trust=trust)
    if as_json:
        print_json(found)
    else:
        people.print(table.certificate_table(found["rows"]))
        if found["passed"]:
            say(f"{path}: all {len(found['rows'])} checks passed")
    if not found["passed"]:
        failed = next(row for row in found["rows"] if not row["passed"])
        said = [table.check_text(failed[key]) for key in ("check", "promised", "found")]
        check, promised, held = (text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in said)
        raise VerificationError(f"{place_of(path, failed)}: {check}: promised {promised}, found {held}.")


@takes("data", "input")
def export_command(
    wanted: RecipeFile,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    to: Annotated[str, typer.Option(metavar="FORM", help=", ".join(EVERY))],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="of slim, openvino and hf a directory  [in RUN]")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Write what a runtime reads, open it again, compare it with the run and time it beside the dense model."""
    report, made = report_of(run), recipe_of(run)
    source = load_model(str(made.model), weights=made.weights, shape=wanted.input or made.input)
    example = example_of(source, wanted.data or made.data, skip_corrupt=made.skip_corrupt)
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
        Path | None, typer.Option(metavar="FILE.html", help="the page  [RUN/report.html; of several: report.html]")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show one run, or several side by side, here and as one offline page."""
    runs = [run for path in runs for run in runs_of(path)]
    reports = [(str(run), report_of(run)) for run in runs]
    if len(runs) == 1:
        page = write_run(runs[0], reports[0][1], out)
    else:
        page = out or Path("report.html")
        write(page, comparison_page(reports))
    if as_json:
        print_json(
            {**reports[0][1], "run": reports[0][0]}
            if len(reports) == 1
            else {"runs": [{**r, "run": n} for n, r in reports]}
        )
        return
    people.print(table.run_table(reports[0][1]) if len(reports) == 1 else table.comparison_table(reports))
    say(f"page: {page}")


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a named recipe")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the named recipes, or show one: `allot prune MODEL --recipe NAME` takes it."""
    known = {key: path.read_text() for key, path in gallery().items()}
    if name is not None and name not in known:
        raise unknown("recipe", name, known)
    if as_json:
        print_json({"recipes": known} if name is None else {name: known[name]})
    elif name:
        say(known[name].rstrip())
    else:
        for key, text in known.items():
            say(f"{key:<12} {text.splitlines()[0].removeprefix('# ')}")


def methods_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a method or recipe")] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the methods, or tell what one does, needs and cites, with its options."""
    if name in RECIPES and name not in METHODS:
        chain = RECIPES[name]
        said = f"--method {name}: --allocate {chain.allocate} --repair {','.join(chain.repair)}"
        return print_json(dataclasses.asdict(chain)) if as_json else say(f"{said}; see `allot methods PART`")
    if name is not None and name not in METHODS:
        raise unknown("method", name, {*METHODS, *RECIPES})
    told = {key: told_of(key) for key in ([name] if name else METHODS)}
    if as_json:
        print_json(
            told[name] if name else {"methods": told, "recipes": {k: dataclasses.asdict(r) for k, r in RECIPES.items()}}
        )
    elif name:
        say(f"{name}: {told[name]['role']}, needs {told[name]['needs']}")
        say(told[name]["text"])
        for option, default in told[name]["options"].items():
            say(f"  --set options.{name}.{option}={default if isinstance(default, str) else json.dumps(default)}")
    else:
        rows = [(key, t["role"], t["needs"], t["summary"]) for key, t in told.items()]
        people.print(table.methods_table(rows))
        for key, chain in RECIPES.items():
            say(f"--method {key}: allocate {chain.allocate}, repair {', '.join(chain.repair)}")
    return None
