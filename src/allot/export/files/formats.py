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

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError
from allot.export.files.masks import filled, mask_bytes, packed
from allot.export.files.reading import Stored
from allot.export.files.writing import (
    DTYPES,
    MARK,
    UNSEALED,
    Later,
    Value,
    header_entry,
    header_text,
    in_order,
    made,
    nbytes,
    numel,
    seal_of,
    write_sealed,
)
from allot.network.arguments import typed
from allot.network.channels import ChannelPlan
from allot.network.layers import Group, Scope, plain_state
from allot.run.store import replacing

PLAIN, BITMASK = "model.safetensors", "model.bitmask.safetensors"
SLIM, PLAN = "model.slim.safetensors", "channels.json"
CSR = "model.csr.safetensors"
PROBE = "allot.probe.safetensors"  # in a directory that was exported, see `allot.export.certificate.probe`
TABLES = "latency.json"  # if the budget limits latency
ALLOCATION, CERTIFICATE, REPORT = "allocation.json", "certificate.json", "report.json"
RUN, RECIPE, STEPS, PAGE = "run.json", "recipe.yaml", "steps.jsonl", "report.html"
PROMISED = (PLAIN, BITMASK, SLIM, PLAN, TABLES, ALLOCATION)  # files that a certificate may name
OWN = (*PROMISED, CERTIFICATE, REPORT, PAGE, RUN, RECIPE, STEPS)  # the files of a run
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


def layout(state: Mapping[str, Value], metadata: Mapping[str, Any]) -> Layout:
    """Header and other bytes of the bitmask file; every header is padded to the length of the longest one."""
    plain = _plain_size(state, metadata)
    metadata = _longest(metadata)
    entries: dict[str, Any] = {}
    end = 10 ** len(str(2 * sum(nbytes(value) for value in state.values()) + 8 * len(state))) - 1
    for name, value in state.items():
        if name in metadata["layers"]:
            mask = {"dtype": "U8", "shape": [(numel(value) + 7) // 8], "data_offsets": [end, end]}
            entries[name + ".mask"] = mask
            entries[name + ".values"] = {**mask, "dtype": DTYPES[value.dtype], "shape": [numel(value)]}
        else:
            entries[name] = header_entry(value, end, end)
    others = sum(nbytes(value) for name, value in state.items() if name not in metadata["layers"])
    return Layout(len(header_text(_metadata_text("bitmask", metadata), entries)), others, plain)


def save_bitmask(path: Path, state: Mapping[str, Value], metadata: Mapping[str, Any]) -> None:
    """Write model.bitmask.safetensors; its size is that of `layout`.

    Every layer is made three times, to be counted and for its two parts, because a file holds all values before all
    masks: that is cheaper than to hold them.
    """
    tensors: dict[str, Value] = {}
    plain = 0
    for name, value in state.items():
        if name not in metadata["layers"]:
            tensors[name] = value
            continue
        total, kept = numel(value), int(torch.count_nonzero(made(value)))
        size = mask_bytes(total, kept)
        if size + kept * value.dtype.itemsize < nbytes(value):
            tensors[name + ".mask"] = Later(torch.uint8, (size,), partial(_mask_of, value))
            tensors[name + ".values"] = Later(value.dtype, (kept,), partial(_values_of, value))
        else:
            tensors[name] = value
            plain += 1
    header = layout(state, metadata).header
    save_tensors(path, tensors, "bitmask", {**metadata, **({"plain": plain} if plain else {})}, header=header)


def _mask_of(value: Value) -> Tensor:
    return packed(made(value).detach().cpu() != 0)


def _values_of(value: Value) -> Tensor:
    flat = made(value).detach().cpu().flatten()
    return flat[flat != 0]


def save_csr(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write model.csr.safetensors: these matrices as compressed sparse rows, other tensors unchanged."""
    tensors = dict(state)
    for name in names:
        matrix = csr(tensors.pop(name))
        tensors[f"{name}.crow"], tensors[f"{name}.col"] = matrix.crow_indices(), matrix.col_indices()
        tensors[f"{name}.values"] = matrix.values()
    save_tensors(path, tensors, "csr", metadata)


def save_tensors(
    path: Path, tensors: Mapping[str, Value], form: str, metadata: Mapping[str, Any], *, header: int | None = None
) -> None:
    """Write tensors unchanged, each when its turn comes, with metadata, sealed; `header`: length to pad the header to.

    Raises:
        UsageError: the disk is full, or a tensor that such a file cannot hold.
    """
    with replacing(path) as temporary:
        write_sealed(temporary, tensors, partial(_metadata_text, form, metadata), header)


def csr(weight: Tensor) -> Tensor:
    """A matrix in compressed sparse rows, with indices of 32 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is called beta
        matrix = weight.detach().to_sparse_csr()
        rows, columns = matrix.crow_indices().int(), matrix.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, matrix.values(), matrix.shape, check_invariants=True)


def slim_header(state: Mapping[str, Value], metadata: Mapping[str, Any], groups: Iterable[Group]) -> int:
    """Length of a slim file's header; every header is padded to the length of the longest one, of the dense model."""
    widest = {name: dict.fromkeys(names, 10**9) for group in groups for name, names in group.attributes.items()}
    end = 10 ** len(str(sum(nbytes(value) for value in state.values()))) - 1
    entries = {name: header_entry(value, end, end) for name, value in state.items()}
    return len(header_text(_metadata_text("slim", {**_longest(metadata), "attributes": widest}), entries))


def save_slim(
    path: Path, state: Mapping[str, Value], metadata: Mapping[str, Any], plan: ChannelPlan, groups: Iterable[Group]
) -> None:
    """Write model.slim.safetensors, the tensors cut by the plan; the length of its header is `slim_header`."""
    header = slim_header(state, metadata, groups)
    tensors = {name: _cut(plan, name, value) for name, value in state.items()}
    metadata = {**metadata, "attributes": {name: dict(values) for name, values in plan.attributes.items()}}
    save_tensors(path, tensors, "slim", metadata, header=header)


def _cut(plan: ChannelPlan, name: str, value: Value) -> Value:
    kept = plan.tensors.get(name, {})
    shape = tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(value.shape))
    return Later(value.dtype, shape, lambda: plan.cut(name, made(value)))


@typed
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
    lazy, state = PlainState(path, tensors, metadata), dict[str, Tensor]()
    for name in lazy:
        first = lazy.aliases.get(name, name)
        state[name] = state[first] if first in state else lazy[name]
    return state


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file as they are stored, and its metadata ({} if allot did not write the file).

    Raises:
        UsageError: no such file, or a damaged file.
    """
    tensors = Stored(path)
    return dict(tensors), tensors.metadata


class PlainState(Mapping[str, Tensor]):
    """The plain state dict of a file, tied names included; each tensor is read and unpacked when it is asked for.

    Attributes:
        metadata: the metadata that allot wrote; {} if it did not write the file.
        aliases: tied name -> stored name.
    Raises:
        UsageError: no such file, a damaged file, or, when a tensor is asked for, a tensor that is damaged.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any] | Mapping[str, Any]) -> None:
        self.path, self.metadata, self._tensors = path, dict(metadata), tensors
        self._parts: dict[str, str] = {}  # name -> how it is stored: whole, mask or crow
        with self._as_damaged():
            self._shapes = shapes = metadata.get("layers", {})
            smaller = {name.rpartition(".")[0] for name in tensors if name.endswith((".mask", ".crow"))} & shapes.keys()
            total = sum(abs(math.prod(shapes[name][0])) for name in smaller)
            if total > 2**26 + 10**4 * path.stat().st_size:  # a small file must not fill the memory
                raise UsageError(f"{path} is damaged: so small a file cannot hold {total:,} weights.")
            for name in tensors:
                stem, _, part = name.rpartition(".")
                if stem not in shapes or part not in ("mask", "values", "crow", "col"):
                    self._parts[name] = "whole"
                elif part in ("mask", "crow"):
                    self._parts[stem] = part
            self.aliases = dict(metadata.get("aliases", {}))
            if missing := [name for name in self.aliases.values() if name not in self._parts]:
                raise KeyError(missing[0])

    @classmethod
    def of(cls, path: Path) -> PlainState:
        """The plain state dict of the file at `path`."""
        tensors = Stored(path)
        return cls(path, tensors, tensors.metadata)

    def __getitem__(self, name: str) -> Tensor:
        name = self.aliases.get(name, name)
        part = self._parts[name]
        if part == "whole":
            return self._tensors[name]
        with self._as_damaged():
            shape, first, values = (
                self._shapes[name][0],
                self._tensors[f"{name}.{part}"],
                self._tensors.get(f"{name}.values"),
            )
            if part == "crow":
                columns, size = self._tensors[f"{name}.col"], torch.Size(shape)
                return torch.sparse_csr_tensor(
                    first, columns, self._tensors[f"{name}.values"], size, check_invariants=True
                ).to_dense()
            weights = None if values is None else filled(shape, first, values)
            if weights is None:
                raise UsageError(f"{self.path} is damaged: mask and values of {name} do not belong together.")
            return weights

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        yield from self._parts
        yield from (name for name in self.aliases if name not in self._parts)

    def __len__(self) -> int:
        return len(self._parts.keys() | self.aliases.keys())

    @contextmanager
    def _as_damaged(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{self.path} is damaged: its tensors and what it says of them differ ({error})."
            ) from error


def plain_size(state: Mapping[str, Value], metadata: Mapping[str, Any]) -> int:
    """Bytes of model.safetensors, header included, before it is written."""
    return _plain_size(in_order(state), metadata)


def _plain_size(state: Mapping[str, Value], metadata: Mapping[str, Any]) -> int:
    entries, end = {}, 0
    for name, value in state.items():
        start, end = end, end + nbytes(value)
        entries[name] = header_entry(value, start, end)
    return len(header_text(_metadata_text("plain", metadata), entries)) + end


def _longest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with limits of the greatest length, so that the size of a header does not depend on the budget."""
    limits, asked = dict.fromkeys(metadata["limits"], 10**18), dict.fromkeys(metadata["asked"], " " * _ASKED)
    return {**metadata, "limits": limits, "asked": asked}


def _metadata_text(form: str, metadata: Mapping[str, Any], pad: str = "") -> str:
    return json.dumps({"format": form, **metadata, "seal": UNSEALED, "pad": pad}, separators=(",", ":"))


def has_marks(path: Path) -> bool:
    """Whether the header holds anything that only allot writes; the file may be damaged otherwise."""
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), 10**8))
    return any(mark in head for mark in (b'"allot":"{', MARK, b'\\"pad\\":\\"'))


def untouched(path: Path) -> bool:
    """Whether a file that allot wrote is unchanged to the last bit; a file without a seal is not."""
    seal, start = seal_of(path)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(len(seal)) == seal.encode()
