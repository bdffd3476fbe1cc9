"""Where an export is written: beside its destination until it was checked, and never over a file of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allot.errors import UsageError
from allot.export.files.formats import OWN, PROBE

_RECORDS = ("run.json", "certificate.json")  # a run, or a result saved by hand, has one of these


def is_run(directory: Path) -> bool:
    """Whether a directory is a run directory."""
    return any((directory / name).exists() for name in _RECORDS)


def check_destination(target: Path, *, directory: bool, run: Path | None = None) -> None:
    """Refuse a destination that may not be written over.

    Args:
        run: the run that is exported.
    Raises:
        UsageError: a file of a run, the directory of another run, or a directory that holds other files.
    """
    if run is not None and is_run(target.parent) and target.parent.resolve() != run.resolve():
        raise UsageError(f"{target.parent} is another run, which knows nothing of this one: give another place.")
    if directory and is_run(target):
        raise UsageError(f"{target} is a run directory: give another place, or none to write beside the run's files.")
    if not directory and is_run(target.parent) and (target.name in OWN or target.name.startswith("state-")):
        raise UsageError(f"{target} is a file that the run itself is made of: give another name.")
    if not directory and target.is_dir():
        raise UsageError(f"{target} is a directory: give the path of a file in it.")
    if directory and target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file: the form is written as a directory, give it another name.")
    if directory and target.suffix in (".safetensors", ".onnx", ".pt2", ".xml"):
        raise UsageError(f"{target} is written as a directory: give it a name without the ending of a file.")
    if directory and target.is_dir() and any(target.iterdir()) and not (target / PROBE).exists():
        raise UsageError(f"{target} holds other files: give a directory of its own.")


@contextmanager
def staging(target: Path, *, directory: bool, run: Path | None = None) -> Iterator[Path]:
    """A path to write to; if the block ends without an error, its files, a probe among them, move to `target`.

    Raises:
        UsageError: `target` cannot be written, or may not be written over (`check_destination`).
    """
    check_destination(target, directory=directory, run=run)
    try:
        if directory:
            target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
            yield Path(folder) / target.name
            for file in sorted(Path(folder).rglob("*")):
                destination = target.parent / file.relative_to(folder)
                if file.is_dir():
                    destination.mkdir(exist_ok=True)
                else:
                    file.replace(destination)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}.") from error
