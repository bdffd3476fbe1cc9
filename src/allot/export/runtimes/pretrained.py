"""Directories of transformers, opened by from_pretrained; extra `hf`."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from allot.errors import UsageError, with_cause
from allot.export.runtimes.opened import Form, Opened, need, size_of

log = logging.getLogger("allot")
_BESIDE = (  # files of tokenizers and preprocessors
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def _write(model: nn.Module, example: Any, path: Path) -> None:
    pretrained: Any = model
    if not hasattr(model, "save_pretrained") or not hasattr(type(model), "from_pretrained"):
        raise UsageError(f"{type(model).__name__} has no save_pretrained: hf is for models of transformers.")
    path.mkdir(exist_ok=True)
    pretrained.save_pretrained(path, safe_serialization=True)
    _write_tokenizer(pretrained, path)


def _write_tokenizer(model: Any, path: Path) -> None:
    """What makes inputs for the model: the files in its directory, or the tokenizer that its GGUF file holds."""
    source = Path(getattr(model.config, "name_or_path", ""))
    if source.suffix == ".gguf" and source.is_file():
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
            tokenizer.save_pretrained(path)
        except Exception as error:  # noqa: BLE001 - the model is written, and tokenizers raise whatever they like
            log.warning("%s has no tokenizer: that of %s cannot be used here: %s", path, source, with_cause(error))
    elif source.is_dir() and source.resolve() != path.resolve():
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, path / name)


def _open(path: Path) -> Opened:
    need("hf", "transformers")
    import transformers

    try:
        config = json.loads((path / "config.json").read_text())
        kind = getattr(transformers, config["architectures"][0])
        if not issubclass(kind, transformers.PreTrainedModel):
            raise TypeError(f"{kind} is no model")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} names no model of transformers in its config.json.") from error
    # the other format is pickled, and code beside the weights is not run
    model = kind.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
    return Opened.module(model.eval(), size_of(path))


PRETRAINED = Form("", _write, _open)
