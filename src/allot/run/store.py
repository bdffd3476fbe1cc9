"""A run directory during the run: the requested configuration, the state to resume from, the metrics of every step.

Every file is written to a temporary path and then renamed, so that a killed run leaves whole files only.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from allot.errors import CannotWrite, UsageError
from allot.network.trees import flatten_keys
from allot.processes import on_first_process
from allot.run.places import check_file_place, check_run_place

State = dict[str, Any]
_NO_COMMENT = b"\0\0"  # the end of a zip archive without a comment: its length
_LENGTH = (64).to_bytes(2, "little")
SAVE_SECONDS = 5.0  # of work that is worth saving
FORMAT = 4  # of saved states: counts up where the state of any method gets other keys


@dataclass
class Log:
    """The cost of a run so far, and what its guard saw.

    Attributes:
        seconds, finish: of each stage, and of each phase of the finish.
        forward, backward: samples that methods pushed through any network.
        fidelity: `{stage, step, kl | error, agreement}` of each measurement, see `allot.run.guard`.
        guard: what the guard did, in sentences.
        watch: the watch set, `{samples, kind, unsure}`, with the reason where outputs cannot be compared.
        watched: samples pushed forward for measurements of fidelity.
        untrained: signs that the dense model was never trained, see `allot.run.untrained`.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0
    finish: dict[str, float] = field(default_factory=dict)
    fidelity: list[dict[str, Any]] = field(default_factory=list)
    guard: list[str] = field(default_factory=list)
    watch: dict[str, Any] = field(default_factory=dict)
    watched: int = 0
    untrained: list[str] = field(default_factory=list)

    def to_state(self) -> State:
        """What a resumed run continues with; the finish is not saved."""
        return {key: value for key, value in asdict(self).items() if key != "finish"}


@dataclass(frozen=True)
class Saved:
    """An unfinished stage: the candidate at its start, the method's state, the log so far, the best state if any."""

    stage: str
    candidate: State
    state: State
    log: Log
    best: State | None = None


class Store:
    """One run directory, locked by this process; with several processes, by the first one (see `open_store`).

    Args:
        directory: created where it does not exist.
        asked: the identity of the run: configuration and fingerprints, JSON-ready. A directory that was begun with
            another identity is refused.
        notes: other entries of run.json, which may differ in a resumed run, like versions.
        device: the device for the tensors of a saved state.
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
        self.content: bytes | None = None  # bytes of the saved state
        self.asked = json.loads(json.dumps(asked))
        self._identity = json.dumps(self.asked, sort_keys=True).encode()
        self.notes = dict(notes)
        self._saved_seconds = 0.0  # of work in the saved state
        self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        check_run_place(self.directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory, os.O_RDONLY)
        except OSError as error:
            raise CannotWrite(f"cannot make {self.directory}: {error.strerror}.") from error
        self._new = not any(self.directory.iterdir())  # there is nothing of an earlier start
        try:
            self._begin(device)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise CannotWrite(f"cannot write {error.filename or self.directory}: {error.strerror}.") from error
            raise

    leads = True  # whether this process writes

    def save(self, stage: str, candidate: State, state: State, log: Log, best: State | None = None) -> None:
        """Write the state file from which the run can resume; older state files are removed."""
        self._saved_seconds = sum(log.seconds.values())
        path = self.directory / f"state-{stage}.pt"
        with replacing(path) as temporary, temporary.open("w+b") as file:
            content = {
                "stage": stage,
                "candidate": candidate,
                "state": state,
                "format": FORMAT,
                "log": log.to_state(),
                "best": best,
                "steps_bytes": (self.directory / "steps.jsonl").stat().st_size,
            }
            try:
                torch.save(content, file)  # straight to the disk: the state is several times as large as the weights
            except RuntimeError as error:  # torch's writer raises it after an OSError of the disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            _seal(file, self._identity)
        for older in self.directory.glob("state-*.pt"):
            if older != path:
                older.unlink()

    def write_step(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        try:
            with (self.directory / "steps.jsonl").open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        except OSError as error:
            raise CannotWrite(f"cannot write {self.directory / 'steps.jsonl'}: {error.strerror}.") from error

    def describe(self, state: str, log: Log) -> None:
        """Write run.json; `state` is "running" or "stopped"."""
        write(self.directory / "run.json", self.description(state, log))

    def description(self, state: str, log: Log) -> str:
        """The text of run.json; `state` is "running", "stopped" or "done"."""
        finish = {"finish": log.finish} if log.finish else {}
        return json_text({**self.asked, **self.notes, "seconds": log.seconds, **finish, "state": state})

    def forget(self) -> None:
        """Remove the saved state of a run that is done."""
        for path in self.directory.glob("state-*.pt"):
            path.unlink()

    def abandon(self) -> bool:
        """After an error: remove what this process made, where little work is lost; returns whether a state is kept.

        A directory that held files before stays, and one whose saved state is worth `SAVE_SECONDS` of work.
        """
        if not self._new:
            return any(self.directory.glob("state-*.pt"))
        if self._saved_seconds >= SAVE_SECONDS:
            return True
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with suppress(OSError):  # someone else put files into a parent
            for folder in self._made:
                folder.rmdir()
        return False

    def close(self) -> None:
        """Release the lock on the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _begin(self, device: str | torch.device) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{self.directory} is in use by another running allot.") from error
        earlier = self._read()
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self.done = bool(earlier and earlier["state"] == "done")
        self.saved = None
        if self.done:
            self.forget()
            return
        self.saved, steps_bytes = self._load(device)
        # run.json first: a directory that holds other files and no run.json is refused
        self.describe("running", self.saved.log if self.saved else Log())
        steps = self.directory / "steps.jsonl"
        steps.touch()
        os.truncate(steps, steps_bytes)

    def _read(self) -> dict[str, Any] | None:
        """run.json of an earlier start, which must have the same identity; None without one, or without a step."""
        path = self.directory / "run.json"
        if not path.exists():
            check_run_place(self.directory)  # again: now the directory is locked
            return None
        earlier = read_run(self.directory)
        steps = self.directory / "steps.jsonl"
        if earlier["state"] != "done" and steps.exists() and not steps.stat().st_size:
            self.forget()  # that run made no step, so nothing is lost
            return None
        earlier_flat, asked_flat = flatten_keys(earlier), flatten_keys(self.asked)
        differing = sorted(
            key
            for key in asked_flat.keys() | earlier_flat.keys()
            if key.split(".")[0] in self.asked and asked_flat.get(key) != earlier_flat.get(key)
        )
        if differing:
            both = [
                (key, *(textwrap.shorten(str(flat.get(key)), 100) for flat in (earlier_flat, asked_flat)))
                for key in differing[:6]
            ]
            shown = "; ".join(f"{key} was {was}, is {now}" for key, was, now in both)
            raise UsageError(
                f"{self.directory} belongs to another configuration: {shown}. Choose another directory or delete it."
            )
        return earlier

    def _load(self, device: str | torch.device) -> tuple[Saved | None, int]:
        """The unfinished stage, and the size of steps.jsonl in bytes at the time of saving."""
        paths = sorted(self.directory.glob("state-*.pt"), key=lambda path: path.stat().st_mtime_ns)
        if not paths:
            return None, 0
        try:
            self.content = paths[-1].read_bytes()
            saved, steps_bytes, written_as = _parse_saved(self.content, device)
        except Exception as error:  # a damaged file makes torch and pickle raise almost anything
            raise UsageError(f"{paths[-1]} cannot be read: delete {self.directory} and start again.") from error
        if written_as != FORMAT:
            raise UsageError(
                f"{paths[-1]} was saved by another version of allot (states of format {written_as}, this one reads "
                f"{FORMAT}): resume with that version, or delete {self.directory} and start again."
            )
        if not _is_sealed(self.content, self._identity):
            raise UsageError(
                f"{paths[-1]} cannot be read: it was changed, or comes from another run. Delete {self.directory} and "
                "start again."
            )
        return saved, steps_bytes


class _FollowerStore(Store):
    """The store of the other processes: it holds the first process's saved state and writes nothing."""

    leads = False

    def __init__(self, directory: Path, notes: Mapping[str, Any], done: bool, saved: Saved | None) -> None:  # noqa: FBT001
        self.directory, self.notes, self.done, self.saved, self._lock = directory, dict(notes), done, saved, -1

    def save(self, stage: str, candidate: State, state: State, log: Log, best: State | None = None) -> None:
        """Nothing: the first process writes."""

    def write_step(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Nothing: the first process writes."""

    def describe(self, state: str, log: Log) -> None:
        """Nothing: the first process writes."""

    def abandon(self) -> bool:
        """Nothing: the first process removes."""
        return False


def open_store(
    directory: str | Path, asked: Mapping[str, Any], notes: Mapping[str, Any], device: str | torch.device = "cpu"
) -> Store:
    """The store of a run; with several processes, the first one's, and read-only copies for the others.

    Args, Raises: as `Store`.
    """
    result = on_first_process(lambda: Store(directory, asked, notes, device), lambda store: (store.done, store.content))
    if isinstance(result, Store):
        result.content = None
        return result
    done, content = result
    return _FollowerStore(Path(directory), notes, done, _parse_saved(content, device)[0] if content else None)


def _seal(file: BinaryIO, run: bytes) -> None:
    """Append the SHA-256 of a run and its state, as the comment of its zip archive: torch checks no sum.

    Args:
        run: the identity of the run.
    """
    digest = hashlib.sha256(run)
    file.seek(0)
    while piece := file.read(2**20):
        digest.update(piece)
    file.seek(-len(_NO_COMMENT), os.SEEK_END)
    file.write(_LENGTH + digest.hexdigest().encode())


def _is_sealed(content: bytes, run: bytes) -> bool:
    digest, end = hashlib.sha256(run), max(0, len(content) - len(_LENGTH) - 64)
    digest.update(memoryview(content)[:end])
    digest.update(_NO_COMMENT)
    return content[end:] == _LENGTH + digest.hexdigest().encode()


def _parse_saved(content: bytes, device: str | torch.device) -> tuple[Saved, int, int]:
    parsed = torch.load(io.BytesIO(content), weights_only=True, map_location=device)
    saved = Saved(parsed["stage"], parsed["candidate"], parsed["state"], Log(**parsed["log"]), parsed.get("best"))
    return saved, int(parsed["steps_bytes"]), int(parsed.get("format", 1))


def read_run(directory: str | Path) -> dict[str, Any]:
    """run.json of a run directory.

    Raises:
        UsageError: the file is missing, or it is not JSON.
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
        CannotWrite: the disk is full, or the path cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all.

    Raises:
        CannotWrite: as `write`.
    """
    write(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """The text of a JSON file, which ends with a line end."""
    return json.dumps(content, indent=2) + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, renamed to `path` when the block ends without an exception, else removed."""
    check_file_place(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # some writers create private files
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):  # the parent may not be a folder
            temporary.unlink(missing_ok=True)
