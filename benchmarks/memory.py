"""What choices about memory cost and save: `python -m benchmarks.memory`, and `--accuracy` for what they do to results.

Steps of `fcpts` at 95 % on a ResNet-50 with random weights, with each choice of `Compute`, beside plain distillation of
the same net: a teacher without gradients, Adam, gradients of micro-batches accumulated as one would write it. Each
cell runs in a process of its own. Bytes are what the peak adds to the process after libraries and model are loaded
(`resident`), and those of tensors alive at a time beside the model's own (`tensors`, in a process of its own); seconds
are of the fastest step. Measured cells are kept in benchmarks/measured/memory.json and not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allot
from allot import METHODS, Budget, Calibration, Compute, Unstructured
from allot.methods.training.distillation import Training
from allot.methods.training.selection import Selection
from allot.pruning.memory_limit import peak
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.problem import Candidate
from allot.run.store import write
from allot.sources import zoo
from benchmarks.apart import peak_from_here, resident
from benchmarks.runs import SEEDS, Found, cell, fill, measured

PAGE, CACHE = Path("docs/memory.md"), Path("benchmarks/measured/memory.json")
BATCH, NET = 32, "digits-resnet20"

# shown -> (who, choices); both with the same micro-batches
COSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain distillation": ("plain", {}),
    "plain distillation, micro-batches of 4": ("plain", {"micro_batch": 4}),
    "fcpts": ("fcpts", {}),
    "fcpts, checkpoint": ("fcpts", {"checkpoint": True}),
    "fcpts, micro-batches of 16": ("fcpts", {"micro_batch": 16}),
    "fcpts, micro-batches of 4": ("fcpts", {"micro_batch": 4}),
    "fcpts, checkpoint and micro-batches of 4": ("fcpts", {"micro_batch": 4, "checkpoint": True}),
    "fcpts, bf16": ("fcpts", {"amp": "bf16"}),
    "fcpts, channels last": ("fcpts", {"channels_last": True}),
}
CHOICES: dict[str, dict[str, Any]] = {
    "whole batches": {},
    "checkpoint": {"checkpoint": True},
    "micro-batches of 8": {"micro_batch": 8},
    "micro-batches of 4": {"micro_batch": 4},
    "bf16": {"amp": "bf16"},
}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a sum."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        parts = [
            part
            for c_in, c_out, k, s in sizes
            for part in (nn.Conv2d(c_in, c_out, k, s, k // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        ]
        self.body = nn.Sequential(*parts[:-1])
        same = inputs == 4 * width and stride == 1
        skip = (nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.skip: nn.Module = nn.Identity() if same else nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        """relu(body + skip)."""
        return (self.body(x) + self.skip(x)).relu_()


def resnet50() -> nn.Sequential:
    """25.6 million weights; 1000 classes."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    parts.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            parts.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def plain(model: nn.Module, calibration: Calibration, micro_batch: int) -> Callable[[], None]:
    """Distillation of the dense model into a copy of itself, as one would write it in PyTorch."""
    student = copy.deepcopy(model).train()
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-4)
    at = iter(range(10**9))

    def step() -> None:
        batch, samples = calibration.batch(next(at))
        optimiser.zero_grad()
        for part in batch.split(micro_batch or samples):
            with torch.no_grad():
                theirs = (model(part) / 2).log_softmax(1)
            ours = (student(part) / 2).log_softmax(1)
            (4 * F.kl_div(ours, theirs, log_target=True, reduction="sum") / samples).backward()
        optimiser.step()

    return step


def ours(model: nn.Module, calibration: Calibration, compute: Compute) -> Callable[[], None]:
    """Steps of fcpts, its start done."""
    calibration = replace(calibration, channels_last=compute.channels_last)
    problem = replace(
        make_problem(model, Budget(sparsity=0.95), Unstructured(), calibration=calibration), compute=compute
    )
    method: Any = METHODS["fcpts"]
    candidate = Candidate.dense(problem)
    state = method.init(problem, candidate)
    method.step(problem, candidate, state)
    return lambda: method.step(problem, candidate, state) and None


def cost(who: str, choices: dict[str, Any], side: int, steps: int, *, count: bool) -> dict[str, float]:
    """`{"resident", "seconds"}` in this process, or `{"tensors"}` where these are counted, which takes memory."""
    torch.manual_seed(0)
    model = resnet50().eval()
    calibration = Calibration.of(torch.randn(2 * BATCH, 3, side, side), batch_size=BATCH)
    compute = Compute.of(choices)
    first = nn.Linear(3, 3)  # what is imported when a net is first looked at is there before anything counts
    make_problem(first, Budget(sparsity=0.5), Unstructured(), calibration=Calibration.of(torch.randn(2, 3)))
    peak_from_here()
    before, times = resident("VmRSS"), []
    with peak(torch.device("cpu"), model.parameters()) if count else nullcontext() as found:
        step = plain(model, calibration, compute.micro_batch) if who == "plain" else ours(model, calibration, compute)
        for _ in range(steps):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    if found is None:
        return {"resident": resident("VmHWM") - before, "seconds": min(times)}
    return {"tensors": found.bytes - sum(p.numel() * p.element_size() for p in model.parameters())}


def accuracy(choices: dict[str, Any], seed: int) -> dict[str, Any]:
    """Top-1 on test data of a net of the zoo after fcpts."""
    torch.set_num_threads(1)
    data = zoo.data(NET, "calibration")
    result = allot.prune(
        zoo.model(NET),
        data,
        "sparsity=0.95",
        method="fcpts",
        seed=seed,
        test=zoo.data(NET, "test"),
        compute=choices,
    )
    scores: Any = result.scores
    return {"score": scores["sparse"], "nll": scores["nll"]["sparse"], "seconds": sum(result.log.seconds.values())}


def gradient(choices: dict[str, Any]) -> Tensor:
    """All gradients of the first step of a distillation at 95 %, one after the other."""
    calibration = Calibration.of(zoo.data(NET, "calibration"))
    problem = make_problem(zoo.model(NET), Budget(sparsity=0.95), Unstructured(), calibration=calibration)
    candidate = drive(Selection(), problem, drive(METHODS["erk"], problem, Candidate.dense(problem)))
    training, problem = Training(), replace(problem, compute=Compute.of(choices))
    found, _ = training.gradients(problem, training.begin(problem, candidate), candidate.masks)
    return torch.cat([value.flatten() for value in found.values()])


def main() -> None:
    """Measure, print and fill docs/memory.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=96, help="of an image, pixels")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    if options.cell:
        found = cost(*COSTS[options.cell], options.side, options.steps, count=options.count)
        sys.stdout.write(json.dumps(found))
        return
    if options.accuracy:
        cells = [(f"{NET} {name} {seed}", (given, seed)) for name, given in CHOICES.items() for seed in SEEDS]
        found = measured(cells, accuracy, CACHE, options.workers)
        fill(PAGE, "accuracy", lines := accuracy_table(found))
        logging.info("%s", "\n".join(lines))
        return
    found = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    for name in COSTS:
        key = f"{options.side} {name}"
        if key not in found:
            command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--cell", name]
            found[key] = {}
            for more in ([], ["--count"]):
                found[key] |= json.loads(subprocess.run([*command, *more], check=True, stdout=subprocess.PIPE).stdout)
            logging.info("%s: %s", key, found[key])
            write(
                CACHE, "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(found[k])}" for k in sorted(found)) + "\n}\n"
            )
    fill(PAGE, f"costs {options.side}", lines := cost_table(found, options.side))
    logging.info("%s", "\n".join(lines))


def cost_table(found: Found, side: int) -> list[str]:
    """Rows of `COSTS`; the ratio is to plain distillation in the same micro-batches, or whole."""
    lines = [
        "| batch 32 | resident, MiB | tensors, MiB | s a step | of plain, resident | tensors |",
        "|---|" + "--:|" * 5,
    ]
    for name, (who, choices) in COSTS.items():
        own = found[f"{side} {name}"]
        four = ", micro-batches of 4" if choices.get("micro_batch") == 4 else ""
        beside = found[f"{side} plain distillation{four}"]
        ratios = ["" if who == "plain" else f"{own[what] / beside[what]:.2f}" for what in ("resident", "tensors")]
        cells = [f"{own[what] / 2**20:,.0f}" for what in ("resident", "tensors")] + [f"{own['seconds']:.1f}", *ratios]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def accuracy_table(found: Found) -> list[str]:
    """Rows of `CHOICES`."""
    lines = ["| fcpts at 95 %, batch 64 | top-1, % | nll | s a run | cosine |", "|---|" + "--:|" * 4]
    whole = gradient({})
    for name, choices in CHOICES.items():
        own = [found[f"{NET} {name} {seed}"] for seed in SEEDS]
        seconds = cell([run["seconds"] for run in own], digits=0).partition(" ")[0]
        cosine = float(F.cosine_similarity(gradient(choices), whole, dim=0))
        scores = cell([100 * run["score"] for run in own], digits=2)
        lines.append(
            f"| {name} | {scores} | {cell([run['nll'] for run in own], digits=3)} | {seconds} | {cosine:.3f} |"
        )
    return lines


if __name__ == "__main__":
    main()
