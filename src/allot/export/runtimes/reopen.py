"""A model written for a runtime, opened again, and held to the answers it gave before."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import AllotError, UsageError, first_line
from allot.export.runtimes.answers import allowed, check_answers
from allot.export.runtimes.forms import FORMS, Opened
from allot.network.channels import copied
from allot.network.trees import cloned
from allot.run.store import replacing


def reopened(model: nn.Module, example: Any, path: Path, to: str) -> tuple[Opened, list[Tensor]]:
    """As `export`, where nothing is yet, and without a probe; with the model's answers."""
    form = FORMS[to]

    def ask(draw: int) -> list[Tensor]:
        # each on a copy of its own: what a forward writes to stays out of the model, and out of the file
        return Opened.module(copied(model).eval()).ask(example, draw=draw)

    with torch.no_grad():
        try:
            wanted = ask(0)
            with replacing(path) if form.ending else nullcontext(path) as place:
                form.write(copied(model).eval(), cloned(example), place)
            opened = form.open(path)
            found = opened.ask(example)
        except (AllotError, OSError):
            raise
        except Exception as problem:
            first: BaseException = problem
            while first.__cause__ is not None:  # exporters wrap what went wrong in what to do about it
                first = first.__cause__
            said = first_line(first)
            raise UsageError(f"{type(model).__name__} cannot be written as {to} for such inputs: {said}") from problem
        check_answers(f"{path.name} answers otherwise than the model", found, wanted, lambda: ask(1), allowed(wanted))
    return opened, wanted
