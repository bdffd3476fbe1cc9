"""What a repair holds on the device, whole and block by block: `python -m benchmarks.streaming` prints a table.

The row wanda is the selection by that score; wanda and admm choose within rows. `error` is the squared distance of the
outputs for the samples from the dense net's, over their squares: that of the whole net and of its blocks agree.

The model is a Llama-like transformer of the transformers package from a configuration, random weights, kept on the
host. Each row is a process of its own. The device is `--device cuda`, or simulated: tensors on it compute on the CPU
and are counted, and more than `--limit` MiB at once is an error, as on a real one (`benchmarks.simulated`). A row
that does not fit runs again without a limit, to say what it would take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from allot import METHODS, Budget, Calibration, Unstructured
from allot.methods.layerwise.blocks import size_of
from allot.methods.layerwise.streamed import Streamed
from allot.methods.layerwise.streamed_block import copied
from allot.methods.training.selection import Selection
from allot.network.call import call
from allot.network.trees import tensors_in
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.patterns import Rows
from allot.run.problem import Candidate, Method, Problem
from allot.run.scores import wanda
from benchmarks.apart import resident
from benchmarks.nets.packages import hide_if_broken
from benchmarks.simulated import NAME, OutOfDeviceMemory, Simulated

MIB = 2**20
ROWS = ("variance", "layerwise", "lstsq", "wanda", "admm")


def transformer(options: argparse.Namespace) -> nn.Module:
    """The model, in eval mode on the host."""
    hide_if_broken("torchvision")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 8 * options.hidden // 3}
    heads = {"num_hidden_layers": options.layers, "num_attention_heads": options.hidden // 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=options.vocabulary, **sizes, **heads)).eval()


def repair_of(name: str) -> Method:
    """The repair, short: memory does not depend on the number of steps."""
    if name == "wanda":
        return Selection(by_inputs=True)
    method: Any = METHODS[name]
    if name == "admm":
        return replace(method, iterations=4, refinement=4)
    if name == "layerwise":
        return replace(method, steps=4)
    return replace(method, batches=1, iterations=4) if name == "lstsq" else method


def measured(name: str, options: argparse.Namespace, *, whole: bool, limit: int) -> dict[str, Any]:
    """Bytes at the peak on the device and resident on the host, seconds and error; `fits`: within the limit."""
    model = transformer(options)
    ids = torch.randint(0, options.vocabulary, (options.samples, options.length))
    inputs = Calibration.of(ids, batch_size=options.batch)
    pattern = Rows() if name in ("wanda", "admm") else Unstructured()
    problem = make_problem(model, Budget(sparsity=0.5), pattern, calibration=inputs)
    candidate = drive(METHODS["uniform"], problem, Candidate.dense(problem))
    if name == "wanda":
        problem = replace(problem, score=wanda)
    else:
        candidate = drive(Selection(), problem, candidate)
    real = options.device != "simulated"
    device = torch.device(options.device if real else NAME)

    def repair() -> Candidate:
        if not whole:
            return drive(Streamed(repair_of(name), device), problem, candidate)
        there = replace(problem, model=copied(model, device, {}), calibration=replace(inputs, device=device))
        masks = {key: mask.to(device) for key, mask in candidate.masks.items()}
        found = drive(repair_of(name), there, replace(candidate, masks=masks))
        back = {what: {key: t.to("cpu") for key, t in getattr(found, what).items()} for what in ("masks", "tensors")}
        return replace(found, **back)

    refused = False
    try:
        with nullcontext() if real else Simulated(limit) as counted:
            started = time.monotonic()
            found = repair()
    except OutOfDeviceMemory:
        refused = True
        with Simulated() as counted:
            started = time.monotonic()
            found = repair()
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated() if real else counted.peak
    held = {"weights": size_of(model), "block": size_of(model.model.layers[0]), "fits": not refused and peak <= limit}
    most = resident("VmHWM")
    return {"peak": peak, "resident": most, "seconds": seconds, "error": error_of(found, problem), **held}


@torch.no_grad()
def error_of(candidate: Candidate, problem: Problem) -> float:
    """Relative squared error of the outputs for the samples."""
    batch, _ = problem.inputs().batch(0)
    sparse, dense = (next(tensors_in(call(problem.model, t, batch))) for t in (candidate.effective(problem), {}))
    return float((sparse - dense).square().sum() / dense.square().sum())


def row(name: str, *, whole: bool, limit: int) -> dict[str, Any]:
    """`measured`, in a process of its own."""
    asked = json.dumps({"name": name, "whole": whole, "limit": limit})
    command = [sys.executable, "-m", "benchmarks.streaming", *sys.argv[1:], "--row", asked]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="simulated", help="simulated, or a real one like cuda")
    parser.add_argument("--limit", type=int, default=128, help="MiB that the device holds")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        asked = json.loads(options.row)
        found = measured(asked["name"], options, whole=asked["whole"], limit=asked["limit"])
        sys.stdout.write(json.dumps(found) + "\n")
        return
    limit = options.limit * MIB
    table = Table("repair", "", "device MiB", "resident MiB", "limit", "seconds", "error")
    said: dict[str, Any] = {}
    for name in ROWS:
        for whole in (False, True):
            said = row(name, whole=whole, limit=limit)
            kept = "kept" if said["fits"] else "passed"
            sizes = [f"{said[key] / MIB:,.0f}" for key in ("peak", "resident")]
            table.add_row(
                name, "whole" if whole else "blocks", *sizes, kept, f"{said['seconds']:.0f}", f"{said['error']:.4f}"
            )
    say = Console(soft_wrap=True).print
    say(
        f"{options.layers} blocks of {said['block'] / MIB:.1f} MiB, weights {said['weights'] / MIB:.0f} MiB in all; "
        f"device: {options.device}, limit {options.limit} MiB; {options.samples} samples of {options.length} tokens"
    )
    say(table)


if __name__ == "__main__":
    main()
