"""Which files a value passes: `python -m benchmarks.paths` runs a small chain and prints the files, in order.

budget     from the text of --budget to the first mask: files of functions that are handed the text, the budget or the
           counts that it allows, until a mask has been selected
gradient   from a calibration batch to the first gradient: files of functions that run between the draw of a batch and
           the end of the backward pass; the net itself, which is a user's, is not counted
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import allot
import allot.cli.prune  # torch is imported before anything is traced
from allot.budget.budget import Budget
from allot.budget.channels import ChannelBudget
from allot.cli.main import command_line

SOURCE = Path(allot.__file__).parent
NET = "zoo:digits-resnet20"
LIMIT = "sparsity=0.9"


class _Reached(Exception):
    """The end of a path."""


def traced(
    arguments: str, enters: Callable[[FrameType, str], bool], ends: Callable[[FrameType, str], bool]
) -> list[str]:
    """Files of src/allot whose frames `enters` says yes to, in the order of their first one, until `ends` does."""
    files: dict[str, None] = {}

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not file.is_relative_to(SOURCE) or frame.f_code.co_name[0] == "<":
            return
        if enters(frame, event):
            files.setdefault(str(file.relative_to(SOURCE)))
        if ends(frame, event):
            raise _Reached

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        sys.setprofile(watch)
        try:
            command_line(["prune"])([*arguments.split(), "--out", f"{folder}/run"], standalone_mode=False)
        except _Reached:
            pass
        finally:
            sys.setprofile(None)
    return list(files)


def budget_path() -> list[str]:
    """From the text of --budget to the first mask."""

    def holds(value: Any) -> bool:
        texts = isinstance(value, list | tuple) and LIMIT in value
        return isinstance(value, Budget | ChannelBudget) or value == LIMIT if not texts else True

    def enters(frame: FrameType, event: str) -> bool:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)]
        given = [frame.f_locals.get(name) for name in names if name in frame.f_locals]
        return event == "call" and (any(map(_safely(holds), given)) or "kept" in names)

    def ends(frame: FrameType, event: str) -> bool:
        return (
            event == "return" and frame.f_code.co_name == "select" and frame.f_code.co_filename.endswith("patterns.py")
        )

    return traced(f"prune {NET} --data {NET} --budget {LIMIT} --samples 8 --repair none", enters, ends)


def gradient_path() -> list[str]:
    """From a calibration batch to the first gradient."""
    drawn = False

    def enters(frame: FrameType, event: str) -> bool:
        nonlocal drawn
        drawn = drawn or frame.f_code.co_name == "loss_of"
        return drawn

    def ends(frame: FrameType, event: str) -> bool:
        return event == "return" and frame.f_code.co_name == "loss_of"

    chain = "--allocate uniform --repair distill --samples 8 --batch-size 8 --set options.distill.steps=1"
    files = traced(f"prune {NET} --data {NET} --budget {LIMIT} {chain}", enters, ends)
    return [file for file in files if not file.startswith("sources/zoo")]


def _safely(test: Callable[[Any], Any]) -> Callable[[Any], bool]:
    def tested(value: Any) -> bool:
        try:
            return bool(test(value))
        except (RuntimeError, TypeError, ValueError):  # tensors do not compare with a text
            return False

    return tested


def main() -> None:
    """Print both paths."""
    for name, path in (("budget to mask", budget_path()), ("calibration batch to gradient", gradient_path())):
        sys.stdout.write(f"{name}: {len(path)} files\n" + "".join(f"  {file}\n" for file in path))


if __name__ == "__main__":
    main()
