"""Finished runs read back, and methods described, for the command line."""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

from allot.cli.recipe import RecipeFile
from allot.errors import UsageError
from allot.methods import METHODS
from allot.pruning.assemble import options_of
from allot.run.problem import Rule
from allot.run.store import read_finished, read_run

log = logging.getLogger("allot")
# the section of a docstring that describes a method's state, which is for developers
_STATE = re.compile(r"^State:\n(?:(?: .*)?\n)*(?: .*\Z)?", re.MULTILINE)


def read_recipe(run: Path) -> RecipeFile:
    """The recipe of a finished run.

    Raises:
        UsageError: it is not finished, or was made in Python.
    """
    content = read_finished(run)
    if not content.get("recipe", {}).get("model"):
        raise UsageError(f"{run} was made in Python and does not say where its model comes from: use result.model().")
    return RecipeFile.resolve(None, content["recipe"], ())


def read_report(run: Path) -> dict[str, Any]:
    """report.json of a finished run.

    Raises:
        UsageError: it is not finished, or the file cannot be read.
    """
    read_finished(run)
    try:
        return dict(json.loads((run / "report.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{run}/report.json cannot be read: {error}") from error


def find_runs(path: Path) -> list[Path]:
    """The run itself, or all runs of a sweep.

    Raises:
        UsageError: the sweep's table cannot be read, or names no run.
    """
    table = path / "results.json"
    cells = sorted(path.glob("*/*/seed-*/run.json"))
    if not table.exists() and cells and not (path / "run.json").exists():
        done = [cell.parent for cell in cells if read_run(cell.parent)["state"] == "done"]
        log.warning("%s is a sweep that is not finished: %d runs of it are", path, len(done))
        if not done:
            raise UsageError(f"{path} is a sweep of which no run is finished: the same command goes on.")
        return done
    if not table.exists():
        return [path]
    try:
        if runs := [path / row["run"] for row in json.loads(table.read_text())["cells"] if "run" in row]:
            return runs
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{table} cannot be read: {error}") from error
    raise UsageError(f"{path} holds no run: no cell of that sweep met its budget.")


def describe_method(name: str) -> dict[str, Any]:
    """The docstrings and options of a method: `{role, needs, summary, text, options}`."""
    method: Any = METHODS[name]
    documented = method.densities if isinstance(method, Rule) else type(method)
    text = "\n\n".join((inspect.getdoc(documented) or "", inspect.getdoc(inspect.getmodule(documented)) or ""))
    return {
        "role": method.role,
        "needs": "calibration data" if method.needs_data else "no data",
        "summary": text.splitlines()[0],
        "text": _STATE.sub("", text),
        "options": options_of(method),
    }
