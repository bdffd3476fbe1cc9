"""The files of a run, and the reader of all. All are plain safetensors with plain keys.

model.safetensors           every tensor of the state dict, zeros folded in.
model.bitmask.safetensors   a layer NAME is stored as NAME (dense) or, where that is smaller, as
    NAME.mask     uint8, which of its n weights are there, in C order; bits of a byte from the highest down:
                  one bit a weight, ceil(n / 8) bytes; or, where that is fewer, positions (`costs.low_bits`): the lowest
                  l bits of each, then for each the rest of it, less that of the one before, in unary: zeros and a one
    NAME.values   those weights, in C order, in the layer's dtype

model.csr.safetensors       what `allot export --to csr` writes: matrices as NAME.crow int32 [rows + 1], NAME.col int32
    [kept] and NAME.values [kept], compressed sparse rows; all else as it is

model.slim.safetensors      where channels were pruned, instead of the bitmask: what is left of every tensor, smaller in
    shape; its metadata also holds `attributes` {module: {attribute: value}}, what shapes do not say of a model.

Their metadata has one key, `allot`: JSON with `format`, `aliases` {tied name: stored name}, `layers` {name: [shape,
dense MACs or null]}, `asked` {budget kind: as the user wrote it}, `limits` {budget kind: whole number}, `seal`, the
SHA-256 of the file with zeros in the seal's place, and `pad`, which in the bitmask and slim files is spaces that bring
the header to a fixed length, so that the size is known before the file is written:

    bytes(kept) = header + other tensors + sum_l min(dense_l, ceil(mask_bits(n_l, kept_l) / 8) + kept_l itemsize_l)
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError
from allot.export.files.bits import packed, positions_in
from allot.network.channels import ChannelPlan, Group
from allot.network.layers import Scope, plain_state
from allot.run.store import replacing

PLAIN, BITMASK = "model.safetensors", "model.bitmask.safetensors"
SLIM, PLAN = "model.slim.safetensors", "channels.json"
CSR = "model.csr.safetensors"
PROBE = "allot.probe.safetensors"  # in a directory that was exported, see `allot.export.certificate.probe`
TABLES = "latency.json"  # where time was limited
ALLOCATION, CERTIFICATE, REPORT = "allocation.json", "certificate.json", "report.json"
PROMISED = (PLAIN, BITMASK, SLIM, PLAN, TABLES, ALLOCATION)  # what a certificate may name
OWN = (*PROMISED, CERTIFICATE, REPORT, "report.html", "run.json", "recipe.yaml", "steps.jsonl")  # what a run is made of
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_UNSEALED = "0" * 64
_MARK = b'\\"seal\\":\\"'  # JSON in a text of JSON
_ASKED = 32  # characters of a limit, as the user wrote it, that the metadata holds


@dataclass(frozen=True)
class Layout:
    """What a bitmask file holds beside weights: sizes in bytes.

    Attributes:
        header: length of the file's header, padding included.
        others: all tensors out of scope.
        plain: the dense model's model.safetensors, to a few bytes; what a percentage of bytes is a share of.
    """

    header: int
    others: int
    plain: int


def about(model: nn.Module, scope: Scope, budget: ModelBudget) -> dict[str, Any]:
    """What the metadata of both files says; limits are 0 until the budget is tied to the model."""
    return {
        "aliases": plain_state(model)[1],
        "layers": {layer.name: [list(layer.shape), layer.macs] for layer in scope},
        "asked": {kind: text[:_ASKED] for kind, text in budget.to_json().items()},
        "limits": {limit.kind: limit.ceiling for limit in budget.limits}
        if budget.terms
        else dict.fromkeys(budget.asked, 0),
        **({"channels": True} if scope.groups else {}),
    }


def layout(state: Mapping[str, Tensor], said: Mapping[str, Any]) -> Layout:
    """Header and other bytes of the bitmask file; the header is that of the longest case, padded to it."""
    plain = _plain_size(state, said)
    said = _longest(said)
    entries: dict[str, Any] = {"__metadata__": {"allot": _metadata("bitmask", said)}}
    end = 10 ** len(str(2 * sum(_nbytes(value) for value in state.values()) + 8 * len(state))) - 1
    for name, value in state.items():
        if name in said["layers"]:
            mask = {"dtype": "U8", "shape": [(value.numel() + 7) // 8], "data_offsets": [end, end]}
            entries[name + ".mask"] = mask
            entries[name + ".values"] = {**mask, "dtype": _DTYPES[value.dtype], "shape": [value.numel()]}
        else:
            entries[name] = {
                "dtype": _DTYPES.get(value.dtype, "F8_E4M3"),
                "shape": list(value.shape),
                "data_offsets": [end, end],
            }
    others = sum(_nbytes(value) for name, value in state.items() if name not in said["layers"])
    return Layout(_header_bytes(entries), others, plain)


def save_plain(path: Path, state: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Write model.safetensors."""
    save_tensors(path, state, "plain", said)


def save_bitmask(path: Path, state: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Write model.bitmask.safetensors; its size is that of `layout`."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in said["layers"]:
            tensors[name] = value
            continue
        flat = value.detach().cpu().flatten()
        mask = flat != 0
        bits = packed(mask.numpy())
        if bits.size + int(mask.sum()) * value.element_size() < _nbytes(value):
            tensors[name + ".mask"] = torch.from_numpy(bits)
            tensors[name + ".values"] = flat[mask]
        else:
            tensors[name] = value
    header = layout(state, said).header
    size = header + sum(_nbytes(value) for value in tensors.values())
    _save(path, tensors, _metadata("bitmask", said))
    if missing := size - path.stat().st_size:
        _save(path, tensors, _metadata("bitmask", said, " " * missing))


def save_csr(path: Path, state: Mapping[str, Tensor], said: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write model.csr.safetensors: these matrices as compressed sparse rows, all else as it is."""
    tensors = dict(state)
    for name in names:
        matrix = csr(tensors.pop(name))
        tensors[f"{name}.crow"], tensors[f"{name}.col"] = matrix.crow_indices(), matrix.col_indices()
        tensors[f"{name}.values"] = matrix.values()
    save_tensors(path, tensors, "csr", said)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], form: str, said: Mapping[str, Any]) -> None:
    """Write tensors as they are, with metadata, sealed."""
    _save(path, dict(tensors), _metadata(form, said))


def csr(weight: Tensor) -> Tensor:
    """A matrix in compressed sparse rows, with indices of 32 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is called beta
        found = weight.detach().to_sparse_csr()
        rows, columns = found.crow_indices().int(), found.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, found.values(), found.shape, check_invariants=True)


def slim_header(state: Mapping[str, Tensor], said: Mapping[str, Any], groups: Iterable[Group]) -> int:
    """Length of a slim file's header: that of the longest case, the dense model, padded to it."""
    named = {name: dict.fromkeys(own, 10**9) for group in groups for name, own in group.attributes.items()}
    entries: dict[str, Any] = {"__metadata__": {"allot": _metadata("slim", {**_longest(said), "attributes": named})}}
    end = 10 ** len(str(sum(_nbytes(value) for value in state.values()))) - 1
    for name, value in state.items():
        dtype = _DTYPES.get(value.dtype, "F8_E4M3")
        entries[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [end, end]}
    return _header_bytes(entries)


def save_slim(
    path: Path, state: Mapping[str, Tensor], said: Mapping[str, Any], plan: ChannelPlan, groups: Iterable[Group]
) -> None:
    """Write model.slim.safetensors, the tensors as the plan cuts them; its header is that of `slim_header`."""
    header = slim_header(state, said, groups)
    tensors = {name: plan.cut(name, value) for name, value in state.items()}
    about = {**said, "attributes": {name: dict(own) for name, own in plan.attributes.items()}}
    size = header + sum(_nbytes(value) for value in tensors.values())
    _save(path, tensors, _metadata("slim", about))
    if missing := size - path.stat().st_size:
        _save(path, tensors, _metadata("slim", about, " " * missing))


def load(path: str | Path) -> dict[str, Tensor]:
    """The plain state dict in any file that allot wrote, tied names included; or in any safetensors file.

    Args:
        path: model.safetensors, model.bitmask.safetensors, or a run directory.
    Raises:
        UsageError: no such file, a damaged one, or one that a runtime opens.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".pt2", ".xml"):
        raise UsageError(f"{path} is a model for a runtime, which opens it: files of tensors are loaded here.")
    return read(path / PLAIN if path.is_dir() else path)[0]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The plain state dict of a file, and what its metadata says about the run ({} from elsewhere).

    Raises:
        UsageError: no such file, or a damaged one.
    """
    tensors, about = stored(path)
    return unfolded(path, tensors, about), about


def unfolded(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The plain state dict in what a file stores.

    Raises:
        UsageError: what it stores does not belong together.
    """
    try:
        shapes = about.get("layers", {})
        state: dict[str, Tensor] = {}
        smaller = {name.rpartition(".")[0] for name in tensors if name.endswith((".mask", ".crow"))} & shapes.keys()
        if (total := sum(abs(math.prod(shapes[name][0])) for name in smaller)) > most_weights(path.stat().st_size):
            raise UsageError(f"{path} is damaged: so small a file cannot hold {total:,} weights.")
        for name, value in tensors.items():
            stem, _, part = name.rpartition(".")
            if stem not in shapes or part not in ("mask", "values", "crow", "col"):
                state[name] = value
            elif part == "mask":
                state[stem] = _unpacked(path, stem, shapes[stem][0], value, tensors.get(stem + ".values"))
            elif part == "crow":
                columns, values = tensors[stem + ".col"], tensors[stem + ".values"]
                size = torch.Size(shapes[stem][0])
                state[stem] = torch.sparse_csr_tensor(value, columns, values, size, check_invariants=True).to_dense()
        for alias, name in about.get("aliases", {}).items():
            state[alias] = state[name]
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"{path} is damaged: its tensors and what it says of them differ ({error}).") from error
    return state


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file as they are stored, and its metadata ({} from elsewhere).

    Raises:
        UsageError: no such file, or a damaged one.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata.get("allot", "{}"))
        if not isinstance(about, dict):
            raise ValueError(f"its metadata hold {type(about).__name__}, no object")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file.") from error
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors, about


def most_weights(size: int) -> int:
    """How many weights a file of so many bytes may stand for: a file of nothing is no bomb."""
    return 2**26 + 10**4 * size


def _unpacked(path: Path, name: str, shape: list[int], mask: Tensor, values: Tensor | None) -> Tensor:
    total = math.prod(shape)
    if values is None or (positions := positions_in(mask.numpy(), total, len(values))) is None:
        raise UsageError(f"{path} is damaged: mask and values of {name} do not belong together.")
    flat = torch.zeros(total, dtype=values.dtype)
    flat[torch.from_numpy(positions)] = values
    return flat.view(shape)


def _plain_size(state: Mapping[str, Tensor], said: Mapping[str, Any]) -> int:
    entries: dict[str, Any] = {"__metadata__": {"allot": _metadata("plain", said)}}
    end = 0
    for name, value in state.items():
        start, end = end, end + _nbytes(value)
        dtype = _DTYPES.get(value.dtype, "F8_E4M3")
        entries[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    return _header_bytes(entries) + end


def _longest(said: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with limits as long as they get: neither a budget nor how it is written changes a header's size."""
    limits, asked = dict.fromkeys(said["limits"], 10**18), dict.fromkeys(said["asked"], " " * _ASKED)
    return {**said, "limits": limits, "asked": asked}


def _metadata(form: str, said: Mapping[str, Any], pad: str = "") -> str:
    return json.dumps({"format": form, **said, "seal": _UNSEALED, "pad": pad}, separators=(",", ":"))


def _header_bytes(entries: Mapping[str, Any]) -> int:
    """Length of a safetensors header with these entries: 8 bytes, then JSON filled up to a multiple of 8."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _save(path: Path, tensors: dict[str, Tensor], about: str) -> None:
    with replacing(path) as temporary:
        try:
            # one key only: safetensors writes several in an order that changes from run to run
            safetensors.torch.save_file(_apart(tensors), temporary, {"allot": about})
        except safetensors.SafetensorError as error:  # wraps what the disk said
            raise OSError(str(error)) from error
        seal, start = _seal(temporary)
        with temporary.open("rb+") as file:
            file.seek(start)
            file.write(seal.encode())


def marked(path: Path) -> bool:
    """Whether any of what allot writes into a file's header is there, whatever else became of the file."""
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), 10**8))
    return any(mark in head for mark in (b'"allot":"{', _MARK, b'\\"pad\\":\\"'))


def untouched(path: Path) -> bool:
    """Whether a file that allot wrote is as it was written, to the last bit: one without its seal is not."""
    seal, start = _seal(path)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(len(seal)) == seal.encode()


def _seal(path: Path) -> tuple[str, int]:
    """SHA-256 of the file with zeros in place of its seal, and where the seal is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), 10**8))
        before, mark, rest = head.partition(_MARK)
        digest.update(before + mark + _UNSEALED.encode() + rest[len(_UNSEALED) :])
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest(), len(before) + len(mark)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and no two in one memory, as safetensors wants them."""
    apart: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, value in tensors.items():
        value = value.contiguous()
        memory = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if memory in used else value
        used.add(memory)
    return apart
