"""Samples in an .npz file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}.") from error
        except Exception as error:  # numpy raises whatever the zip holds
            raise UsageError(f"{path} is not an .npz file of plain arrays: {error}") from error
        labels = next((arrays.pop(name) for name in _LABELS if name in arrays), None)
        every = [*arrays.values(), *(() if labels is None else (labels,))]
        if not arrays or len({tuple(value.shape[:1]) for value in every}) != 1 or any(not v.dim() for v in every):
            shapes = {name: list(value.shape) for name, value in arrays.items()}
            shapes |= {} if labels is None else {"y": list(labels.shape)}
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
