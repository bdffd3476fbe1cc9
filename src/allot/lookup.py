"""What a finished run, or a method, tells of itself, for the command line."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from allot.errors import UsageError
from allot.methods import METHODS
from allot.parts import options_of
from allot.recipe import RecipeFile
from allot.run import Rule
from allot.store import read_run


def recipe_of(run: Path) -> RecipeFile:
    """The recipe that made a finished run.

    Raises:
        UsageError: it is not finished, or was made in Python.
    """
    content = read_run(run)
    if content["state"] != "done":
        raise UsageError(f"{run} is not finished: run the same prune command again to go on.")
    if not content.get("recipe", {}).get("model"):
        raise UsageError(f"{run} was made in Python and does not say where its model comes from: use result.model().")
    return RecipeFile.resolve(None, content["recipe"], ())


def report_of(run: Path) -> dict[str, Any]:
    """report.json of a finished run.

    Raises:
        UsageError: it is not finished, or the file cannot be read.
    """
    if read_run(run)["state"] != "done":
        raise UsageError(f"{run} is not finished: run the same prune command again to go on.")
    try:
        return dict(json.loads((run / "report.json").read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run}/report.json cannot be read: {error}") from error


def told_of(name: str) -> dict[str, Any]:
    """What a method does, needs and takes: `{role, needs, summary, text, options}`."""
    method: Any = METHODS[name]
    described = method.densities if isinstance(method, Rule) else type(method)
    text = "\n\n".join((inspect.getdoc(described) or "", inspect.getdoc(inspect.getmodule(described)) or ""))
    return {
        "role": method.role,
        "needs": "calibration data" if method.needs_data else "no data",
        "summary": text.splitlines()[0],
        "text": text,
        "options": options_of(method),
    }
