"""Models written for a runtime, re-opened there, compared with what they were made from, and timed side by side.

safetensors, bitmask, slim   the run's own files     opened by allot
csr, 2:4                     see `allot.realise.sparse`
program, onnx, openvino, hf  see `allot.realise.forms`
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.calibration import moved
from allot.channels import copied, shapes_of
from allot.errors import AllotError, UsageError, VerificationError, unknown
from allot.evaluate import attempt
from allot.layers import Layer, Scope
from allot.macs import measured
from allot.masks import write_into
from allot.realise.clock import Beside, side_by_side
from allot.realise.compare import SLIM_TOLERANCE, TOLERANCE, allowed, off
from allot.realise.files import BITMASK, CSR, PLAIN, PLAN, SLIM, csr, load, read, save_csr
from allot.realise.filled import filled
from allot.realise.forms import FORMS, Opened, apply, flat
from allot.realise.probe import check_inputs, drawn, not_tensors, probe_of, save_probe
from allot.realise.slim import load_slim
from allot.realise.sparse import (
    converted,
    converted_beside,
    has_sparse_tensor_cores,
    linear_layers,
    load_csr,
    semi_structured,
)
from allot.store import replacing, write

FILES = {"safetensors": PLAIN, "bitmask": BITMASK, "slim": SLIM}  # what a run holds already
EVERY = (*FILES, "csr", "2:4", *FORMS)
HALF_TOLERANCE = 2e-2  # of the largest output, in half precision


def export(model: nn.Module, example: Any, path: str | Path, *, to: str | None = None) -> Opened:
    """Write `model` to `path`, open it again, check that it answers as `model` does, and put a probe beside it.

    Args:
        example: a batch of inputs as tensors; the batch dimension, the first of each, is left open.
        to: "program", "onnx", "openvino" or "hf"; None: what the file's ending says, .pt2 or .onnx.
    Raises:
        UsageError: an unknown form, a missing extra, or a model that cannot be written so.
        VerificationError: the file answers otherwise than the model.
    """
    path = Path(path)
    if to is None:
        to = form_of(path) or path.suffix
    check_inputs(example)
    opened, answers = reopened(model, example, path, to)
    save_probe(path, to, opened, example, answers)
    return opened


def form_of(path: str | Path | None) -> str | None:
    """The form that the ending of a file says; None where it says none."""
    endings = {form.ending: name for name, form in FORMS.items() if form.ending} | {".safetensors": "safetensors"}
    return endings.get(Path(path).suffix) if path else None


def reopened(model: nn.Module, example: Any, path: Path, to: str) -> tuple[Opened, list[Tensor]]:
    """As `export`, without a probe; with the model's answers."""
    if to not in FORMS:
        raise unknown("form of export", to, FORMS)
    form = FORMS[to]
    if not form.ending and path.is_dir() and any(path.iterdir()) and not probe_of(path).exists():
        raise UsageError(f"{path} holds other files: {to} takes a directory of its own.")
    with torch.no_grad(), replacing(path) if form.ending else _replacing_directory(path) as temporary:
        try:
            # each on a copy of its own: what a forward writes to stays out of the model, and out of the file
            wanted = flat(apply(copied(model).eval(), example))
            form.write(copied(model).eval(), example, temporary)
            found = form.open(temporary).run(example)
        except (AllotError, OSError):
            raise
        except Exception as problem:
            first: BaseException = problem
            while first.__cause__ is not None:  # exporters wrap what went wrong in what to do about it
                first = first.__cause__
            said = (str(first).strip() or type(first).__name__).splitlines()[0]
            raise UsageError(f"{type(model).__name__} cannot be written as {to} for such inputs: {said}") from problem
        if not wanted:
            raise UsageError(f"{type(model).__name__} returns no tensor: there is nothing to compare.")
        if not (error := off(found, wanted)) <= allowed(wanted):
            raise VerificationError(f"{path} answers otherwise than the model: off by {error:.2g} of the largest.")
    return form.open(path), wanted


@dataclass
class Made:
    """What one form of a run's model came to.

    Attributes:
        opened, other: the sparse and the dense model in this form.
        model: the sparse one in PyTorch, for counting.
        macs: what it takes in scope, where that cannot be counted from shapes.
        near: how far outputs may be off, as a share of the largest.
        note: what more there is to say.
    """

    file: Path
    opened: Opened
    other: Opened
    model: nn.Module
    near: float = 0.0  # the same numbers, the same answers
    macs: int | None = None
    note: str = ""


def exported(
    dense: nn.Module, run: Path, report: Mapping[str, Any], example: Any, to: str, out: Path | None = None
) -> dict[str, Any]:
    """What a run's model is in one form, next to the dense model in the same form, both opened again and timed in turn.

    Args:
        dense: the model that the run pruned; its weights are those that it had then.
        run: a finished run directory.
        report: its report.json.
        example: a batch of one input; where all of its numbers are the same, normal draws take its place.
        to: one of EVERY.
        out: the file (of slim, openvino and hf, a directory); None: beside the others in the run.
    Returns:
        `{form, file, bytes, dense_bytes, limit, error, params, dense_params, macs, dense_macs, milliseconds: {dense,
        sparse}, faster, spread, verdict, note}`: `limit` is the information limit of these weights in bytes, `error`
        the largest difference of outputs from the run's masked model over their largest value, `faster` how many times
        as fast as dense, `spread` from and to how many in half of the rounds, `verdict` "faster", "no faster" or
        "slower".
    Raises:
        UsageError: an unknown form, or one that this model or installation does not allow.
        VerificationError: what was written answers otherwise than the run's model, or takes other MACs than promised.
    """
    if to not in EVERY:
        raise unknown("form of export", to, EVERY)
    dense, example = copied(dense).eval(), drawn(example)
    masked = copied(dense)
    write_into(masked, load(run))
    layers = [row["name"] for row in report["layers"]]
    if to in FILES:
        made = _file(dense, run, to, out)
    elif to == "csr":
        made = _csr(dense, masked, run, layers, example, out)
    elif to == "2:4":
        made, example, masked = _semi_structured(dense, masked, run, report, layers, example, out)
    else:
        made = _form(dense, masked, run, example, to, out)
    with torch.no_grad():
        wanted = flat(apply(masked, example))
    near = allowed(wanted, made.near) if made.near else 0.0
    if not (error := off(made.opened.run(example), wanted)) <= near:
        raise VerificationError(
            f"{made.file} answers otherwise than the run's model: off by {error:.2g} of the largest."
        )
    macs = _macs(made.model, example, layers) if made.macs is None else made.macs
    slim = to in ("slim", *FORMS) and (run / SLIM).exists()
    if slim and macs != report["macs"]["sparse"]:
        raise VerificationError(f"{made.file} takes {macs:,} MACs; the run promised {report['macs']['sparse']:,}.")
    if to in (*FILES, "csr") and not not_tensors(example):  # see `allot.realise.certificate.verify`
        save_probe(made.file, to, made.opened, example, wanted)
    taken = side_by_side(lambda: made.other.run(example), lambda: made.opened.run(example))
    return {
        "form": to,
        "file": str(made.file),
        "bytes": made.opened.bytes,
        "dense_bytes": made.other.bytes,
        "limit": report["bytes"]["limit"],
        "error": error,
        "params": sum(p.numel() for p in made.model.parameters()),
        "dense_params": sum(p.numel() for p in dense.parameters()),
        "macs": macs,
        "dense_macs": _macs(dense, example, layers),
        "milliseconds": {"dense": 1000 * taken.dense, "sparse": 1000 * taken.sparse},
        "faster": taken.faster,
        "spread": list(taken.spread),
        "verdict": taken.verdict,
        "note": made.note,
    }


def _file(dense: nn.Module, run: Path, to: str, out: Path | None) -> Made:
    file = _copied_file(run, to, out)
    sparse = filled(dense, file)
    other = Opened.module(dense, (run / PLAIN).stat().st_size)
    return Made(
        file, Opened.module(sparse, file.stat().st_size), other, sparse, SLIM_TOLERANCE if to == "slim" else 0.0
    )


def _form(dense: nn.Module, masked: nn.Module, run: Path, example: Any, to: str, out: Path | None) -> Made:
    file = out or run / (f"model{FORMS[to].ending}" if FORMS[to].ending else to)
    slim = (run / SLIM).exists() and to != "hf"  # no configuration of transformers tells channels of single layers
    sparse = load_slim(dense, run) if slim else masked
    opened = export(sparse, example, file, to=to)
    with tempfile.TemporaryDirectory() as folder:
        other, _ = reopened(dense, example, Path(folder) / f"dense{FORMS[to].ending}", to)
    return Made(file, opened, other, sparse, TOLERANCE)


def _csr(dense: nn.Module, masked: nn.Module, run: Path, names: list[str], example: Any, out: Path | None) -> Made:
    file = out or run / CSR
    layers = linear_layers(masked, names)
    faster = converted_beside(layers, masked, example, csr)
    chosen = [name for name, taken in faster.items() if taken.pays]
    state, about = read(run / PLAIN)
    state = {name: value for name, value in state.items() if name not in about["aliases"]}
    save_csr(file, state, {key: about[key] for key in about if key not in ("format", "seal", "pad")}, chosen)
    sparse = load_csr(dense, file)
    try:
        attempt(sparse, example, {})
    except Exception as error:  # fused kernels, like those of a transformer's encoder, take no sparse weights
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{type(dense).__name__} does not run with sparse rows: {said}") from error
    nonzero = {name: int(torch.count_nonzero(layers[name].weight)) / layers[name].weight.numel() for name in chosen}
    macs = sum(round(nonzero.get(name, 1) * count) for name, count in _layer_macs(masked, example, names).items())
    other = Opened.module(dense, (run / PLAIN).stat().st_size)
    opened = Opened.module(sparse, file.stat().st_size)
    return Made(file, opened, other, sparse, TOLERANCE, macs, _chosen("sparse rows", faster, chosen))


def _semi_structured(
    dense: nn.Module,
    masked: nn.Module,
    run: Path,
    report: Mapping[str, Any],
    names: list[str],
    example: Any,
    out: Path | None,
) -> tuple[Made, Any, nn.Module]:
    """The run's model on the GPU in half precision; with it, the inputs and the masked model there."""
    if report["pattern"] != "2:4":
        raise UsageError(f"the run's pattern is {report['pattern']}: 2:4 takes runs of --pattern 2:4.")
    if not has_sparse_tensor_cores():
        raise UsageError("2:4 runs on a GPU with sparse tensor cores (compute capability 8.0): there is none here.")
    file = _copied_file(run, "bitmask", out)
    there, half, masked = (each.to("cuda", torch.float16) for each in (copied(masked), copied(dense), masked))
    example = moved(example, torch.device("cuda"), torch.float16)
    faster = converted_beside(linear_layers(there, names), there, example, semi_structured)
    chosen = [name for name, taken in faster.items() if taken.pays]
    sparse = converted(there, chosen, semi_structured)
    counted = _layer_macs(masked, example, names)
    macs = sum(count // 2 if name in chosen else count for name, count in counted.items())
    opened, other = Opened.module(sparse, file.stat().st_size), Opened.module(half, (run / PLAIN).stat().st_size)
    note = _chosen("2:4 on the GPU", faster, chosen)
    return Made(file, opened, other, masked, HALF_TOLERANCE, macs, note), example, masked


def _chosen(what: str, taken: Mapping[str, Beside], chosen: list[str]) -> str:
    if not taken:
        return f"no linear layer was called by itself, with numbers that {what} take: none is converted"
    best = max(taken, key=lambda name: taken[name].faster)
    times = f"{taken[best].faster:.2f}x, {best}"
    return f"{len(chosen)} of {len(taken)} linear layers are faster as {what} here; at best {times}"


@contextmanager
def _replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory whose files take their places in `path` when the block ends well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            yield Path(folder)
            path.mkdir(exist_ok=True)
            for file in Path(folder).iterdir():
                file.replace(path / file.name)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}.") from error


def _copied_file(run: Path, to: str, out: Path | None) -> Path:
    """The run's own file of this form, copied to `out` (of slim, a directory) where that is given.

    Raises:
        UsageError: the run has none.
    """
    name = FILES[to]
    if not (run / name).exists() and to == "slim":
        raise UsageError(
            f"{run} pruned single weights: slim is for runs of channels (--method dsa, --pattern channels)."
        )
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


def _macs(model: nn.Module, example: Any, names: list[str]) -> int:
    """Multiply-accumulates of these layers, counted while the model runs."""
    return sum(_layer_macs(model, example, names).values())


def _layer_macs(model: nn.Module, example: Any, names: list[str]) -> dict[str, int]:
    scope = Scope.of(model)
    known = {layer.name: layer for layer in scope}
    shapes = shapes_of(model)
    # the projections of an attention with fewer heads are no layer that could be pruned again
    layers = tuple(known.get(name, Layer(name, tuple(shapes[name]), "attention_in")) for name in names)
    counted = measured(replace(scope, layers=layers), model, lambda: attempt(model, example, {}))
    return {layer.name: layer.macs or 0 for layer in counted}
