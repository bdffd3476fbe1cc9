"""What the finish of a run costs: `python -m benchmarks.finish` prints seconds and memory of each phase.

A Llama-like language model with random weights (57 million with the defaults) is pruned to 50 % by magnitude without
repair, saved, exported as `allot prune` does, and verified. Memory is what the peak of a phase adds to the process at
the end of pruning, over the bytes of the model: it includes activations, imports, and memory that the C library does
not give back. Linux only.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allot
from allot.run.driver import Progress, phase, phases
from benchmarks.runs import fill

PAGE = Path("docs/memory.md")


class Decoder(nn.Module):
    """Attention whose heads share keys in pairs, and a gated product, each around a sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = 64
        wide = 8 * width // 3
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, width, bias=False)
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]`, the same shape again."""
        y = self.before(x)
        q, k, v = (part(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Embedding, decoders, and a head that shares the embedding."""

    def __init__(self, width: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.decoders = nn.Sequential(*(Decoder(width) for _ in range(depth)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, tokens, vocabulary]`."""
        return self.head(self.norm(self.decoders(self.embedding(tokens))))


class Recorder(logging.Handler):
    """CPU seconds, and resident bytes at the peak, of every phase that is logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.rows: list[tuple[str, float, int]] = []
        self.started = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Begin or end a phase."""
        if record.levelno == logging.DEBUG:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            self.started = time.process_time()
        else:
            name = record.getMessage().rpartition(":")[0]
            self.rows.append((name, time.process_time() - self.started, resident("VmHWM")))


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def measured(options: argparse.Namespace) -> list[str]:
    """A table of phases."""
    torch.manual_seed(0)
    model = Llama(options.width, options.depth, options.vocabulary).to(getattr(torch, options.dtype)).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = torch.randint(0, options.vocabulary, (8, options.tokens))
    recorder, before = Recorder(), 0

    def on_step(step: Progress) -> None:
        nonlocal before
        before = resident("VmRSS")  # of the last step: what the run holds itself

    phases.addHandler(recorder)
    phases.setLevel(logging.DEBUG)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"method": "uniform", "repair": "none", "save_to": Path(folder) / "run"}
        started = time.process_time()
        result = allot.prune(model, tokens, "sparsity=0.5", on_step=on_step, batch_size=4, **settings)
        pruned = time.process_time() - started - sum(seconds for _, seconds, _ in recorder.rows)
        result.timed()
        with phase("verifying"):
            result.verify()
    weights = sum(p.numel() for p in model.parameters())
    lines = [
        f"| {weights / 1e6:.0f} million {options.dtype}, {size / 2**20:,.0f} MiB | CPU seconds | peak, models |",
        "|---|--:|--:|",
        f"| reading, checking and pruning | {pruned:.1f} | |",
    ]
    return lines + [f"| {name} | {took:.1f} | {(top - before) / size:.2f} |" for name, took, top in recorder.rows]


def main() -> None:
    """Measure, print and fill docs/memory.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finish", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=256, help="of the input that is timed")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32, float16 or bfloat16")
    parser.add_argument("--fill", action="store_true", help="put the table into docs/memory.md")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    lines = measured(options)
    if options.fill:
        fill(PAGE, "finish", lines)
    logging.info("%s", "\n".join(lines))


if __name__ == "__main__":
    main()
