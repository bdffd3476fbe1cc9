"""A plain text as samples for a language model: blocks of token ids, all of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from allot.errors import UsageError


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
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}.") from error
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
