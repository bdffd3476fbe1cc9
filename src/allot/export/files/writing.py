"""A safetensors file, written one tensor at a time: its header first, then every tensor when its turn comes.

The bytes are those that the library `safetensors` writes for the same tensors. Its writer wants all tensors at once;
here a tensor may be made when it is written (`Later`), so that a file of any size takes the memory of one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allot.errors import UsageError

DTYPES = {  # in the order in which the format sorts tensors
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
UNSEALED = "0" * 64
MARK = b'\\"seal\\":\\"'  # JSON in a text of JSON


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


Value = Tensor | Later


def made(value: Value) -> Tensor:
    """The tensor itself."""
    return value.make() if isinstance(value, Later) else value


def numel(value: Value) -> int:
    """Numbers in a tensor."""
    return math.prod(value.shape)


def nbytes(value: Value) -> int:
    """Bytes of a tensor in a file."""
    return numel(value) * value.dtype.itemsize


def header_entry(value: Value, start: int, end: int) -> dict[str, Any]:
    """The description of a tensor in a header; of a dtype that no file holds, one of the same length."""
    return {"dtype": DTYPES.get(value.dtype, "F8_E4M3"), "shape": list(value.shape), "data_offsets": [start, end]}


def header_text(metadata: str, entries: Mapping[str, Any]) -> bytes:
    """The header with these entries, its length in front: JSON filled up to a multiple of 8 bytes."""
    content = {"__metadata__": {"allot": metadata}, **entries}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_order(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The tensors in the order of a file: by type, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (_RANK.get(item[1].dtype, len(_RANK)), item[0].encode())))


def write_sealed(path: Path, tensors: Mapping[str, Value], metadata: Callable[[str], str], header: int | None) -> None:
    """Write a file, each tensor when it is made, and put the seal into its metadata.

    Args:
        metadata: the text for these spaces, with `UNSEALED` in place of the seal.
        header: the length that spaces fill the header up to; None: as short as it is.
    Raises:
        UsageError: a tensor that such a file cannot hold.
        OSError: the disk is full.
    """
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            accepted = ", ".join(DTYPES.values())
            raise UsageError(
                f"{name} holds {value.dtype}, and a file of safetensors does not: {accepted} are accepted."
            )
    ordered = in_order(tensors)
    entries, end = {}, 0
    for name, value in ordered.items():
        start, end = end, end + nbytes(value)
        entries[name] = header_entry(value, start, end)
    head = header_text(metadata(""), entries)
    if header is not None and len(head) != header:
        head = header_text(metadata(" " * (header - len(head))), entries)
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for name, value in ordered.items():
            content = _content(name, value)
            file.write(content)
            digest.update(content)
            del content  # before the next tensor is made
        file.seek(head.index(MARK) + len(MARK))
        file.write(digest.hexdigest().encode())


def _content(name: str, value: Value) -> memoryview:
    """The bytes of a tensor, in C order.

    Raises:
        UsageError: a tensor without numbers in memory.
    """
    tensor = made(value).detach()
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "a tensor on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise UsageError(f"{name} is {kind}: only tensors with all their numbers in memory can be written.")
    if tensor.dtype != value.dtype or tuple(tensor.shape) != tuple(value.shape):
        raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} was made, not {value.dtype} {list(value.shape)}")
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def seal_of(path: Path) -> tuple[str, int]:
    """SHA-256 of the file with zeros in place of the seal, and the position of the seal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), 10**8))
        before, mark, rest = head.partition(MARK)
        digest.update(before + mark + UNSEALED.encode() + rest[len(UNSEALED) :])
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest(), len(before) + len(mark)
