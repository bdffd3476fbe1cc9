"""Directories of transformers, opened by from_pretrained; extra `hf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from allot.errors import UsageError
from allot.export.runtimes.opened import Form, Opened, need, size_of


def _write(model: nn.Module, example: Any, path: Path) -> None:
    pretrained: Any = model
    if not hasattr(model, "save_pretrained") or not hasattr(type(model), "from_pretrained"):
        raise UsageError(f"{type(model).__name__} has no save_pretrained: hf is for models of transformers.")
    path.mkdir(exist_ok=True)
    pretrained.save_pretrained(path, safe_serialization=True)


def _open(path: Path) -> Opened:
    need("hf", "transformers")
    import transformers

    try:
        config = json.loads((path / "config.json").read_text())
        kind = getattr(transformers, config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} names no model of transformers in its config.json.") from error
    model = kind.from_pretrained(path, use_safetensors=True)  # the other format is pickled
    return Opened.module(model.eval(), size_of(path))


PRETRAINED = Form("", _write, _open)
