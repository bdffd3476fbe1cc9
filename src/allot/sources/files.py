"""Samples in one file: arrays of an .npz file, or a plain text as blocks of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from allot.errors import UsageError

_LABELS = ("y", "label", "labels", "target", "targets")


class Arrays(Dataset[Any]):
    """Samples of an .npz file: (inputs, label), inputs a tensor or, of several arrays, a dict."""

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor | None) -> None:
        self.inputs, self.labels = inputs, labels

    @classmethod
    def load(cls, path: Path) -> Arrays:
        """The samples of the file.

        Raises:
            UsageError: the file cannot be read, or holds no plain arrays of one length.
        """
        try:
            with path.open("rb") as file:
                stored = np.load(file, allow_pickle=False)
                if not isinstance(stored, np.lib.npyio.NpzFile):
                    raise UsageError(f"{path} holds one array (.npy): np.savez('x.npz', x=..., y=...) is accepted.")
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        except UsageError:
            raise
        except OSError as error:
            raise cannot_open(path, error) from error
        except Exception as error:  # numpy raises whatever the zip holds
            raise UsageError(f"{path} is not an .npz file of plain arrays: {error}") from error
        labels = next((arrays.pop(name) for name in _LABELS if name in arrays), None)
        every = {**arrays, **({} if labels is None else {"y": labels})}
        lengths = {tuple(value.shape[:1]) for value in every.values()}
        if not arrays or len(lengths) != 1 or () in lengths:
            shapes = {name: list(value.shape) for name, value in every.items()}
            raise UsageError(f"{path}: arrays x (and y for labels) of one length are accepted, not {shapes}.")
        for name, value in arrays.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UsageError(f"{path}: {name} holds nan or infinite values.")
        if labels is not None and not labels.is_floating_point() and labels.numel() == len(labels):
            labels = labels.long().flatten()
        return cls(arrays, labels)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: int) -> Any:
        inputs: Any = {name: value[index] for name, value in self.inputs.items()}
        if len(inputs) == 1:
            inputs = next(iter(inputs.values()))
        return (inputs,) if self.labels is None else (inputs, self.labels[index])


class Texts(Dataset[dict[str, Tensor]]):
    """Row i of `blocks` as `{"input_ids": [T]}`. Blocks are full, so that no attention mask is needed."""

    def __init__(self, blocks: Int64[Tensor, "N T"]) -> None:
        self.blocks = blocks

    @classmethod
    def load(cls, path: Path, tokenizer: Any, length: int, vocabulary: int | None = None) -> Texts:
        """The text of a file in UTF-8, tokenised as one piece, without special tokens, and cut into blocks.

        A rest at the end that is shorter than a block is not used.

        Args:
            tokenizer: of the transformers library.
            length: tokens in a block.
            vocabulary: number of different tokens of the model.
        Raises:
            UsageError: the file cannot be read, is shorter than a block, or the tokens are not the model's.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is no text in UTF-8: {error}.") from error
        except OSError as error:
            raise cannot_open(path, error) from error
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        if not len(ids) and text.strip():
            raise UsageError(f"{path}: the tokenizer makes no tokens of it: its files are not beside the model.")
        if len(ids) < length:
            raise UsageError(
                f"{path} holds {len(ids)} tokens, no block of {length}: a longer text is accepted, or --input LENGTH."
            )
        if vocabulary is not None and int(ids.max()) >= vocabulary:
            raise UsageError(
                f"{path}: the tokenizer gives token {int(ids.max())}, the model knows {vocabulary}: they do not belong "
                "together."
            )
        return cls(ids[: len(ids) // length * length].view(-1, length))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index]}


def cannot_open(path: Path, error: OSError) -> UsageError:
    """The error for a file that the system does not open."""
    return UsageError(f"{path}: {(error.strerror or str(error)).lower()}.")
