"""The probe beside an exported model, by which it is verified anywhere: digests, counts, inputs, outputs of the run.

FILE.probe.safetensors, or allot.probe.safetensors in a directory. Its metadata holds the promises, sealed as always:

    {"format": "probe", "form": "onnx" and so on, "files": {name: {"bytes", "sha256"}},
     "counts": {"weights", "zeros", "macs"}, "inputs": names of arguments, null for those by position,
     "run": SHA-256 of the model.safetensors that the export was made from, null without a run}

Tensors `input.N` and `output.N` are in the order of the arguments and of the outputs; of an output with more than
4,194,304 numbers the last ones are kept, flat. In files that hold only tensors,
weights and zeros are counted from the file; MACs and outputs need the model's code, which the user passes to `verify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError, first_line
from allot.export.certificate.rows import Row, checked, digest, digest_rows
from allot.export.files.formats import PLAIN, PROBE, save_tensors, stored, untouched
from allot.export.runtimes.answers import PIECE, allowed, off
from allot.export.runtimes.forms import FORMS
from allot.export.runtimes.from_file import load_into, opened_with, weights_of
from allot.export.runtimes.opened import Opened, files_of
from allot.network.draws import generator
from allot.network.preserved import preserved
from allot.network.trees import as_arguments, tensors_in

ANSWERS = "outputs on the probe"
ENDING = ".probe.safetensors"  # after the name of a file
_OPENS = "opens and answers"
_COUNTS = ("weights", "zeros", "macs")


def probe_of(path: Path) -> Path:
    """The path of the probe of an exported file or directory.

    >>> probe_of(Path("model.onnx")).name
    'model.onnx.probe.safetensors'
    """
    return path / PROBE if path.is_dir() else path.with_name(path.name + ENDING)


def check_inputs(example: Any) -> None:
    """Raises:
    UsageError: an input that is no tensor, and cannot be stored for `verify`, or an input without a sample.
    """
    if empty := [list(tensor.shape) for tensor in tensors_in(example) if tensor.dim() and not len(tensor)]:
        raise UsageError(f"an input of shape {empty[0]} holds no sample: there would be nothing to compare.")
    if types := not_tensors(example):
        raise UsageError(f"an exported model is probed with tensors, and an input is of type {types[0]}.")


def not_tensors(example: Any) -> list[str]:
    """Types of the inputs that are no tensors."""
    args, kwargs = as_arguments(example)
    return [type(value).__name__ for value in (*args, *kwargs.values()) if not isinstance(value, Tensor)]


def replace_constants(example: Any) -> Any:
    """The inputs, with normal draws in place of floating-point tensors whose numbers are all the same."""
    draw = generator(0)

    def replaced(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        constant = bool((value == value.flatten()[0]).all())
        return torch.randn(value.shape, generator=draw).to(value) if constant else value

    if isinstance(example, dict):
        return {name: replaced(value) for name, value in example.items()}
    return tuple(map(replaced, example)) if isinstance(example, tuple) else replaced(example)


def counts_of(opened: Opened, example: Any) -> dict[str, int]:
    """`{weights, zeros, macs}`: entries of its matrices and kernels, zeros among them, and MACs on these inputs."""
    return {**_count_weights(opened.weights()), "macs": opened.macs(example)}


def _count_weights(tensors: Iterable[Tensor]) -> dict[str, int]:
    counts = {"weights": 0, "zeros": 0}
    for tensor in tensors:
        counts["weights"] += tensor.numel()
        counts["zeros"] += tensor.numel() - int(torch.count_nonzero(tensor.to_dense()))
    return counts


def save_probe(
    path: Path, form: str, opened: Opened, example: Any, answers: Sequence[Tensor], run: Path | None = None
) -> None:
    """Write the probe of the export at `path`, of a run or of a model alone."""
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
    tensors |= {f"output.{i}": _last(value.detach()).cpu().clone() for i, value in enumerate(answers)}
    save_tensors(probe_of(path), tensors, "probe", promise)


def _last(output: Tensor) -> Tensor:
    """An output, or the last of its numbers where there are more than are kept: those of a text see all of it."""
    return output if output.numel() <= PIECE else output.flatten()[-PIECE:]


def probe_rows(
    path: Path,
    *,
    called: Path | None = None,
    origins: Sequence[str | None] = (),
    ask: bool = True,
    model: nn.Module | None = None,
    trust: bool = False,
) -> list[Row]:
    """The promises of an exported file or directory, and the values found; opened only if its digests are right.

    Args:
        called: its name in the rows; None: the name of its path.
        origins: SHA-256 of each model.safetensors that it may come from, None for no run; (): any.
        ask: whether a file for a runtime is opened, counted and compared; False: its digests alone.
        model: the dense model, into which files of tensors are loaded to compare outputs.
        trust: whether a form that can run any code is opened, counted and compared, whatever `ask` is.
    Raises:
        UsageError: the runtime is not installed.
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
    if not all(row["passed"] for row in rows):
        return rows
    try:
        form, counts = FORMS.get(str(promise["form"])), promise["counts"]
        if form and form.runs_code and not trust:
            only = "only where trusted"
            return [*rows, checked(str(called), _OPENS, only, "not opened (--trust opens it)", passed=True)]
        if form and (ask or form.runs_code):
            return rows + _answer_rows(called, promise, tensors, form.open(path))
        if model and not form:
            with preserved(model):
                return rows + _answer_rows(called, promise, tensors, opened_with(load_into(model, path), path))
        recounted = {} if form else _count_weights(weights_of(path))
        return rows + [checked(str(called), kind, counts[kind], count) for kind, count in recounted.items()]
    except UsageError:
        raise
    except ImportError as error:  # the file is right, the runtime is missing
        raise UsageError(f"{path} cannot be opened here: {first_line(error).rstrip('.')}.") from error
    except Exception as error:  # noqa: BLE001 - runtimes raise whatever a broken file makes them
        return [*rows, checked(str(called), _OPENS, "yes", first_line(error), passed=False)]


def _digest_rows(path: Path, called: Path, probe: str, promise: dict[str, Any]) -> list[Row]:
    files, promised = _files(path), promise["files"]
    rows = [checked(str(called), "files", sorted(promised), sorted(files))]
    rows.append(checked(probe, "counts", list(_COUNTS), list(promise["counts"])))
    for name in sorted(files.keys() & promised.keys()):
        rows += digest_rows(str(called / name if path.is_dir() else called), promised[name], files[name])
    return rows


def holds_tensors(path: Path) -> bool:
    """Whether the probe is that of a file of tensors, without code that a runtime can run."""
    try:
        return stored(probe_of(path))[1].get("form") not in FORMS
    except UsageError:
        return False


def _files(path: Path) -> dict[str, Path]:
    """Every file of an export but its probe; a single file is called "model", because it may be renamed."""
    return {str(file.relative_to(path)) if path.is_dir() else "model": file for file in files_of(path)}


def _answer_rows(called: Path, promise: dict[str, Any], tensors: dict[str, Tensor], opened: Opened) -> list[Row]:
    """Rows of counts and outputs of an opened model."""
    counts = {kind: sum(name.startswith(f"{kind}.") for name in tensors) for kind in ("input", "output")}
    inputs, answers = ([tensors[f"{kind}.{i}"] for i in range(count)] for kind, count in counts.items())
    names = promise["inputs"]
    example = dict(zip(names, inputs, strict=True)) if any(names) else tuple(inputs)
    # first: a model may count its calls
    error = off([_last(answer) for answer in opened.ask(example)], [_last(answer) for answer in answers])
    recounted = counts_of(opened, example)
    rows = [checked(str(called), kind, promised, recounted[kind]) for kind, promised in promise["counts"].items()]
    tolerance = allowed(answers)
    promised = f"the run's, to {tolerance:.1g} of the largest"
    rows.append(checked(str(called), ANSWERS, promised, f"off by {error:.1g}", passed=error <= tolerance))
    return rows
