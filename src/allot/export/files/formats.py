"""The files of a run: how each is written, and the reader of all. All are plain safetensors with plain keys.

model.safetensors           every tensor of the state dict, zeros folded in.
model.bitmask.safetensors   a layer NAME is stored as NAME (dense) or, where that is smaller, as
    NAME.mask     uint8, which of the n weights are kept, in C order; bits of a byte from the highest down:
                  one bit a weight, ceil(n / 8) bytes; or, if that is shorter, positions (`costs.low_bits`): the lowest
                  l bits of each, then the higher bits of each minus those of the one before, in unary: zeros and a one
    NAME.values   the kept weights, in C order, in the layer's dtype

model.csr.safetensors       written by `allot export --to csr`: matrices as NAME.crow int32 [rows + 1], NAME.col int32
    [kept] and NAME.values [kept], compressed sparse rows; other tensors unchanged

model.slim.safetensors      instead of the bitmask if channels were pruned: the remaining part of every tensor, of
    smaller shape; the metadata also holds `attributes` {module: {attribute: value}} that shapes do not determine.

The metadata of each file has one key, `allot`: JSON with `format`, `aliases` {tied name: stored name}, `layers` {name:
[shape, dense MACs or null]}, `asked` {budget kind: as the user wrote it}, `limits` {budget kind: whole number}, `seal`,
the SHA-256 of the file with zeros in place of the seal, and `pad`, in the bitmask and slim files spaces that bring the
header to a fixed length, so that the size is known before the file is written:

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

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from allot.budget.costs import low_bits, mask_bits
from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError
from allot.network.channels import ChannelPlan
from allot.network.layers import Group, Scope, plain_state
from allot.run.store import replacing

PLAIN, BITMASK = "model.safetensors", "model.bitmask.safetensors"
SLIM, PLAN = "model.slim.safetensors", "channels.json"
CSR = "model.csr.safetensors"
PROBE = "allot.probe.safetensors"  # in a directory that was exported, see `allot.export.certificate.probe`
TABLES = "latency.json"  # if the budget limits latency
ALLOCATION, CERTIFICATE, REPORT = "allocation.json", "certificate.json", "report.json"
PROMISED = (PLAIN, BITMASK, SLIM, PLAN, TABLES, ALLOCATION)  # files that a certificate may name
OWN = (*PROMISED, CERTIFICATE, REPORT, "report.html", "run.json", "recipe.yaml", "steps.jsonl")  # the files of a run
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_UNSEALED = "0" * 64
_MARK = b'\\"seal\\":\\"'  # JSON in a text of JSON
_ASKED = 32  # most characters of a limit, as the user wrote it, in the metadata


@dataclass(frozen=True)
class Layout:
    """Bytes of a bitmask file that do not depend on the masks.

    Attributes:
        header: length of the header, padding included.
        others: all tensors out of scope.
        plain: the dense model's model.safetensors, to a few bytes; a percentage of bytes is a percentage of these.
    """

    header: int
    others: int
    plain: int


def metadata_of(model: nn.Module, scope: Scope, budget: ModelBudget) -> dict[str, Any]:
    """The metadata of a run's files but format, seal and pad; limits are 0 until the budget is tied to the model."""
    return {
        "aliases": plain_state(model)[1],
        "layers": {layer.name: [list(layer.shape), layer.macs] for layer in scope},
        "asked": {kind: text[:_ASKED] for kind, text in budget.to_json().items()},
        "limits": {limit.kind: limit.ceiling for limit in budget.limits}
        if budget.terms
        else dict.fromkeys(budget.asked, 0),
        **({"channels": True} if scope.groups else {}),
    }


def layout(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Layout:
    """Header and other bytes of the bitmask file; every header is padded to the length of the longest one."""
    plain = _plain_size(state, metadata)
    metadata = _longest(metadata)
    entries: dict[str, Any] = {}
    end = 10 ** len(str(2 * sum(_nbytes(value) for value in state.values()) + 8 * len(state))) - 1
    for name, value in state.items():
        if name in metadata["layers"]:
            mask = {"dtype": "U8", "shape": [(value.numel() + 7) // 8], "data_offsets": [end, end]}
            entries[name + ".mask"] = mask
            entries[name + ".values"] = {**mask, "dtype": _DTYPES[value.dtype], "shape": [value.numel()]}
        else:
            entries[name] = _entry(value, end, end)
    others = sum(_nbytes(value) for name, value in state.items() if name not in metadata["layers"])
    return Layout(_header_bytes("bitmask", metadata, entries), others, plain)


def save_bitmask(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write model.bitmask.safetensors; its size is that of `layout`."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in metadata["layers"]:
            tensors[name] = value
            continue
        flat = value.detach().cpu().flatten()
        mask = flat != 0
        bits = _packed(mask.numpy())
        if bits.size + int(mask.sum()) * value.element_size() < _nbytes(value):
            tensors[name + ".mask"] = torch.from_numpy(bits)
            tensors[name + ".values"] = flat[mask]
        else:
            tensors[name] = value
    save_tensors(path, tensors, "bitmask", metadata, header=layout(state, metadata).header)


def save_csr(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write model.csr.safetensors: these matrices as compressed sparse rows, other tensors unchanged."""
    tensors = dict(state)
    for name in names:
        matrix = csr(tensors.pop(name))
        tensors[f"{name}.crow"], tensors[f"{name}.col"] = matrix.crow_indices(), matrix.col_indices()
        tensors[f"{name}.values"] = matrix.values()
    save_tensors(path, tensors, "csr", metadata)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], form: str, metadata: Mapping[str, Any], *, header: int | None = None
) -> None:
    """Write tensors unchanged, with metadata, sealed; the header is padded to the length `header`."""
    _save(path, tensors, _metadata_text(form, metadata))
    size = path.stat().st_size if header is None else header + sum(_nbytes(value) for value in tensors.values())
    if missing := size - path.stat().st_size:
        _save(path, tensors, _metadata_text(form, metadata, " " * missing))


def csr(weight: Tensor) -> Tensor:
    """A matrix in compressed sparse rows, with indices of 32 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is called beta
        matrix = weight.detach().to_sparse_csr()
        rows, columns = matrix.crow_indices().int(), matrix.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, matrix.values(), matrix.shape, check_invariants=True)


def slim_header(state: Mapping[str, Tensor], metadata: Mapping[str, Any], groups: Iterable[Group]) -> int:
    """Length of a slim file's header; every header is padded to the length of the longest one, of the dense model."""
    widest = {name: dict.fromkeys(names, 10**9) for group in groups for name, names in group.attributes.items()}
    end = 10 ** len(str(sum(_nbytes(value) for value in state.values()))) - 1
    entries = {name: _entry(value, end, end) for name, value in state.items()}
    return _header_bytes("slim", {**_longest(metadata), "attributes": widest}, entries)


def save_slim(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any], plan: ChannelPlan, groups: Iterable[Group]
) -> None:
    """Write model.slim.safetensors, the tensors cut by the plan; the length of its header is `slim_header`."""
    header = slim_header(state, metadata, groups)
    tensors = {name: plan.cut(name, value) for name, value in state.items()}
    metadata = {**metadata, "attributes": {name: dict(values) for name, values in plan.attributes.items()}}
    save_tensors(path, tensors, "slim", metadata, header=header)


def load(path: str | Path) -> dict[str, Tensor]:
    """The plain state dict of any file that allot wrote, tied names included, or of any safetensors file.

    Args:
        path: model.safetensors, model.bitmask.safetensors, or a run directory.
    Raises:
        UsageError: no such file, a damaged file, or a file that a runtime opens.

    >>> load("model.onnx")
    Traceback (most recent call last):
    allot.errors.UsageError: model.onnx is a model for a runtime, which opens it: files of tensors are loaded here.
    """
    path = Path(path)
    if path.suffix in (".onnx", ".pt2", ".xml"):
        raise UsageError(f"{path} is a model for a runtime, which opens it: files of tensors are loaded here.")
    return read(path / PLAIN if path.is_dir() else path)[0]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The plain state dict of a file, and its metadata ({} if allot did not write the file).

    Raises:
        UsageError: no such file, or a damaged file.
    """
    tensors, metadata = stored(path)
    return unpacked(path, tensors, metadata), metadata


def unpacked(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The plain state dict of the tensors that a file stores.

    Raises:
        UsageError: tensors and metadata do not belong together.
    """
    try:
        shapes = metadata.get("layers", {})
        state: dict[str, Tensor] = {}
        smaller = {name.rpartition(".")[0] for name in tensors if name.endswith((".mask", ".crow"))} & shapes.keys()
        total = sum(abs(math.prod(shapes[name][0])) for name in smaller)
        if total > 2**26 + 10**4 * path.stat().st_size:  # a small file must not fill the memory
            raise UsageError(f"{path} is damaged: so small a file cannot hold {total:,} weights.")
        for name, value in tensors.items():
            stem, _, part = name.rpartition(".")
            if stem not in shapes or part not in ("mask", "values", "crow", "col"):
                state[name] = value
            elif part == "mask":
                state[stem] = _unpack_mask(path, stem, shapes[stem][0], value, tensors.get(stem + ".values"))
            elif part == "crow":
                columns, values = tensors[stem + ".col"], tensors[stem + ".values"]
                size = torch.Size(shapes[stem][0])
                state[stem] = torch.sparse_csr_tensor(value, columns, values, size, check_invariants=True).to_dense()
        for alias, name in metadata.get("aliases", {}).items():
            state[alias] = state[name]
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"{path} is damaged: its tensors and what it says of them differ ({error}).") from error
    return state


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file as they are stored, and its metadata ({} if allot did not write the file).

    Raises:
        UsageError: no such file, or a damaged file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(header.get("allot", "{}"))
        if not isinstance(metadata, dict):
            raise ValueError(f"its metadata hold {type(metadata).__name__}, no object")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file.") from error
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors, metadata


def _unpack_mask(path: Path, name: str, shape: list[int], mask: Tensor, values: Tensor | None) -> Tensor:
    total = math.prod(shape)
    if values is None or (positions := _positions(mask.numpy(), total, len(values))) is None:
        raise UsageError(f"{path} is damaged: mask and values of {name} do not belong together.")
    flat = torch.zeros(total, dtype=values.dtype)
    flat[torch.from_numpy(positions)] = values
    return flat.view(shape)


def _packed(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> _Bytes:
    """A mask in as few bytes as its counts allow: a bit a weight, or positions, see the top of this file."""
    total, positions = mask.size, np.flatnonzero(mask)
    kept, low = positions.size, low_bits(mask.size, positions.size)
    if _mask_bytes(total, kept) == -(-total // 8):
        return np.packbits(mask)
    lowest = (positions[:, None] >> np.arange(low - 1, -1, -1)) & 1  # [kept, low]
    unary = np.zeros(kept + ((total - 1) >> low) + 1, dtype=bool)
    unary[(positions >> low) + np.arange(kept)] = True
    return np.packbits(np.concatenate([lowest.astype(bool).ravel(), unary]))


def _positions(mask: _Bytes, total: int, kept: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Positions of the weights of a mask; None if it is no mask of `kept` of `total`."""
    bits = np.unpackbits(mask)
    if mask.size == -(-total // 8):
        positions = np.flatnonzero(bits)
    elif mask.size != _mask_bytes(total, kept):
        return None
    else:
        low = low_bits(total, kept)
        ones = np.flatnonzero(bits[kept * low :])
        if ones.size != kept:
            return None
        lowest = bits[: kept * low].reshape(kept, low) @ (1 << np.arange(low - 1, -1, -1))
        positions = ((ones - np.arange(kept)) << low) + lowest
    ascending = bool((np.diff(positions) > 0).all()) and (not positions.size or positions[-1] < total)
    return positions if positions.size == kept and ascending else None


def _mask_bytes(total: int, kept: int) -> int:
    return -(-int(mask_bits(total, kept)) // 8)


def _plain_size(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> int:
    entries, end = {}, 0
    for name, value in state.items():
        start, end = end, end + _nbytes(value)
        entries[name] = _entry(value, start, end)
    return _header_bytes("plain", metadata, entries) + end


def _entry(value: Tensor, start: int, end: int) -> dict[str, Any]:
    return {"dtype": _DTYPES.get(value.dtype, "F8_E4M3"), "shape": list(value.shape), "data_offsets": [start, end]}


def _longest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with limits of the greatest length, so that the size of a header does not depend on the budget."""
    limits, asked = dict.fromkeys(metadata["limits"], 10**18), dict.fromkeys(metadata["asked"], " " * _ASKED)
    return {**metadata, "limits": limits, "asked": asked}


def _metadata_text(form: str, metadata: Mapping[str, Any], pad: str = "") -> str:
    return json.dumps({"format": form, **metadata, "seal": _UNSEALED, "pad": pad}, separators=(",", ":"))


def _header_bytes(form: str, metadata: Mapping[str, Any], entries: Mapping[str, Any]) -> int:
    """Length of a safetensors header with these entries: 8 bytes, then JSON filled up to a multiple of 8."""
    content = {"__metadata__": {"allot": _metadata_text(form, metadata)}, **entries}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: str) -> None:
    with replacing(path) as temporary:
        try:
            # one key only: safetensors writes several in an order that changes from run to run
            safetensors.torch.save_file(_separated(tensors), temporary, {"allot": metadata})
        except safetensors.SafetensorError as error:  # wraps the error of the disk
            raise OSError(str(error)) from error
        seal, start = _seal(temporary)
        with temporary.open("rb+") as file:
            file.seek(start)
            file.write(seal.encode())


def has_marks(path: Path) -> bool:
    """Whether the header holds anything that only allot writes; the file may be damaged otherwise."""
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), 10**8))
    return any(mark in head for mark in (b'"allot":"{', _MARK, b'\\"pad\\":\\"'))


def untouched(path: Path) -> bool:
    """Whether a file that allot wrote is unchanged to the last bit; a file without a seal is not."""
    seal, start = _seal(path)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(len(seal)) == seal.encode()


def _seal(path: Path) -> tuple[str, int]:
    """SHA-256 of the file with zeros in place of the seal, and the position of the seal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), 10**8))
        before, mark, rest = head.partition(_MARK)
        digest.update(before + mark + _UNSEALED.encode() + rest[len(_UNSEALED) :])
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest(), len(before) + len(mark)


def _separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and no two in one memory: safetensors writes no others."""
    separated: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, value in tensors.items():
        value = value.contiguous()
        memory = value.untyped_storage().data_ptr()
        separated[name] = value.clone() if memory in used else value
        used.add(memory)
    return separated
