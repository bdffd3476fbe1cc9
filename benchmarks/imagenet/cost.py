"""Never run on a GPU. What a whole training costs beside plain distillation: `python -m benchmarks.imagenet cost`.

ResNet-50 at 224 x 224, batch 64, 1,600 steps, of `fcpts` and of the training of `unipts`, each in a process of its own
beside distillation of the dense net as one would write it in PyTorch. Minutes are those of the whole training, its
start included, on inputs that lie on the device; the teacher runs in every step, as with random crops. Memory is the
peak of the process: of CUDA's allocator on a GPU, on the CPU the resident set, Python and PyTorch included. fcpts is
meant to take at most 1.15 times as long as plain distillation. On the CPU, seconds that the processor spent on it
stand beside, which other work on the machine moves less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from allot.run.store import write
from benchmarks.cost import setting, steps_of

LIMIT = {"fcpts": 1.15}
METHODS = ("fcpts", "unipts")


def main(arguments: list[str]) -> int:
    """Measure and print; the exit code is 1 where a limit is missed."""
    options = _parser().parse_args(arguments)
    if options.worker:
        sys.stdout.write(json.dumps(measure(options.worker, options)))
        return 0
    found = {}
    for name in ("plain", *options.methods):
        command = [sys.executable, "-m", "benchmarks.imagenet", "cost", *arguments, "--worker", name]
        found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    told = {
        "model": options.model,
        "shape": found["plain"]["shape"],
        "batch": options.batch,
        "steps": options.steps,
        "threads": options.threads,
        "found": found,
        "ratio": {name: some["seconds"] / found["plain"]["seconds"] for name, some in found.items()},
    }
    if options.out:
        write(options.out, json.dumps(told, indent=1) + "\n")
    Console(soft_wrap=True, highlight=False).print(text(told))
    return int(any(told["ratio"][name] > LIMIT[name] for name in options.methods if name in LIMIT))


def text(told: dict[str, Any]) -> str:
    """What was measured, line by line."""
    found, plain = told["found"], told["found"]["plain"]
    on_gpu = plain["device"] != "CPU"
    lines = [
        f"{told['model']} {'x'.join(map(str, told['shape']))}, batch {told['batch']}, {told['steps']:,} steps, "
        f"{plain['device']}, 95 % sparsity; memory is the peak {plain['memory']}:"
    ]
    for name, some in found.items():
        ratio = told["ratio"][name]
        asked = "" if on_gpu else f", {some['processor_seconds'] / plain['processor_seconds']:.2f} x the processor's"
        if name in LIMIT:
            asked += f"; at most {LIMIT[name]} x the time asked: {'met' if ratio <= LIMIT[name] else 'MISSED'}"
        memory = some["peak"] / plain["peak"]
        lines.append(
            f"  {name:7}{some['seconds'] / 60:8.2f} min {1000 * some['step']:9.1f} ms a step (median)"
            f"{some['peak'] / 2**20:9.0f} MiB   {ratio:.2f} x the time, {memory:.2f} x the memory{asked}"
        )
    return "\n".join(lines)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One whole training in this process."""
    cuda = options.device.startswith("cuda")
    if options.threads:
        torch.set_num_threads(options.threads)
    own = argparse.Namespace(**vars(options), length=options.steps, cached=False, method=name)
    model, inputs = setting(own)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = before = time.perf_counter()
    busy = time.process_time()
    step = steps_of(name, model, inputs, own)
    each = []
    for _ in range(options.steps):
        step()  # each reads its loss, which waits for the device
        now = time.perf_counter()
        each.append(now - before)
        before = now
    if cuda:
        torch.cuda.synchronize()
    return {
        "shape": list(inputs.shape[1:]),
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - busy,
        "step": statistics.median(each),
        "peak": torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory": "that CUDA's allocator gave out" if cuda else "resident set of the process",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagenet cost", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=METHODS, type=lambda text: tuple(text.split(",")), metavar="A,B")
    parser.add_argument("--model", default="torchvision:resnet50", help="[torchvision:resnet50], weights at random")
    parser.add_argument(
        "--shape",
        default=(3, 224, 224),
        type=lambda text: tuple(int(part) for part in text.split(",")),
        metavar="C,H,W",
        help="of one input [3,224,224]; zoo nets have their own",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU [as PyTorch chooses]")
    parser.add_argument("--out", type=Path, help="a JSON file of what was measured")
    parser.add_argument("--worker", choices=("plain", *METHODS), help=argparse.SUPPRESS)
    parser.set_defaults(batch_norm="batch", sparsity=0.95)
    return parser
