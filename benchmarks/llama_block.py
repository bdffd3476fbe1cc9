"""What wanda and admm take for one block of a language model: `python -m benchmarks.llama_block` prints a table.

The block is that of a Llama of 1.1 billion weights (2,048 wide, 5,632 inside; `--hidden`, `--mlp` and `--kv` for
others), random weights, float32. Memory is that of a simulated device at the peak (`benchmarks.simulated`): tensors
count, scratch memory inside one operator does not. Seconds are CPU-seconds of one thread. A formula predicts the
peak of admm, with P weights in the block, of which the layer at hand has W and K inputs, and E entries of the tensors
that a pass keeps:

    bytes = 4 P (weights) + P (selected masks) + 5 P (finished weights and masks) + E
            + 4 max over layers( 6 K^2 + 3 W while R is made, 5 K^2 + 8 W while the layer is solved )

and on the host 4 x tokens x hidden state in both nets and for two blocks. The last lines are the formula for 7 billion.
Few iterations make it quick: seconds grow with --iterations and --refinement, the peak does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from allot import METHODS, Budget, Calibration, Rules
from allot.methods.layerwise.streamed_block import copied
from allot.methods.training.selection import Selection
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.patterns import Rows
from allot.run.problem import Candidate, Problem
from allot.run.scores import wanda
from benchmarks.nets.packages import hide_if_broken
from benchmarks.simulated import NAME, Simulated

GB = 1e9
HEAD = 64  # size of an attention head
SEVEN = {"hidden": 4096, "mlp": 11008, "kv": 4096}  # of Llama 2 7B


def shapes_of(hidden: int, mlp: int, kv: int) -> list[tuple[int, int]]:
    """(rows, K) of the linear layers of a block."""
    return [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (mlp, hidden), (mlp, hidden), (hidden, mlp)]


def predicted(shapes: Iterable[tuple[int, int]], activations: int = 0) -> int:
    """Bytes of the formula."""
    shapes = list(shapes)
    weights = sum(rows * K for rows, K in shapes)
    layer = max(max(6 * K * K + 3 * rows * K, 5 * K * K + 8 * rows * K) for rows, K in shapes)
    return 10 * weights + 4 * layer + activations


def block(hidden: int, mlp: int, kv: int) -> nn.Module:
    """A Llama of one block and a small vocabulary."""
    hide_if_broken("torchvision")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // HEAD, "num_key_value_heads": kv // HEAD}
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def measured(name: str, problem: Problem, candidate: Candidate, options: argparse.Namespace) -> tuple[int, float]:
    """(bytes on the device at the peak, CPU-seconds)."""
    method: Any = replace(METHODS["admm"], iterations=options.iterations, refinement=options.refinement)
    if name == "wanda":
        problem, method = replace(problem, score=wanda), Selection(by_inputs=True)
    device = torch.device(NAME)
    with Simulated() as counted:
        inputs = replace(problem.inputs(), device=device)
        there = replace(problem, model=copied(problem.model, device, {}), calibration=inputs)
        candidate = replace(candidate, masks={key: mask.to(device) for key, mask in candidate.masks.items()})
        started = time.process_time()
        drive(method, there, candidate)
        seconds = time.process_time() - started
    return counted.peak, seconds


def table(options: argparse.Namespace) -> list[str]:
    """Rows of what was measured, and lines of the formula."""
    model = block(options.hidden, options.mlp, options.kv)
    ids = torch.randint(0, 64, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    inputs = Calibration.of(ids, batch_size=1)
    rules = Rules(exclude=("lm_head",))
    problem = make_problem(model, Budget(sparsity=0.5), Rows(), calibration=inputs, rules=rules)
    allocated = drive(METHODS["uniform"], problem, Candidate.dense(problem))
    selected = drive(Selection(), problem, allocated)
    lines = [f"| {options.samples} x {options.length} tokens | peak, GB | CPU-s |", "|---|--:|--:|"]
    for name, candidate in (("wanda", allocated), ("admm", selected)):
        peak, seconds = measured(name, problem, candidate, options)
        lines.append(f"| {name} | {peak / GB:.2f} | {seconds:.0f} |")
    shapes = shapes_of(options.hidden, options.mlp, options.kv)
    steps = f"{options.iterations} iterations, {options.refinement} of refinement"
    lines += ["", f"{sum(r * k for r, k in shapes):,} weights; admm: {steps}"]
    lines.append(f"formula without activations: {predicted(shapes) / GB:.2f} GB; measured {peak / GB:.2f} GB")
    lines.append(f"formula for a block of 7 billion: {predicted(shapes_of(**SEVEN)) / GB:.1f} GB")
    host = 4 * 128 * 2048 * SEVEN["hidden"] * 2
    lines.append(f"host, 128 x 2,048 tokens in 2 bytes, 7 billion: {host / GB:.1f} GB of hidden states")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.llama_block",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--kv", type=int, default=256, help="rows of keys, and of values")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--refinement", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write("\n".join(table(options)) + "\n")


if __name__ == "__main__":
    main()
