"""Models written for a runtime, re-opened there, compared with what they were made from, and timed side by side.

safetensors, bitmask, slim   the run's own files     opened by allot
csr, 2:4                     see `allot.export.runtimes.sparse`
program, onnx, openvino, hf  see `allot.export.runtimes.forms`
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import AllotError, UsageError, VerificationError, first_line, unknown
from allot.export.certificate.probe import check_inputs, not_tensors, replace_constants, save_probe
from allot.export.files.destination import staging
from allot.export.files.formats import BITMASK, CSR, PLAIN, PLAN, SLIM, csr, load, read, save_csr
from allot.export.files.slim import load_slim
from allot.export.runtimes.answers import SLIM_TOLERANCE, TOLERANCE, allowed, check_answers
from allot.export.runtimes.forms import FORMS, write_and_reopen
from allot.export.runtimes.from_file import load_into, opened_with
from allot.export.runtimes.opened import Opened
from allot.export.runtimes.sparse import converted, has_sparse_tensor_cores, linear_layers, load_csr, semi_structured
from allot.export.timing.clock import Speedup, side_by_side
from allot.export.timing.sparse_layers import time_converted
from allot.network.call import attempt, write_into
from allot.network.channels import copied, shapes_of
from allot.network.layers import Layer, Scope
from allot.network.macs import measured
from allot.network.trees import cloned
from allot.run.calibration import moved
from allot.run.store import write

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
    to = form_of(path) or path.suffix if to is None else to
    if to not in FORMS:
        raise unknown("form of export", to, FORMS)
    check_inputs(example)
    with staging(path, directory=not FORMS[to].ending) as place:
        opened, answers = write_and_reopen(model, example, place, to)
        save_probe(place, to, opened, example, answers)
    return FORMS[to].open(path)


def form_of(path: str | Path | None) -> str | None:
    """The form that the ending of a file says; None where it says none."""
    endings = {form.ending: name for name, form in FORMS.items() if form.ending} | {".safetensors": "safetensors"}
    return endings.get(Path(path).suffix) if path else None


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
        `{form, file, inside, probe, bytes, dense_bytes, limit, error, params, dense_params, macs, dense_macs,
        milliseconds: {dense, sparse}, faster, spread, verdict, note}`: `inside` is where the file is in the run, None
        where it is elsewhere, `probe` whether a probe lies beside it, `limit` the information limit of these weights in
        bytes, `error` the largest difference of outputs from the run's masked model over their largest value, `faster`
        how many times as fast as dense, `spread` from and to how many in half of the rounds, `verdict` "faster",
        "no faster", "slower" or "unclear".
    Raises:
        UsageError: an unknown form, or one that this model or installation does not allow.
        VerificationError: what was written answers otherwise than the run's model, or takes other MACs than promised.
    """
    if to not in EVERY:
        raise unknown("form of export", to, EVERY)
    try:
        return _exported(dense, run, report, example, to, out)
    except (AllotError, OSError):
        raise
    except Exception as error:  # a model may raise whatever it likes
        said = first_line(error)
        raise UsageError(f"{type(dense).__name__} cannot be exported to {to}: {said}") from error


def _exported(
    dense: nn.Module, run: Path, report: Mapping[str, Any], example: Any, to: str, out: Path | None
) -> dict[str, Any]:
    if to in FORMS:
        check_inputs(example)
    if to == "hf" and (run / SLIM).exists():
        raise UsageError(
            "hf: a configuration of transformers says one width for all layers and cannot hold what is left of each: "
            "slim and onnx hold the smaller model."
        )
    dense, example = copied(dense).eval(), replace_constants(example)
    masked = copied(dense)
    write_into(masked, load(run))
    layers = [row["name"] for row in report["layers"]]
    target = _target(run, to, out)
    with nullcontext() if target is None else staging(target, directory=_ending(to) == "", run=run) as place:
        if to == "2:4":
            made, example, masked = _semi_structured(dense, masked, run, report, layers, example, place)
        elif place is None or to in FILES:
            made = _file(dense, run, to, place)
        elif to == "csr":
            made = _csr(dense, copied(masked), run, layers, example, place)
        else:
            made = _form(dense, masked, run, example, to, place)
        wanted, error = _compared(made, masked, example)
        macs = _macs(made.model, example, layers) if made.macs is None else made.macs
        if to in ("slim", *FORMS) and (run / SLIM).exists() and macs != report["macs"]["sparse"]:
            promised = f"{report['macs']['sparse']:,}"
            raise VerificationError(f"{made.file.name} takes {macs:,} MACs; the run promised {promised}.")
        probed = to != "2:4" and not not_tensors(example)  # see `allot.export.certificate.certificate.verify`
        if probed:
            save_probe(made.file, to, made.opened, example, wanted, run)
        file = target / made.file.relative_to(place) if target and place else made.file
    params = sum(p.numel() for p in dense.parameters())
    told = {"dense_params": params, "macs": macs, "dense_macs": _macs(dense, example, layers), "error": error}
    return {
        "form": to,
        **_placed_row(run, file, probed=probed),
        **_sizes(made, report),
        **told,
        **_times(made, example),
    }


def _placed_row(run: Path, file: Path, *, probed: bool) -> dict[str, Any]:
    place, home = file.resolve(), run.resolve()
    inside = str(place.relative_to(home)) if place.is_relative_to(home) else None
    return {"file": str(file), "inside": inside, "probe": probed}


def _sizes(made: Made, report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bytes": made.opened.bytes,
        "dense_bytes": made.other.bytes,
        "limit": report["bytes"]["limit"],
        "params": sum(p.numel() for p in made.model.parameters()),
    }


def _times(made: Made, example: Any) -> dict[str, Any]:
    ours, theirs = cloned(example), cloned(example)
    taken = side_by_side(lambda: made.other.run(theirs), lambda: made.opened.run(ours))
    return {
        "milliseconds": {"dense": 1000 * taken.dense, "sparse": 1000 * taken.sparse},
        "faster": taken.faster,
        "spread": list(taken.spread),
        "verdict": taken.verdict,
        "note": made.note,
    }


def _compared(made: Made, masked: nn.Module, example: Any) -> tuple[list[Tensor], float]:
    """(what the masked model answers, how far off what was made is).

    Raises:
        UsageError: nothing can be compared.
        VerificationError: it is off by more than it may.
    """

    def ask(draw: int) -> list[Tensor]:
        return Opened.module(copied(masked)).ask(example, draw=draw)

    wanted = ask(0)
    near = allowed(wanted, made.near) if made.near else 0.0
    said = f"{made.file.name} answers otherwise than the run's model"
    return wanted, check_answers(said, made.opened.ask(example), wanted, lambda: ask(1), near)


def _ending(to: str) -> str:
    """Of the file that a form is; "" of one that is a directory."""
    return FORMS[to].ending if to in FORMS else "" if to == "slim" else ".safetensors"


def _target(run: Path, to: str, out: Path | None) -> Path | None:
    """Where an export goes; None where it is the run's own file."""
    own = FILES.get("bitmask" if to == "2:4" else to)
    if own and (out is None or out.resolve() in ((run / own).resolve(), run.resolve())):
        return None
    return out or run / (CSR if to == "csr" else f"model{_ending(to)}" if _ending(to) else to)


def _file(dense: nn.Module, run: Path, to: str, place: Path | None) -> Made:
    file = _copied_file(run, to, place)
    sparse = load_into(dense, file)
    other = Opened.module(dense, (run / PLAIN).stat().st_size)
    return Made(file, opened_with(sparse, file), other, sparse, SLIM_TOLERANCE if to == "slim" else 0.0)


def _form(dense: nn.Module, masked: nn.Module, run: Path, example: Any, to: str, place: Path) -> Made:
    sparse = load_slim(dense, run) if (run / SLIM).exists() else masked
    opened, _ = write_and_reopen(sparse, example, place, to)
    with tempfile.TemporaryDirectory() as folder:
        other, _ = write_and_reopen(dense, example, Path(folder) / f"dense{FORMS[to].ending}", to)
    return Made(place, opened, other, sparse, TOLERANCE)


def _csr(dense: nn.Module, masked: nn.Module, run: Path, names: list[str], example: Any, place: Path) -> Made:
    layers = linear_layers(masked, names)
    faster = time_converted(layers, masked, example, csr)
    chosen = [name for name, taken in faster.items() if taken.pays]
    state, about = read(run / PLAIN)
    state = {name: value for name, value in state.items() if name not in about["aliases"]}
    save_csr(place, state, {key: about[key] for key in about if key not in ("format", "seal", "pad")}, chosen)
    sparse = load_csr(dense, place)
    try:
        attempt(sparse, cloned(example), {})
    except Exception as error:  # fused kernels, like those of a transformer's encoder, take no sparse weights
        said = first_line(error)
        raise UsageError(f"{type(dense).__name__} does not run with sparse rows: {said}") from error
    nonzero = {name: int(torch.count_nonzero(layers[name].weight)) / layers[name].weight.numel() for name in chosen}
    macs = sum(round(nonzero.get(name, 1) * count) for name, count in _layer_macs(masked, example, names).items())
    other = Opened.module(dense, (run / PLAIN).stat().st_size)
    return Made(
        place, opened_with(sparse, place), other, sparse, TOLERANCE, macs, _chosen("sparse rows", faster, chosen)
    )


def _semi_structured(
    dense: nn.Module,
    masked: nn.Module,
    run: Path,
    report: Mapping[str, Any],
    names: list[str],
    example: Any,
    place: Path | None,
) -> tuple[Made, Any, nn.Module]:
    """The run's model on the GPU in half precision; with it, the inputs and the masked model there."""
    if report["pattern"] != "2:4":
        raise UsageError(f"the run's pattern is {report['pattern']}: 2:4 takes runs of --pattern 2:4.")
    if not has_sparse_tensor_cores():
        raise UsageError("2:4 runs on a GPU with sparse tensor cores (compute capability 8.0): there is none here.")
    file = _copied_file(run, "bitmask", place)
    there, half, masked = (each.to("cuda", torch.float16) for each in (copied(masked), copied(dense), masked))
    example = moved(example, torch.device("cuda"), torch.float16)
    faster = time_converted(linear_layers(there, names), there, example, semi_structured)
    chosen = [name for name, taken in faster.items() if taken.pays]
    sparse = converted(there, chosen, semi_structured)
    counted = _layer_macs(masked, example, names)
    macs = sum(count // 2 if name in chosen else count for name, count in counted.items())
    opened, other = Opened.module(sparse, file.stat().st_size), Opened.module(half, (run / PLAIN).stat().st_size)
    note = _chosen("2:4 on the GPU", faster, chosen)
    return Made(file, opened, other, masked, HALF_TOLERANCE, macs, note), example, masked


def _chosen(what: str, taken: Mapping[str, Speedup], chosen: list[str]) -> str:
    if not taken:
        return f"no linear layer was called by itself, with numbers that {what} take: none is converted"
    best = max(taken, key=lambda name: taken[name].faster)
    times = f"{taken[best].faster:.2f}x, {best}"
    return f"{len(chosen)} of {len(taken)} linear layers are faster as {what} here; at best {times}"


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
        others += ["csr", *(form for form in FORMS if form != "hf" or not (run / SLIM).exists())]
        raise UsageError(f"{run} has no {name}: {', '.join(others)} can be exported.")
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
    counted = measured(replace(scope, layers=layers), model, lambda: attempt(model, cloned(example), {}))
    return {layer.name: layer.macs or 0 for layer in counted}
