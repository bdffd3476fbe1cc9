"""The tables of a limit on latency, as a file of the run."""

from __future__ import annotations

import json
from pathlib import Path

from allot.budget.channels import channel_budget
from allot.budget.latency import Latency
from allot.errors import UsageError
from allot.export.files.formats import TABLES
from allot.run.problem import Problem
from allot.run.store import write


def tables_of(problem: Problem) -> Latency:
    """The tables of a problem that limits latency."""
    tables = channel_budget(problem.budget).latency
    assert tables is not None  # measured when the problem was set up
    return tables


def save_tables(run: Path, problem: Problem) -> None:
    """Write latency.json: a resumed run uses the same tables, and `verify` reads them."""
    write(run / TABLES, json.dumps(tables_of(problem).to_json()) + "\n")


def load_tables(path: Path) -> Latency:
    """The tables of a run.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return Latency.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, UsageError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
