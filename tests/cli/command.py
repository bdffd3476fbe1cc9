"""The command line run in this process, and what came of it."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from allot.cli import main as cli

FACTORIES = Path(__file__).with_name("factories.py")
MLP, SAMPLES = "cli.factories:mlp", "cli.factories:samples"
NET = "zoo:digits-resnet20"


@dataclass(frozen=True)
class Outcome:
    """Exit code, and what was written to standard output and to standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output."""
        return json.loads(self.out)


def run(line: str) -> Outcome:
    """`allot LINE`, as a shell would split it."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["allot", *shlex.split(line)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            return Outcome(ended.code, out.getvalue(), err.getvalue())
    raise AssertionError("main returned without an exit code")


def done(line: str) -> Outcome:
    """`allot LINE`, which has to succeed."""
    outcome = run(line)
    assert outcome.code == 0, outcome.err
    return outcome


def refused(line: str, code: int = 2) -> str:
    """The error line of `allot LINE`, which has to end with `code`, one line on standard error and nothing else."""
    outcome = run(line)
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and outcome.err.endswith("\n")
    return outcome.err


def exact(total: int, sparsity: str) -> int:
    """round((1 - sparsity) * total) in whole numbers, ties to even."""
    parts = 10 ** len(sparsity.partition(".")[2])
    whole, rest = divmod((parts - int(sparsity.partition(".")[2])) * total, parts)
    return whole + (2 * rest > parts or (2 * rest == parts and whole % 2))
