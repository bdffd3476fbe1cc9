"""What `allot advise` predicted, and what was then measured: `python -m benchmarks.advise` (ten minutes, two cores).

Channels: two zoo nets and a wide one made by hand, in ONNX Runtime, channels in multiples of 8 (the wide one: 16),
equal shares; the net is then pruned and timed beside the dense one. Single weights: a zoo net and a wide perceptron, in
PyTorch, equal densities; the net is then pruned and exported to csr. Writes docs/advise-results.md. Times are ratios,
both in turn in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import allot
from allot.export.runtimes.sparse import linear_layers
from allot.export.timing.latency import Runtime, time_both
from allot.pruning.advise import advise
from allot.sources import zoo
from allot.sources.zoo.nets import resnet20

NETS = ("digits-resnet20", "glyph-vit", "resnet20 of width 64")
LINEAR = ("glyph-vit", "perceptron of width 2048")
SHARES = (70, 50)
DENSITIES = ("0.2", "0.1", "0.05")


def made(name: str) -> tuple[nn.Module, torch.Tensor, str]:
    """(model, a batch of one input, pattern)."""
    torch.manual_seed(0)
    if name in zoo.MODELS:
        return zoo.model(name).eval(), zoo.data(name, "calibration")[0][0][None], "channels:8"
    if name.startswith("perceptron"):
        wide = [layer for _ in range(3) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
        return (
            nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), *wide, nn.Linear(2048, 10)).eval(),
            torch.randn(1, 256),
            "",
        )
    return resnet20(10, width=64).eval(), torch.randn(1, 1, 32, 32), "channels:16"


def channels(name: str, runtime: Runtime) -> tuple[list[str], list[str]]:
    """Rows of a net: predicted and measured; and what was said of it."""
    model, example, pattern = made(name)
    told = advise(
        model, example, pattern=pattern, runtime=runtime, label=f"zoo:{name}" if name in zoo.MODELS else "MODEL"
    )
    rows = []
    for share in SHARES:
        row = min(told["channels"], key=lambda row, share=share: abs(100 * row["macs"] - share))
        result = allot.prune(
            model, None, f"macs={share}%", allocate="uniform", pattern=pattern, repair="none", example=example
        )
        dense, slim = time_both(model, result.slim(), example, runtime, seconds=5.0)
        rows.append(_row(name, f"{share} % of the MACs", row["faster"], dense / slim))
    return rows, [f"- **{name}** ({pattern}): {'. '.join(said.rstrip('.') for said in told['said'])}."]


def single_weights(name: str) -> list[str]:
    """Rows of a net: predicted and measured."""
    model, example, _ = made(name)
    told = advise(model, example, runtime=Runtime("torch"))
    rows = []
    for density in DENSITIES:
        rules = allot.Rules(include=tuple(linear_layers(model, [layer.name for layer in allot.Scope.of(model)])))
        asked = allot.Budget(sparsity=1 - float(density))
        result = allot.prune(model, None, asked, allocate="uniform", repair="none", example=example, rules=rules)
        with tempfile.TemporaryDirectory() as folder:
            row = result.export(Path(folder) / "model.csr.safetensors", to="csr")
        # no layer was converted: the net computes as dense and is not timed
        rows.append(_row(name, f"{density} of the weights", told["net"]["faster"][density], row["faster"] or 1.0))
    return rows


def _row(name: str, left: str, predicted: float, measured: float) -> str:
    return f"| {name} | {left} | {predicted:.2f}x | {measured:.2f}x | {100 * (predicted / measured - 1):+.0f} % |"


def main() -> None:
    """Ask, prune, measure, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.advise", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/advise-results.md"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    runtime = Runtime.parse("onnx")
    rows, sentences = [], []
    for name in NETS:
        some, said = channels(name, runtime)
        rows, sentences = rows + some, sentences + said
    for name in LINEAR:
        rows += single_weights(name)
    page = [
        "# What advise predicted, and what was measured",
        "",
        "Made by `python -m benchmarks.advise` on a shared machine with two cores, one thread of PyTorch. Of the MACs:",
        "equal shares of channels in ONNX Runtime, one sample a time; the net was then pruned and timed end to end",
        "beside the dense one. Of the weights: linear layers as sparse matrices in PyTorch; the net was then pruned to",
        "the same density everywhere and exported to csr.",
        "",
        "| net | left | predicted | measured | off by |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
        "The advice:",
        "",
        *sentences,
        "",
    ]
    out.write_text("\n".join(page))


if __name__ == "__main__":
    main()
