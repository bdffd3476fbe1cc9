"""Models written for a runtime, opened again, compared with their source, and timed beside the dense model.

A form whose products are those of the dense model is not timed: two measurements of one computation differ by chance.

safetensors, bitmask, slim   the files of the run     opened by allot
csr, 2:4                     see `allot.export.runtimes.sparse`
program, onnx, openvino, hf  see `allot.export.runtimes.forms`
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import AllotError, UsageError, VerificationError, first_line, unknown
from allot.export.certificate.probe import check_inputs, not_tensors, replace_constants, save_probe
from allot.export.files.destination import staging
from allot.export.files.formats import BITMASK, CSR, PLAIN, PLAN, SLIM, PlainState, csr, read, save_csr
from allot.export.files.reading import Stored
from allot.export.files.slim import load_slim
from allot.export.runtimes.answers import SLIM_TOLERANCE, TOLERANCE, allowed, check_answers
from allot.export.runtimes.forms import FORMS, write_and_reopen
from allot.export.runtimes.from_file import load_into, opened_with
from allot.export.runtimes.opened import Opened
from allot.export.runtimes.sparse import converted, has_sparse_tensor_cores, linear_layers, load_csr, semi_structured
from allot.export.timing.clock import AS_DENSE, Speedup, side_by_side
from allot.export.timing.sparse_layers import time_converted
from allot.network.arguments import typed
from allot.network.call import attempt, write_into
from allot.network.channels import copied, shapes_of
from allot.network.layers import Layer, Scope
from allot.network.macs import measured
from allot.network.preserved import preserved, refused_writes
from allot.network.trees import cloned
from allot.run.calibration import moved
from allot.run.driver import give_back, phase
from allot.run.store import write

FILES = {"safetensors": PLAIN, "bitmask": BITMASK, "slim": SLIM}  # files that a run holds already
EVERY = (*FILES, "csr", "2:4", *FORMS)
MOST = 5.0  # seconds of timing after which three rounds are enough
HALF_TOLERANCE = 2e-2  # of the largest output, in half precision


@typed
def export(model: nn.Module, example: Any, path: str | Path, *, to: str | None = None) -> Opened:
    """Write `model` to `path`, open the file again, compare its outputs with the model's, and write a probe.

    Args:
        example: a batch of inputs as tensors; the batch dimension, the first of each, is left open.
        to: "program", "onnx", "openvino" or "hf"; None: the form of the file's ending, .pt2 or .onnx.
    Raises:
        UsageError: an unknown form, a missing extra, or a model that cannot be written in this form.
        VerificationError: the outputs of the file differ from those of the model.

    >>> export(nn.Linear(2, 1), torch.ones(1, 2), "model.txt")
    Traceback (most recent call last):
    allot.errors.UsageError: unknown form of export '.txt'. Accepted: hf, onnx, openvino, program.
    """
    path = Path(path)
    to = form_of(path) or path.suffix if to is None else to
    if to not in FORMS:
        raise unknown("form of export", to, FORMS)
    check_inputs(example)
    with preserved(model), staging(path, directory=not FORMS[to].ending) as place:
        with refused_writes(model), suppress(Exception):  # a model that does not run is told so below
            attempt(model, cloned(example), {})
        opened, answers = write_and_reopen(model, example, place, to)
        save_probe(place, to, opened, example, answers)
    return FORMS[to].open(path)


def form_of(path: str | Path | None) -> str | None:
    """The form that belongs to the ending of a file; None for other endings.

    >>> form_of("model.onnx"), form_of("model.bin")
    ('onnx', None)
    """
    endings = {form.ending: name for name, form in FORMS.items() if form.ending} | {".safetensors": "safetensors"}
    return endings.get(Path(path).suffix) if path else None


@dataclass
class ExportedModel:
    """A run's model in one form, and the dense model in the same form.

    Attributes:
        file: the file, or directory, of the sparse model.
        sparse, dense: both models, opened.
        model: the sparse model in PyTorch, for counting.
        tolerance: largest allowed difference of outputs, as a share of the largest.
        macs: MACs of the sparse model in scope, if shapes do not determine them.
        note: a remark for the user.
        as_dense: whether PyTorch multiplies the same dense tensors as for the dense model, zeros included.
    """

    file: Path
    sparse: Opened
    dense: Opened
    model: nn.Module
    tolerance: float = 0.0  # the same numbers, the same answers
    macs: int | None = None
    note: str = ""
    as_dense: bool = False


def export_run(
    dense: nn.Module, run: Path, report: Mapping[str, Any], example: Any, to: str, out: Path | None = None
) -> dict[str, Any]:
    """Export a run's model to one form; open, compare and time it in turn with the dense model in the same form.

    Args:
        dense: the model that the run pruned, with the weights that it had then.
        run: a finished run directory.
        report: its report.json.
        example: a batch of one input; if all of its numbers are the same, normal draws replace them.
        to: one of EVERY.
        out: the file (of slim, openvino and hf, a directory); None: beside the other files of the run.
    Returns:
        `{form, file, inside, probe, bytes, dense_bytes, with_ideal_mask, error, params, dense_params, macs, dense_macs,
        milliseconds: {dense, sparse}, faster, spread, verdict, note}`: `inside` is the path of the file in the run,
        None if the file is elsewhere, `probe` whether a probe lies beside the file, `with_ideal_mask` the size
        of the run's weights with an ideal mask (see `bytes` in `allot.report.data.report`), `error` the largest
        difference of outputs from the run's masked model over their largest value, `faster` the speed-up over dense,
        `spread` the range of the speed-up in half of the rounds, `verdict` "faster", "no faster", "slower" or
        "unclear". Where the form computes the same dense products as the dense model
        (safetensors, bitmask, and csr or 2:4 without a converted layer), the verdict is "computes as dense", and
        `milliseconds`, `faster` and `spread` are None.
    Raises:
        UsageError: an unknown form, or one that this model or installation does not allow.
        VerificationError: the outputs of the file differ from those of the run's model, or its MACs from the promise.
    """
    if to not in EVERY:
        raise unknown("form of export", to, EVERY)
    try:
        with preserved(dense):
            return _export_run(dense, run, report, example, to, out)
    except (AllotError, OSError):
        raise
    except Exception as error:  # a model may raise whatever it likes
        raise UsageError(f"{type(dense).__name__} cannot be exported to {to}: {first_line(error)}") from error


def _export_run(
    dense: nn.Module, run: Path, report: Mapping[str, Any], example: Any, to: str, out: Path | None
) -> dict[str, Any]:
    if to in FORMS:
        check_inputs(example)
    if to == "hf" and (run / SLIM).exists():
        raise UsageError(
            "hf: a configuration of transformers says one width for all layers and cannot hold what is left of each: "
            "slim and onnx hold the smaller model."
        )
    dense, example = copied(dense, sharing_parameters=True).eval(), replace_constants(example)
    masked, wanted = partial(_masked, dense, run), None
    layers = [row["name"] for row in report["layers"]]
    target = _target(run, to, out)
    staged = nullcontext() if target is None else staging(target, directory=_ending(to) == "", run=run)
    with phase(f"opening {FILES.get(to, to)} and comparing outputs"), staged as place:
        if to == "2:4":
            exported, example, half = _semi_structured(dense, masked(), run, report, layers, example, place)
            masked = partial(copied, half)
        elif place is None or to in FILES:
            file = _copied_file(run, to, place)
            wanted = _answers(masked, example)
            give_back()  # this model is gone before the file is opened
            exported = _file_of_run(dense, run, to, file)
        elif to == "csr":
            exported = _csr(dense, masked(), run, layers, example, place)
        else:
            exported = _form(dense, masked(), run, example, to, place)
        wanted = wanted if wanted is not None else _answers(masked, example)
        error = _compared(exported, masked, example, wanted)
        macs = exported.macs
        if macs is None:
            macs = sum(_layer_macs(exported.model, example, layers).values())
        if to in ("slim", *FORMS) and (run / SLIM).exists() and macs != report["macs"]["sparse"]:
            promised = f"{report['macs']['sparse']:,}"
            raise VerificationError(f"{exported.file.name} takes {macs:,} MACs; the run promised {promised}.")
        probed = to != "2:4" and not not_tensors(example)  # see `allot.export.certificate.certificate.verify`
        if probed:
            save_probe(exported.file, to, exported.sparse, example, wanted, run)
        file = target / exported.file.relative_to(place) if target and place else exported.file
    resolved, home = file.resolve(), run.resolve()
    return {
        "form": to,
        "file": str(file),
        "inside": str(resolved.relative_to(home)) if resolved.is_relative_to(home) else None,
        "probe": probed,
        "bytes": exported.sparse.bytes,
        "dense_bytes": exported.dense.bytes,
        "with_ideal_mask": report["bytes"].get("with_ideal_mask"),
        "params": sum(p.numel() for p in exported.model.parameters()),
        "dense_params": sum(p.numel() for p in dense.parameters()),
        "macs": macs,
        "dense_macs": sum(_layer_macs(dense, example, layers).values()),
        "error": error,
        **_times(exported, example),
        "note": exported.note,
    }


def _times(exported: ExportedModel, example: Any) -> dict[str, Any]:
    """`{milliseconds, faster, spread, verdict}` of `export_run`."""
    if exported.as_dense:
        return {"milliseconds": None, "faster": None, "spread": None, "verdict": AS_DENSE}
    for_dense, for_sparse = cloned(example), cloned(example)
    with phase(f"timing {exported.file.name} beside the dense model"):
        taken = side_by_side(lambda: exported.dense.run(for_dense), lambda: exported.sparse.run(for_sparse), most=MOST)
    return {
        "milliseconds": {"dense": 1000 * taken.dense, "sparse": 1000 * taken.sparse},
        "faster": taken.faster,
        "spread": list(taken.spread),
        "verdict": taken.verdict,
    }


def _masked(dense: nn.Module, run: Path) -> nn.Module:
    """A copy of the dense model with the tensors of the run's model.safetensors, read one at a time."""
    model = copied(dense)
    write_into(model, PlainState.of(run / PLAIN))
    return model


def _answers(masked: Callable[[], nn.Module], example: Any, draw: int = 0) -> list[Tensor]:
    """The outputs of the run's model; of a copy that `masked` makes, because a forward pass may write to its model."""
    return Opened.module(masked()).ask(example, draw=draw)


def _compared(
    exported: ExportedModel, masked: Callable[[], nn.Module], example: Any, wanted: Sequence[Tensor]
) -> float:
    """The difference of the exported model's outputs from those of the run's model.

    Raises:
        UsageError: there is nothing to compare.
        VerificationError: the difference is larger than allowed.
    """
    tolerance = allowed(wanted, exported.tolerance) if exported.tolerance else 0.0
    problem = f"{exported.file.name} answers otherwise than the run's model"
    again = partial(_answers, masked, example, 1)
    return check_answers(problem, exported.sparse.ask(example), wanted, again, tolerance)


def _ending(to: str) -> str:
    """The ending of a form's file; "" of a form that is a directory."""
    return FORMS[to].ending if to in FORMS else "" if to == "slim" else ".safetensors"


def _target(run: Path, to: str, out: Path | None) -> Path | None:
    """The destination of an export; None if it is a file that the run holds already."""
    name = FILES.get("bitmask" if to == "2:4" else to)
    if name and (out is None or out.resolve() in ((run / name).resolve(), run.resolve())):
        return None
    return out or run / (CSR if to == "csr" else f"model{_ending(to)}" if _ending(to) else to)


def _file_of_run(dense: nn.Module, run: Path, to: str, file: Path) -> ExportedModel:
    sparse = load_into(dense, file)
    opened_dense = Opened.module(dense, (run / PLAIN).stat().st_size)
    opened, note, slim = opened_with(sparse, file), _plain_note(file), to == "slim"
    tolerance = SLIM_TOLERANCE if slim else 0.0
    return ExportedModel(file, opened, opened_dense, sparse, tolerance, note=note, as_dense=not slim)


def _plain_note(file: Path) -> str:
    """How many layers of a bitmask file are stored whole, because a mask and the kept weights would take more bytes."""
    metadata = Stored(file).metadata
    plain, layers = metadata.get("plain", 0), len(metadata.get("layers", {}))
    return f"{plain} of {layers} layers are stored whole: a mask would not make them smaller" if plain else ""


def _form(dense: nn.Module, masked: nn.Module, run: Path, example: Any, to: str, place: Path) -> ExportedModel:
    sparse = load_slim(dense, run) if (run / SLIM).exists() else masked
    opened, _ = write_and_reopen(sparse, example, place, to)
    with tempfile.TemporaryDirectory() as folder:
        opened_dense, _ = write_and_reopen(dense, example, Path(folder) / f"dense{FORMS[to].ending}", to)
    return ExportedModel(place, opened, opened_dense, sparse, TOLERANCE)


def _csr(dense: nn.Module, masked: nn.Module, run: Path, names: list[str], example: Any, place: Path) -> ExportedModel:
    layers = linear_layers(masked, names)
    speedups = time_converted(layers, masked, example, csr)
    chosen = [name for name, speedup in speedups.items() if speedup.pays]
    state, metadata = read(run / PLAIN)
    state = {name: value for name, value in state.items() if name not in metadata["aliases"]}
    save_csr(place, state, {key: metadata[key] for key in metadata if key not in ("format", "seal", "pad")}, chosen)
    sparse = load_csr(dense, place)
    try:
        attempt(sparse, cloned(example), {})
    except Exception as error:  # fused kernels, like those of a transformer's encoder, take no sparse weights
        raise UsageError(f"{type(dense).__name__} does not run with sparse rows: {first_line(error)}") from error
    nonzero = {name: int(torch.count_nonzero(layers[name].weight)) / layers[name].weight.numel() for name in chosen}
    macs = sum(round(nonzero.get(name, 1) * count) for name, count in _layer_macs(masked, example, names).items())
    opened_dense = Opened.module(dense, (run / PLAIN).stat().st_size)
    note = _conversion_note("sparse rows", speedups, chosen)
    opened = opened_with(sparse, place)
    return ExportedModel(place, opened, opened_dense, sparse, TOLERANCE, macs, note, as_dense=not chosen)


def _semi_structured(
    dense: nn.Module,
    masked: nn.Module,
    run: Path,
    report: Mapping[str, Any],
    names: list[str],
    example: Any,
    place: Path | None,
) -> tuple[ExportedModel, Any, nn.Module]:
    """The run's model on the GPU in half precision, and the inputs and the masked model on the GPU."""
    if report["pattern"] != "2:4":
        raise UsageError(f"the run's pattern is {report['pattern']}: 2:4 takes runs of --pattern 2:4.")
    if not has_sparse_tensor_cores():
        raise UsageError("2:4 runs on a GPU with sparse tensor cores (compute capability 8.0): there is none here.")
    file = _copied_file(run, "bitmask", place)
    copy, half, masked = (net.to("cuda", torch.float16) for net in (copied(masked), copied(dense), masked))
    example = moved(example, torch.device("cuda"), torch.float16)
    speedups = time_converted(linear_layers(copy, names), copy, example, semi_structured)
    chosen = [name for name, speedup in speedups.items() if speedup.pays]
    sparse = converted(copy, chosen, semi_structured)
    macs = sum(count // 2 if name in chosen else count for name, count in _layer_macs(masked, example, names).items())
    opened, opened_dense = Opened.module(sparse, file.stat().st_size), Opened.module(half, (run / PLAIN).stat().st_size)
    note = _conversion_note("2:4 on the GPU", speedups, chosen)
    exported = ExportedModel(file, opened, opened_dense, masked, HALF_TOLERANCE, macs, note, as_dense=not chosen)
    return exported, example, masked


def _conversion_note(kind: str, speedups: Mapping[str, Speedup], chosen: list[str]) -> str:
    if not speedups:
        return f"no linear layer was called by itself, with numbers that {kind} take: none is converted"
    best = max(speedups, key=lambda name: speedups[name].faster)
    times = f"{speedups[best].faster:.2f}x, {best}"
    return f"{len(chosen)} of {len(speedups)} linear layers are faster as {kind} here; at best {times}"


def _copied_file(run: Path, to: str, out: Path | None) -> Path:
    """The run's file of this form, copied to `out` (of slim, a directory) if that is given.

    Raises:
        UsageError: the run has no such file.
    """
    name = FILES[to]
    if not (run / name).exists() and to == "slim":
        raise UsageError(
            f"{run} pruned single weights: slim is for runs of channels (--method dsa, --pattern channels)."
        )
    if not (run / name).exists():
        others = [form for form, file in FILES.items() if (run / file).exists()]
        others += ["csr", *(form for form in FORMS if form != "hf" or not (run / SLIM).exists())]
        raise UsageError(f"{run} has no {name}: {', '.join(others)} can be exported.")
    if out is None:
        return run / name
    if to != "slim":
        write(out, (run / name).read_bytes())
        return out
    out.mkdir(parents=True, exist_ok=True)
    for part in (SLIM, PLAN):
        write(out / part, (run / part).read_bytes())
    return out / SLIM


def _layer_macs(model: nn.Module, example: Any, names: list[str]) -> dict[str, int]:
    """Multiply-accumulates of these layers, counted while the model runs."""
    scope = Scope.of(model)
    in_scope = {layer.name: layer for layer in scope}
    shapes = shapes_of(model)
    # the projections of an attention with fewer heads are no layer that could be pruned again
    layers = tuple(in_scope.get(name, Layer(name, tuple(shapes[name]), "attention_in")) for name in names)
    counted = measured(replace(scope, layers=layers, undecided=()), model, lambda: attempt(model, cloned(example), {}))
    return {layer.name: layer.macs or 0 for layer in counted}
