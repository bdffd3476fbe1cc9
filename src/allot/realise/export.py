"""Models written for a runtime, re-opened there, compared with what they were made from, and timed side by side.

safetensors, bitmask, slim   the run's own files     opened by allot
hf        a directory of transformers                opened by from_pretrained
program   a `torch.export` program (.pt2)            opened by torch.export.load
onnx      ONNX (.onnx), any batch size               opened by ONNX Runtime; extra `onnx`
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.channels import copied, shapes_of
from allot.errors import AllotError, UsageError, VerificationError, unknown
from allot.evaluate import attempt
from allot.layers import Layer, Scope
from allot.macs import measured
from allot.masks import as_arguments, write_into
from allot.proof import tensors_in
from allot.realise.compare import SLIM_TOLERANCE, TOLERANCE, off
from allot.realise.files import BITMASK, PLAIN, PLAN, SLIM, load
from allot.realise.slim import load_slim
from allot.store import replacing, write

Run = Callable[[Any], list[Tensor]]
FILES = {"safetensors": PLAIN, "bitmask": BITMASK, "slim": SLIM}  # what a run holds already
ENDINGS = {"program": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True)
class Opened:
    """A written model, opened again: what runs it, and the size of its file in bytes."""

    run: Run
    bytes: int


def export(model: nn.Module, example: Any, path: str | Path, *, to: str | None = None) -> Opened:
    """Write `model` to `path`, open it again, and check that it answers as `model` does.

    Args:
        example: a batch of inputs as tensors; the batch dimension, the first of each, is left open.
        to: "program" or "onnx"; None: what the file's ending says, .pt2 or .onnx.
    Raises:
        UsageError: an unknown form, a missing extra, or a model that cannot be written so.
        VerificationError: the file answers otherwise than the model.
    """
    path = Path(path)
    to = {ending: form for form, ending in ENDINGS.items()}.get(path.suffix, path.suffix) if to is None else to
    if to not in FORMS:
        raise unknown("form of export", to, FORMS)
    model = copied(model).eval()  # what its forward writes to stays out of the model that was passed in
    with torch.no_grad(), replacing(path) as temporary:
        try:
            wanted = _flat(_apply(model, example))
            FORMS[to][0](model, example, temporary)
            opened = open_export(temporary, to)
            found = opened.run(example)
        except (AllotError, OSError):
            raise
        except Exception as problem:
            said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise UsageError(f"{type(model).__name__} cannot be written as {to} for such inputs: {said}") from problem
        if not (error := off(found, wanted)) <= TOLERANCE:
            raise VerificationError(f"{path} answers otherwise than the model: off by {error:.2g} of the largest.")
    return opened


def open_export(path: str | Path, to: str) -> Opened:
    """What `export` wrote, opened again."""
    path = Path(path)
    return Opened(FORMS[to][1](path), path.stat().st_size)


def timed(runs: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each, taken in turn, so that a busy machine slows all alike.

    Args:
        runs: name -> what is timed.
        seconds: how long, in all; `least` rounds in any case.
    """
    for run in runs.values():
        run()  # the first one allocates
    taken: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while len(next(iter(taken.values()))) < least or time.perf_counter() - started < seconds:
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - before)
    return {name: statistics.median(some) for name, some in taken.items()}


def exported(
    dense: nn.Module, run: Path, report: Mapping[str, Any], example: Any, to: str, out: Path | None = None
) -> dict[str, Any]:
    """What a run's model is in one form, next to the dense model in the same form, both opened again and timed in turn.

    Args:
        dense: the model that the run pruned; its weights are those that it had then.
        run: a finished run directory.
        report: its report.json.
        example: a batch of one input.
        to: a key of FILES or FORMS, or "hf".
        out: the file (of slim and hf, a directory); None: beside the others in the run.
    Returns:
        `{form, file, bytes, dense_bytes, error, params, dense_params, macs, dense_macs, milliseconds: {dense, sparse},
        faster}`; `error` is the largest difference of outputs from the run's masked model over their largest value.
    Raises:
        UsageError: an unknown form, or one that this model or installation does not allow.
        VerificationError: what was written answers otherwise than the run's model, or takes other MACs than promised.
    """
    if to not in (*FILES, *FORMS, "hf"):
        raise unknown("form of export", to, (*FILES, *FORMS, "hf"))
    dense = copied(dense).eval()
    masked = copied(dense)
    write_into(masked, load(run))
    slim = to in ("slim", *FORMS) and (run / SLIM).exists()
    with torch.no_grad():
        wanted = _flat(_apply(masked, example))
    other, before = _plainly(dense), (run / PLAIN).stat().st_size
    if to in FILES:
        file = _copied_file(run, to, out)
        sparse = load_slim(dense, file) if to == "slim" else copied(dense)
        if to != "slim":
            write_into(sparse, load(file))
        opened = Opened(_plainly(sparse), file.stat().st_size)
    elif to == "hf":
        file = out or run / "hf"
        sparse, size = _through_pretrained(masked, file)
        opened = Opened(_plainly(sparse), size)
    else:
        file = out or run / f"model{ENDINGS[to]}"
        sparse = load_slim(dense, run) if slim else masked
        opened = export(sparse, example, file, to=to)
        with tempfile.TemporaryDirectory() as folder:
            whole = export(dense, example, Path(folder) / "dense", to=to)
        other, before = whole.run, whole.bytes
    allowed = (
        TOLERANCE if to in FORMS else SLIM_TOLERANCE if to == "slim" else 0.0
    )  # the same numbers, the same answers
    if not (error := off(opened.run(example), wanted)) <= allowed:
        raise VerificationError(f"{file} answers otherwise than the run's model: off by {error:.2g} of the largest.")
    layers = [row["name"] for row in report["layers"]]
    if slim and (counted := _macs(sparse, example, layers)) != report["macs"]["sparse"]:
        raise VerificationError(f"{file} takes {counted:,} MACs; the run promised {report['macs']['sparse']:,}.")
    taken = timed({"dense": lambda: other(example), "sparse": lambda: opened.run(example)})
    return {
        "form": to,
        "file": str(file),
        "bytes": opened.bytes,
        "dense_bytes": before,
        "error": error,
        "params": sum(p.numel() for p in sparse.parameters()),
        "dense_params": sum(p.numel() for p in dense.parameters()),
        "macs": _macs(sparse, example, layers),
        "dense_macs": _macs(dense, example, layers),
        "milliseconds": {name: 1000 * seconds for name, seconds in taken.items()},
        "faster": taken["dense"] / taken["sparse"],
    }


def _copied_file(run: Path, to: str, out: Path | None) -> Path:
    """The run's own file of this form, copied to `out` (of slim, a directory) where that is given.

    Raises:
        UsageError: the run has none.
    """
    name = FILES[to]
    if not (run / name).exists():
        others = [form for form, file in FILES.items() if (run / file).exists()]
        raise UsageError(f"{run} has no {name}: {', '.join(others)} and {', '.join(FORMS)} can be exported.")
    if out is None:
        return run / name
    if to != "slim":
        write(out, (run / name).read_bytes())
        return out
    out.mkdir(parents=True, exist_ok=True)
    for each in (SLIM, PLAN):
        write(out / each, (run / each).read_bytes())
    return out / SLIM


def _through_pretrained(model: nn.Module, directory: Path) -> tuple[nn.Module, int]:
    """What `from_pretrained` opens of what `save_pretrained` wrote, and how many bytes that is; zeros folded in.

    Raises:
        UsageError: a model that is not of transformers.
    """
    known: Any = model
    if not hasattr(model, "save_pretrained") or not hasattr(type(model), "from_pretrained"):
        raise UsageError(f"{type(model).__name__} has no save_pretrained: hf is for models of transformers.")
    known.save_pretrained(directory, safe_serialization=True)
    again = type(known).from_pretrained(directory)
    return again.eval(), sum(file.stat().st_size for file in directory.iterdir())


def _macs(model: nn.Module, example: Any, names: list[str]) -> int:
    """Multiply-accumulates of these layers, counted while the model runs."""
    scope = Scope.of(model)
    known = {layer.name: layer for layer in scope}
    shapes = shapes_of(model)
    # the projections of an attention with fewer heads are no layer that could be pruned again
    layers = tuple(known.get(name, Layer(name, tuple(shapes[name]), "attention_in")) for name in names)
    counted = measured(replace(scope, layers=layers), model, lambda: attempt(model, example, {}))
    return sum(layer.macs or 0 for layer in counted)


def _plainly(model: nn.Module) -> Run:
    def run(example: Any) -> list[Tensor]:
        with torch.no_grad():
            return _flat(_apply(model, example))

    return run


def _write_program(model: nn.Module, example: Any, path: Path) -> None:
    args, kwargs = as_arguments(example)
    with _quiet():
        program = _captured(model, args, kwargs)
        program.example_inputs = None  # they are all that would be pickled
        buffer = io.BytesIO()  # save looks at the ending of a path
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


def _open_program(path: Path) -> Run:
    with _quiet():
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(example: Any) -> list[Tensor]:
        with torch.no_grad():
            return _flat(_apply(module, example))

    return run


def _write_onnx(model: nn.Module, example: Any, path: Path) -> None:
    _need("onnx", "onnxscript")
    args, kwargs = as_arguments(example)
    with _quiet():
        program = torch.onnx.export(_captured(model, args, kwargs), dynamo=True, verbose=False, external_data=False)
        assert program is not None
        program.save(str(path), external_data=False)


def _open_onnx(path: Path) -> Run:
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(example: Any) -> list[Tensor]:
        args, kwargs = as_arguments(example)
        values = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        fed = {name: value.detach().cpu().numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, fed)]

    return run


FORMS: dict[str, tuple[Callable[[nn.Module, Any, Path], None], Callable[[Path], Run]]] = {
    "program": (_write_program, _open_program),
    "onnx": (_write_onnx, _open_onnx),
}


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The program, for any batch size where the model allows that."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    many = [value.repeat(2, *[1] * (value.dim() - 1)) if len(value) < 2 else value for value in tensors]
    wide = iter(many)
    args = tuple(next(wide) if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: next(wide) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    batch = torch.export.Dim("batch", min=1)
    open_batch = [{0: batch} if isinstance(v, Tensor) else None for v in args]
    shapes = (tuple(open_batch), {n: {0: batch} if isinstance(v, Tensor) else None for n, v in kwargs.items()})
    try:
        return torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes[0] if not kwargs else shapes[1])
    except Exception as first:  # noqa: BLE001 - whatever it does not like about an open batch, it may like a fixed one
        try:
            return torch.export.export(model, args, dict(kwargs))
        except Exception:  # noqa: BLE001 - and whatever it does not like at all is told in one line
            said = (str(first).strip() or type(first).__name__).splitlines()[0]
            raise UsageError(f"{type(model).__name__} cannot be captured by torch.export: {said}") from first


def _apply(model: Callable[..., Any], example: Any) -> Any:
    args, kwargs = as_arguments(example)
    return model(*args, **kwargs)


def _flat(output: Any) -> list[Tensor]:
    return list(tensors_in(output))


def _need(*modules: str) -> None:
    import importlib.util

    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)} is not installed: pip install 'allot[onnx]'.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, exporters keep what they would like to say to themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
