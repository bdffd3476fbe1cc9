"""Places where a command will write, checked before it works."""

from __future__ import annotations

import os
from pathlib import Path

from allot.errors import CannotWrite, UsageError


def check_file_place(path: str | Path) -> Path:
    """The path of a file that can be written there, as far as can be seen before.

    Raises:
        UsageError: no name of a file, or a directory.
        CannotWrite: its folder does not exist, or is closed to this user.

    >>> check_file_place("/")
    Traceback (most recent call last):
    allot.errors.UsageError: '/' is no name of a file: a path like plan.json is accepted.
    """
    path = Path(path)
    if not path.name:
        raise UsageError(f"{str(path)!r} is no name of a file: a path like plan.json is accepted.")
    if path.is_dir():
        raise UsageError(f"{path} is a directory: the path of a file is accepted.")
    if not path.parent.is_dir():
        raise CannotWrite(f"cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise CannotWrite(f"cannot write {path}: {path.parent} is closed to this user.")
    return path


def check_directory_place(path: str | os.PathLike[str]) -> Path:
    """The path of a directory for runs that can be written to, or made, as far as can be seen before.

    Raises:
        UsageError: an empty text, the root of all directories, or a file.
        CannotWrite: the folder that it would be made in is a file, or closed to this user.
    """
    if not str(path):
        raise UsageError("an empty text is no directory: a path like runs/first is accepted.")
    path = Path(path)
    if path.absolute() == path.absolute().parent:
        raise UsageError(f"{path} holds all other directories: a path like runs/first is accepted.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a run directory.")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "closed to this user" if there.is_dir() else "a file"
        raise CannotWrite(f"cannot make {path}: {there} is {reason}.")
    return path


def check_run_place(path: str | Path) -> Path:
    """The path of a directory that holds a run already, or can hold one.

    Raises:
        UsageError, CannotWrite: as `check_directory_place`, or a directory with other files.
    """
    path = check_directory_place(path)
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    if "run.json" not in names and any(not name.endswith(".tmp") for name in names):
        raise UsageError(f"{path} holds other files and no run.json: choose another directory.")
    return path
