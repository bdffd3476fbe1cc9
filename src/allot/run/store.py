"""A run directory while the run is alive: what was asked, the state to go on from, the metrics of every step.

Every file is written beside its place and then renamed, so that a killed run leaves whole files only.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from allot.errors import UsageError
from allot.processes import on_first_process

State = dict[str, Any]


@dataclass
class Log:
    """What a run cost so far: seconds per stage, and samples pushed through any network."""

    seconds: dict[str, float] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Saved:
    """An unfinished stage: the candidate that went in, the method's state, the log so far."""

    stage: str
    candidate: State
    state: State
    log: Log


class Store:
    """One run directory, locked by this process; where several share the work, by the first (`opened`).

    Args:
        directory: made where it does not exist.
        asked: what identifies the run: configuration and fingerprints, JSON-ready. A directory that was begun with
            something else is refused.
        notes: more for run.json that may change between the first run and a resumed one, like versions.
        device: where the tensors of a saved state are put; where a method keeps them.
    Raises:
        UsageError: the directory belongs to another configuration, to another living process or is no run directory.
    """

    def __init__(
        self,
        directory: str | Path,
        asked: Mapping[str, Any],
        notes: Mapping[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        self.directory = Path(directory)
        self.content: bytes | None = None  # of the unfinished stage, as it was saved
        self.asked = json.loads(json.dumps(asked))
        self.notes = dict(notes)
        if self.directory.exists() and not self.directory.is_dir():
            raise UsageError(f"{self.directory} is a file, not a run directory.")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"cannot make {self.directory}: {error.strerror}.") from error
        try:
            self._begin(device)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise UsageError(f"cannot write {error.filename or self.directory}: {error.strerror}.") from error
            raise

    leads = True  # whether this process writes

    def save(self, stage: str, candidate: State, state: State, log: Log) -> None:
        """Write where the run is, so that it can go on from here."""
        where = self.directory / "steps.jsonl"
        content = {
            "stage": stage,
            "candidate": candidate,
            "state": state,
            "log": {"seconds": log.seconds, "forward": log.forward, "backward": log.backward},
            "steps_bytes": where.stat().st_size,
        }
        path = self.directory / f"state-{stage}.pt"
        with replacing(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(content, file)  # straight to the disk: it holds the weights several times over
            except RuntimeError as error:  # the writer's own, after one of the disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        for other in self.directory.glob("state-*.pt"):
            if other != path:
                other.unlink()

    def write_step(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to steps.jsonl."""
        try:
            with (self.directory / "steps.jsonl").open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {self.directory / 'steps.jsonl'}: {error.strerror}.") from error

    def describe(self, state: str, log: Log) -> None:
        """Write run.json; `state` is "running", "stopped" or "done"."""
        content = {**self.asked, **self.notes, "seconds": log.seconds, "state": state}
        write(self.directory / "run.json", json.dumps(content, indent=2) + "\n")

    def finish(self, log: Log) -> None:
        """Mark the run as done and remove what only an unfinished one needs."""
        self.describe("done", log)
        self._forget()

    def close(self) -> None:
        """Give the directory free."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _begin(self, device: str | torch.device) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{self.directory} is in use by another running allot.") from error
        before = self._read()
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self.done = bool(before and before["state"] == "done")
        self.saved = None
        if self.done:
            self._forget()
            return
        self.saved, steps_bytes = self._load(device)
        # run.json first: a directory with other files and without it is taken for someone else's
        self.describe("running", self.saved.log if self.saved else Log())
        steps = self.directory / "steps.jsonl"
        steps.touch()
        os.truncate(steps, steps_bytes)

    def _forget(self) -> None:
        for path in self.directory.glob("state-*.pt"):
            path.unlink()

    def _read(self) -> dict[str, Any] | None:
        """run.json of an earlier start, which must have asked the same."""
        path = self.directory / "run.json"
        if not path.exists():
            if any(not entry.name.endswith(".tmp") for entry in self.directory.iterdir()):
                raise UsageError(f"{self.directory} holds other files and no run.json: choose another directory.")
            return None
        before = read_run(self.directory)
        steps = self.directory / "steps.jsonl"
        if before["state"] != "done" and steps.exists() and not steps.stat().st_size:
            self._forget()  # it ended before its first step: nothing is lost
            return None
        was, asked = flat(before), flat(self.asked)
        differing = sorted(
            key
            for key in asked.keys() | was.keys()
            if key.split(".")[0] in self.asked and asked.get(key) != was.get(key)
        )
        if differing:
            shown = "; ".join(f"{k} was {was.get(k)}, is {asked.get(k)}" for k in differing[:6])
            raise UsageError(
                f"{self.directory} belongs to another configuration: {shown}. Choose another directory or delete it."
            )
        return before

    def _load(self, device: str | torch.device) -> tuple[Saved | None, int]:
        """The unfinished stage, and how long steps.jsonl was when it was saved."""
        paths = sorted(self.directory.glob("state-*.pt"), key=lambda path: path.stat().st_mtime_ns)
        if not paths:
            return None, 0
        try:
            self.content = paths[-1].read_bytes()
            return _saved(self.content, device)
        except (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise UsageError(f"{paths[-1]} cannot be read: delete {self.directory} and start again.") from error


class _Following(Store):
    """The run directory as the other processes have it: what the first one found there; nothing is written."""

    leads = False

    def __init__(self, directory: Path, notes: Mapping[str, Any], done: bool, saved: Saved | None) -> None:  # noqa: FBT001
        self.directory, self.notes, self.done, self.saved, self._lock = directory, dict(notes), done, saved, -1

    def save(self, stage: str, candidate: State, state: State, log: Log) -> None:
        """The first process does."""

    def write_step(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """The first process does."""

    def describe(self, state: str, log: Log) -> None:
        """The first process does."""


def opened(
    directory: str | Path, asked: Mapping[str, Any], notes: Mapping[str, Any], device: str | torch.device = "cpu"
) -> Store:
    """The store of a run; where processes share the work, the first one's, and what it found for the others.

    Args, Raises: as `Store`.
    """
    found = on_first_process(lambda: Store(directory, asked, notes, device), lambda store: (store.done, store.content))
    if isinstance(found, Store):
        found.content = None
        return found
    done, content = found
    return _Following(Path(directory), notes, done, _saved(content, device)[0] if content else None)


def _saved(content: bytes, device: str | torch.device) -> tuple[Saved, int]:
    found = torch.load(io.BytesIO(content), weights_only=True, map_location=device)
    saved = Saved(found["stage"], found["candidate"], found["state"], Log(**found["log"]))
    return saved, int(found["steps_bytes"])


def read_run(directory: str | Path) -> dict[str, Any]:
    """run.json of a run directory.

    Raises:
        UsageError: there is none, or it is not JSON.
    """
    path = Path(directory) / "run.json"
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "state" in content:
            return content
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{directory} is no run directory: {path.name} cannot be read ({error}).") from error
    raise UsageError(f"{directory} is no run directory: {path.name} has no 'state'.")


def read_finished(directory: str | Path) -> dict[str, Any]:
    """run.json of a finished run.

    Raises:
        UsageError: as `read_run`, or the run is not finished.
    """
    content = read_run(directory)
    if content["state"] != "done":
        raise UsageError(f"{directory} is not finished: run the same prune command again to go on.")
    return content


def write(path: Path, content: str | bytes | memoryview) -> None:
    """Write a whole file or nothing.

    Raises:
        UsageError: the disk is full, or the place cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes `path`'s place when the block ends well, and is removed when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # some writers make their files private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):  # not even the folder may be one
            temporary.unlink(missing_ok=True)


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one; keys joined with dots, places in a list counted from 0."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            value = {str(i): part for i, part in enumerate(value)}
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
