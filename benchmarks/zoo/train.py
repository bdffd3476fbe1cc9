"""Train a net of the zoo: `python -m benchmarks.zoo.train NAME [--out FILE] [--threads N]`.

Needs scikit-learn (digits) or matplotlib and Pillow (glyph). Every batch is drawn anew from the base pictures of
the `train` split. The last step counts: nothing is chosen by score. `--test` scores the test split, once, at the end.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from allot.sources.zoo._catalogue import DATASETS, MODELS, data, normalise
from benchmarks.zoo.drawing import SHIPPED, SOURCES, draw

log = logging.getLogger("allot")


def sgd(net: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(net: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay 0.05 on matrices and kernels, none on biases, norms and positions."""
    matrices = [p for name, p in net.named_parameters() if p.dim() > 1 and "position" not in name]
    others = [p for name, p in net.named_parameters() if p.dim() <= 1 or "position" in name]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.05)


@dataclass(frozen=True)
class Recipe:
    """How one net is trained: optimiser and its peak learning rate, steps, pictures per step, label smoothing.

    The rate rises linearly over the first 5 % of the steps and then falls to 0 along a cosine.
    """

    optimiser: Callable[[nn.Module, float], torch.optim.Optimizer]
    rate: float
    steps: int
    batch: int = 64
    smoothing: float = 0.1
    seed: int = 0


RECIPES = {  # chosen on the validation split
    "digits-resnet20": Recipe(sgd, rate=0.05, steps=4000),
    "glyph-resnet20": Recipe(sgd, rate=0.05, steps=4000),
    "glyph-mobilenetv2": Recipe(sgd, rate=0.05, steps=4000),
    "glyph-vit": Recipe(adamw, rate=1e-3, steps=10000),
}


def train(name: str, recipe: Recipe) -> nn.Module:
    """The net `name`, trained from scratch, eval mode.

    Same recipe, same machine and same number of threads: same weights. Seeds torch's global generator.

    Args:
        name: a key of `MODELS`.
    Raises:
        ImportError: what the data set is made with is not installed.
    """
    torch.manual_seed(recipe.seed)
    entry, source = MODELS[name], SOURCES[MODELS[name].data]
    bases = source.bases()["train"]
    net = entry.net(entry.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch lacks it
    optimiser = recipe.optimiser(net, recipe.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warm_cosine(step, recipe.steps))
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(1, recipe.steps + 1):
        chosen = bases.at(torch.randint(len(bases.labels), (recipe.batch,), generator=generator))
        images = normalise(draw(chosen, source.jitter, generator), DATASETS[entry.data])
        loss = F.cross_entropy(net(images), chosen.labels, label_smoothing=recipe.smoothing)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % max(1, recipe.steps // 10) == 0:
            log.info("step %5d  loss %.3f  validation %.4f", step, loss.item(), top1(net, entry.data, "validation"))
            net.train()
    return net.eval().to(memory_format=torch.contiguous_format)


def top1(net: nn.Module, name: str, split: str) -> float:
    """Fraction of a split that `net` classifies correctly; leaves the net in eval mode."""
    images, labels = data(name, split).tensors
    net.eval()
    with torch.inference_mode():
        hits = sum((net(x).argmax(1) == y).sum() for x, y in zip(images.split(256), labels.split(256), strict=True))
    return int(hits) / len(labels)


def main() -> None:
    """Train one net, write its weights, log scores and CPU time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--out", type=Path, help="safetensors file; default: the one that the package ships")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the shipped weights were made with 1")
    parser.add_argument("--test", action="store_true", help="score the test split at the end")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    out = options.out or SHIPPED / "weights" / f"{options.name}.safetensors"

    net = train(options.name, RECIPES[options.name])
    out.write_bytes(safetensors.torch.save({key: value.contiguous() for key, value in net.state_dict().items()}))
    log.info("%d parameters, %.0f CPU seconds", sum(p.numel() for p in net.parameters()), time.process_time())
    for split in ("validation", "test") if options.test else ("validation",):
        log.info("%s top-1 %.4f", split, top1(net, MODELS[options.name].data, split))


def _warm_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate at `step`, counted from 0."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


if __name__ == "__main__":
    main()
