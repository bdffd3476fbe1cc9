"""What `allot advise` foretold, and what was then measured: `python -m benchmarks.advise` (ten minutes, two cores).

Two zoo nets and a wide one made by hand, in ONNX Runtime, channels in multiples of 8 (the wide one: 16), equal shares.
Writes docs/advise-results.md. Times are ratios, dense and slim in turn in one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import allot
from allot import zoo
from allot.realise.advise import advise
from allot.realise.timing import Runtime, beside
from allot.zoo.nets import resnet20

NETS = ("digits-resnet20", "glyph-vit", "resnet20 of width 64")
SHARES = (70, 50)


def made(name: str) -> tuple[nn.Module, torch.Tensor, str]:
    """(model, a batch of one input, pattern)."""
    torch.manual_seed(0)
    if name in zoo.MODELS:
        return zoo.model(name).eval(), zoo.data(name, "calibration")[0][0][None], "channels:8"
    return resnet20(10, width=64).eval(), torch.randn(1, 1, 32, 32), "channels:16"


def main() -> None:
    """Ask, prune, measure, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.advise", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/advise-results.md"))
    out = parser.parse_args().out
    runtime = Runtime.parse("onnx")
    rows, sentences = [], []
    for name in NETS:
        model, example, pattern = made(name)
        told = advise(model, example, pattern=pattern, runtime=runtime)
        sentences.append(f"- **{name}** ({pattern}): {' '.join(told['said'])}")
        for share in SHARES:
            row = min(told["channels"], key=lambda row, share=share: abs(100 * row["macs"] - share))
            result = allot.prune(
                model, None, f"macs={share}%", allocate="uniform", pattern=pattern, repair="none", example=example
            )
            dense, slim = beside(model, result.slim(), example, runtime, seconds=5.0)
            rows.append(
                f"| {name} | {share} % | {row['faster']:.2f}x | {dense / slim:.2f}x | "
                f"{100 * (row['faster'] * slim / dense - 1):+.0f} % |"
            )
    page = [
        "# What advise foretold, and what was measured",
        "",
        "Made by `python -m benchmarks.advise` on a shared machine, two cores. ONNX Runtime, one sample a time, equal",
        "shares of channels; the net was then pruned and timed end to end beside the dense one.",
        "",
        "| net | MACs left | foretold | measured | off by |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
        "What it said:",
        "",
        *sentences,
        "",
    ]
    out.write_text("\n".join(page))


if __name__ == "__main__":
    main()
