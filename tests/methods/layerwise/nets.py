"""Nets of blocks that run one after another, in eval mode, and inputs for them; transformers where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLES = 10


class Layer(nn.Module):
    """Attention and an MLP with residuals, called with a mask and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor, mask: Tensor, *, factor: Tensor) -> tuple[Tensor, None]:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + factor * self.mlp(self.norm2(x)), None


class Encoder(nn.Module):
    """Words in, a mask by position for all samples and a factor by sample beside them."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.words, self.into = nn.Embedding(20, 6), nn.Linear(6, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.into(self.words(words))
        mask = torch.ones(words.shape[1], words.shape[1], dtype=torch.bool, device=x.device).triu(1)
        factor = 1 + words.float().mean(1)[:, None, None] / 20
        for layer in self.layers:
            x = layer(x, mask, factor=factor)[0]
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(y)) + self.shortcut(x))


class Stages(nn.Module):
    """A stem with batch norm, two stages of residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.stage1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.stage2 = nn.Sequential(Residual(4, 6), Residual(6, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.stage2(self.stage1(x)).mean((2, 3)))


def row() -> nn.Module:
    """A Sequential all through, activations in place."""
    convs = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True))
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]

    def model(self) -> nn.Module:
        """The net with values by a seed, batch norms that are not at their start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = self.make().eval()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 2)
        return model


def pictures() -> Tensor:
    return torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def words() -> Tensor:
    return torch.randint(0, 20, (SAMPLES, 7), generator=torch.Generator().manual_seed(1))


def words_and_mask() -> list[dict[str, Tensor]]:
    """Every sample with padding, of another length each."""
    found = []
    for number, row in enumerate(words()):
        mask = torch.ones(7, dtype=torch.long)
        mask[5 - number % 3 :] = 0
        found.append({"input_ids": row, "attention_mask": mask})
    return found


NETS = {"encoder": Case(Encoder, words), "stages": Case(Stages, pictures), "row": Case(row, pictures)}


def of_transformers(kind: str, **more: Any) -> nn.Module:
    """A model of transformers from a configuration of small size."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "Gpt2":
        small = {"vocab_size": 24, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
        small |= {"bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small | more))
    if kind == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | {"num_key_value_heads": 1} | more))
    if kind == "Gemma3":
        small |= {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "num_hidden_layers": 7}
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**small | more))
    if kind == "ViT":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **small | more)
        )
    return transformers.BertForSequenceClassification(transformers.BertConfig(**small | more))


TRANSFORMERS = {
    "gpt-2": Case(lambda: of_transformers("Gpt2"), words),
    "llama": Case(lambda: of_transformers("Llama"), words),
    "bert with padding": Case(lambda: of_transformers("Bert"), words_and_mask),
    "gemma 3, two kinds of masks": Case(lambda: of_transformers("Gemma3"), words),
    "vit": Case(lambda: of_transformers("ViT"), pictures),
}
