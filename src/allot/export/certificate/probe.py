"""What lies beside an exported model so that it can be verified anywhere: counts, inputs, the answers of the run.

FILE.probe.safetensors, or allot.probe.safetensors in a directory. Its metadata is a promise, sealed like every file:

    {"format": "probe", "form": "onnx" and so on, "files": {name: {"bytes", "sha256"}},
     "counts": {"weights", "zeros", "macs"}, "inputs": names of arguments, null for those by position,
     "run": SHA-256 of the model.safetensors that it was made from, null where that was no run}

Tensors `input.N` and `output.N` are in the order of the arguments and of the outputs. Of files that hold tensors only,
weights and zeros are counted in the file; MACs and outputs take the model's own code: whoever verifies hands it over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError, first_line
from allot.export.certificate.rows import Row, checked, digest
from allot.export.files.formats import PLAIN, PROBE, save_tensors, stored, untouched
from allot.export.runtimes.answers import allowed, off
from allot.export.runtimes.forms import FORMS
from allot.export.runtimes.from_file import load_into, opened_with, weights_of
from allot.export.runtimes.opened import Opened, files_of
from allot.network.call import as_arguments
from allot.network.draws import generator
from allot.network.trees import tensors_in

ANSWERS = "outputs on the probe"
ENDING = ".probe.safetensors"  # after the name of a file
_OPENS = "opens and answers"
_COUNTS = ("weights", "zeros", "macs")


def probe_of(path: Path) -> Path:
    """Where the probe of an exported file or directory is."""
    return path / PROBE if path.is_dir() else path.with_name(path.name + ENDING)


def check_inputs(example: Any) -> None:
    """Raises:
    UsageError: an input that is no tensor, and could not be stored for `verify`, or no sample at all.
    """
    if empty := [list(tensor.shape) for tensor in tensors_in(example) if tensor.dim() and not len(tensor)]:
        raise UsageError(f"an input of shape {empty[0]} holds no sample: there would be nothing to compare.")
    if other := not_tensors(example):
        raise UsageError(f"an exported model is probed with tensors, and an input is of type {other[0]}.")


def not_tensors(example: Any) -> list[str]:
    """Types of the inputs that are no tensors."""
    args, kwargs = as_arguments(example)
    return [type(value).__name__ for value in (*args, *kwargs.values()) if not isinstance(value, Tensor)]


def replace_constants(example: Any) -> Any:
    """The inputs themselves, or normal draws where a tensor of real numbers says nothing because all are the same."""
    draw = generator(0)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        same = bool((value == value.flatten()[0]).all())
        return torch.randn(value.shape, generator=draw).to(value) if same else value

    if isinstance(example, dict):
        return {name: one(value) for name, value in example.items()}
    return tuple(map(one, example)) if isinstance(example, tuple) else one(example)


def counts_of(opened: Opened, example: Any) -> dict[str, int]:
    """`{weights, zeros, macs}`: entries of its matrices and kernels, those that are zero, and MACs on these inputs."""
    return {**_counted(opened.weights()), "macs": opened.macs(example)}


def _counted(tensors: Iterable[Tensor]) -> dict[str, int]:
    held = list(tensors)
    zeros = sum(tensor.numel() - int(torch.count_nonzero(tensor.to_dense())) for tensor in held)
    return {"weights": sum(tensor.numel() for tensor in held), "zeros": zeros}


def save_probe(
    path: Path, form: str, opened: Opened, example: Any, answers: Sequence[Tensor], run: Path | None = None
) -> None:
    """Write the probe of what was exported to `path`, from a run or from a model alone."""
    args, kwargs = as_arguments(example)
    inputs = [*args, *kwargs.values()]
    promise = {
        "form": form,
        "files": {name: digest(file) for name, file in _files(path).items()},
        "counts": counts_of(opened, example),
        "inputs": [None] * len(args) + list(kwargs),
        "run": digest(run / PLAIN)["sha256"] if run else None,
    }
    tensors = {f"input.{i}": value.detach().cpu() for i, value in enumerate(inputs)}
    tensors |= {f"output.{i}": value.detach().cpu() for i, value in enumerate(answers)}
    save_tensors(probe_of(path), tensors, "probe", promise)


def probe_rows(
    path: Path,
    *,
    called: Path | None = None,
    origins: Sequence[str | None] = (),
    ask: bool = True,
    model: nn.Module | None = None,
    trust: bool = False,
) -> list[Row]:
    """What was promised of an exported file or directory, and what is found; opened only where not one bit differs.

    Args:
        called: what rows call it; None: by its name alone.
        origins: SHA-256 of the model.safetensors that it may come from, None for that of no run; (): whichever.
        ask: whether what a runtime reads is opened, counted and asked, or only held to the digests.
        model: the dense model, to ask what files of tensors alone make of it.
        trust: whether a form that can run any code is opened, counted and asked; whatever `ask` is.
    Raises:
        UsageError: what opens it is not installed.
    """
    called = called or Path(path.name)
    probe, name = probe_of(path), str(called / PROBE if path.is_dir() else f"{called}{ENDING}")
    try:
        tensors, promise = stored(probe)
    except UsageError as error:
        return [checked(name, "opens", "a whole file", str(error), passed=False)]
    rows = [checked(name, "untouched", "yes", "yes" if untouched(probe) else "no")]
    if not rows[0]["passed"]:
        return rows
    if origins:
        run = promise.get("run")
        rows.append(checked(name, "of this run", origins[0], run, passed=run in origins))
    try:
        rows += _digest_rows(path, called, name, promise)
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        problem = f"cannot be understood ({type(error).__name__}: {error})"
        rows.append(checked(name, "metadata", "what was promised", problem, passed=False))
    if not all(each["passed"] for each in rows):
        return rows
    try:
        return rows + _opened_rows(path, called, promise, tensors, model, ask=ask, trust=trust)
    except UsageError:
        raise
    except ImportError as error:  # the file is what it was: what opens it is not
        raise UsageError(f"{path} cannot be opened here: {first_line(error).rstrip('.')}.") from error
    except Exception as error:  # noqa: BLE001 - runtimes raise whatever a broken file makes them
        said = first_line(error)
        return [*rows, checked(str(called), _OPENS, "yes", said, passed=False)]


def _digest_rows(path: Path, called: Path, probe: str, promise: dict[str, Any]) -> list[Row]:
    files, promised = _files(path), promise["files"]
    rows = [checked(str(called), "files", sorted(promised), sorted(files))]
    rows.append(checked(probe, "counts", list(_COUNTS), list(promise["counts"])))
    for name in sorted(files.keys() & promised.keys()):
        found, row = digest(files[name]), str(called / name if path.is_dir() else called)
        rows.append(checked(row, "bytes on disk", promised[name]["bytes"], found["bytes"]))
        rows.append(checked(row, "sha256", promised[name]["sha256"], found["sha256"]))
    return rows


def _opened_rows(
    path: Path,
    called: Path,
    promise: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None,
    *,
    ask: bool,
    trust: bool,
) -> list[Row]:
    """Counts, and outputs where the file says all that it takes to ask for them or the model is there."""
    form, counts = FORMS.get(str(promise["form"])), promise["counts"]
    if form and form.runs_code and not trust:
        return [checked(str(called), _OPENS, "only where trusted", "not opened (--trust opens it)", passed=True)]
    if form and (ask or form.runs_code):
        return _answers(called, promise, tensors, form.open(path))
    if model and not form:
        return _answers(called, promise, tensors, opened_with(load_into(model, path), path))
    found = {} if form else _counted(weights_of(path))
    return [checked(str(called), kind, counts[kind], found[kind]) for kind in found]


def holds_tensors(path: Path) -> bool:
    """Whether what the probe lies beside is a file of tensors, without code that a runtime could ask."""
    try:
        return stored(probe_of(path))[1].get("form") not in FORMS
    except UsageError:
        return False


def _files(path: Path) -> dict[str, Path]:
    """Every file of an export but its probe; a file alone is called "model", for it may be renamed."""
    return {str(file.relative_to(path)) if path.is_dir() else "model": file for file in files_of(path)}


def _answers(called: Path, promise: dict[str, Any], tensors: dict[str, Tensor], opened: Opened) -> list[Row]:
    """Counts and outputs of the model, opened again."""
    inputs, answers = (_numbered(tensors, kind) for kind in ("input", "output"))
    names = promise["inputs"]
    example = dict(zip(names, inputs, strict=True)) if any(names) else tuple(inputs)
    error = off(opened.ask(example), answers)  # first: a model may count its calls
    found = counts_of(opened, example)
    rows = [checked(str(called), kind, promised, found[kind]) for kind, promised in promise["counts"].items()]
    near = allowed(answers)
    promised = f"the run's, to {near:.1g} of the largest"
    rows.append(checked(str(called), ANSWERS, promised, f"off by {error:.1g}", passed=error <= near))
    return rows


def _numbered(tensors: dict[str, Tensor], kind: str) -> list[Tensor]:
    count = sum(name.startswith(f"{kind}.") for name in tensors)
    return [tensors[f"{kind}.{i}"] for i in range(count)]
