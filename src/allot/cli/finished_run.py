"""Finished runs read back for the command line."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allot.cli.named_code import names_code
from allot.cli.recipe import RecipeFile
from allot.errors import UsageError
from allot.run.store import read_finished, read_run
from allot.sources.load import load_model
from allot.sources.origins import ModelSource

log = logging.getLogger("allot")
_ANSWERED = ("model", "weights", "input", "data", "test", "metric", "workers", "skip_corrupt")


@dataclass(frozen=True)
class RecordedRecipe:
    """What a finished run says of its model and data, and what the command line says instead.

    No value of the run names code: a run directory may come from anybody.

    Attributes:
        run: the run directory.
        recorded: the recipe in run.json.
        given: the recipe of the command line.
        model: MODEL of the command line, if any.
    """

    run: Path
    recorded: RecipeFile
    given: RecipeFile
    model: str | None

    @classmethod
    def read(cls, run: Path, given: RecipeFile, model: str | None) -> RecordedRecipe:
        """The recipe of the run in a directory.

        Raises:
            UsageError: it is not finished, or its recipe cannot be read.
        """
        content = read_finished(run).get("recipe", {})
        if not isinstance(content, dict):
            raise UsageError(f"{run}/run.json holds no recipe: {content!r}.")
        return cls(run, RecipeFile.resolve(None, {key: content.get(key) for key in _ANSWERED}, ()), given, model)

    def value(self, key: str) -> Any:
        """The value of the command line, else that of the run.

        Raises:
            UsageError: it is that of the run, and names code.
        """
        if key in self.given.model_fields_set:
            return getattr(self.given, key)
        if key == "model" and self.model is not None:
            return self.model
        value = getattr(self.recorded, key)
        if names_code(key, value):
            raise UsageError(
                f"{self.run} names code as its {key} ({value}), and no command runs code that a run directory names: "
                f"give {self._needed(key)} if you trust it."
            )
        return value

    def _needed(self, key: str) -> str:
        """The options that repeat what the run names as code: this one, and the data's beside the model's."""
        keys = ("model", "data") if key == "model" and "data" not in self.given.model_fields_set else (key,)
        named = {k: getattr(self.recorded, k) for k in keys}
        option = {"test": "data"}
        return " ".join(f"--{option.get(k, k)} {value}" for k, value in named.items() if names_code(k, value))

    def load(self, *, weights: str | None = None, device: str | None = None) -> ModelSource:
        """The dense model of the run.

        Args:
            weights: a file of weights in place of those that the run began with.
        Raises:
            UsageError: the run does not say where its model comes from, or it cannot be loaded.
        """
        model = self.value("model")
        if model is None:
            raise UsageError(
                f"{self.run} was made in Python and does not say where its model comes from: give --model."
            )
        return load_model(model, weights=weights or self.value("weights"), shape=self.value("input"), device=device)


def read_report(run: Path) -> dict[str, Any]:
    """report.json of a finished run.

    Raises:
        UsageError: it is not finished, or the file cannot be read.
    """
    read_finished(run)
    try:
        return dict(json.loads((run / "report.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
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
        runs = [path / row["run"] for row in json.loads(table.read_text())["cells"] if "run" in row]
        if outside := [run for run in runs if not run.resolve().is_relative_to(path.resolve())]:
            raise UsageError(f"{table} names {outside[0]}, which is no run of that sweep.")
        if runs:
            return runs
    except UsageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{table} cannot be read: {error}") from error
    raise UsageError(f"{path} holds no run: no cell of that sweep met its budget.")
