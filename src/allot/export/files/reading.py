"""The tensors of a safetensors file, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from allot.errors import UsageError

AT_ONCE = 2**24  # bytes that are read before the file is opened anew


class Stored(Mapping[str, Tensor]):
    """The tensors of a file as they are stored, each read when it is asked for, and nothing of it kept.

    A file that is open is mapped into memory, and the pages that were read count as memory of the process; opening it
    anew after `AT_ONCE` bytes gives them back.

    Attributes:
        metadata: the metadata that allot wrote; {} if it did not write the file.
    Raises:
        UsageError: no such file, or a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._bytes = 0
        try:
            self._file = safetensors.safe_open(path, framework="pt")
            self._names = dict.fromkeys(self._file.keys())
            metadata = json.loads((self._file.metadata() or {}).get("allot", "{}"))
            if not isinstance(metadata, dict):
                raise ValueError(f"its metadata hold {type(metadata).__name__}, no object")
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such file.") from error
        except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not a whole safetensors file: {error}") from error
        self.metadata: dict[str, Any] = metadata

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            if self._file is None or self._bytes > AT_ONCE:
                self._file, self._bytes = safetensors.safe_open(self.path, framework="pt"), 0
            tensor: Tensor = self._file.get_tensor(name)
        except (OSError, safetensors.SafetensorError, ValueError) as error:
            raise UsageError(f"{self.path} is not a whole safetensors file: {error}") from error
        self._bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
