"""What a step of training costs: `python -m benchmarks.cost` compares it with distillation of the dense model.

Of `fcpts`, or with `--method unipts` or `distill` of the repair of that name, from ERK. Both see the same batches and
run the teacher on each of them (`--cached`: ours reads the teacher's outputs of later passes from its table, as on
inputs that repeat). Seconds, of the processor where there is no GPU: blocks of steps in turns, in one process; the
ratio is the median of those of neighbours. Memory: each in a process of its own; what its peak adds to what it held
before the first step. With a GPU, `--device cuda --model torchvision:resnet50 --shape 3,224,224 --batch 64 --whole
1600` also runs a whole repair against the clock. `--model lite0 --photos DIR` is EfficientNet-lite0 on photographs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from allot import METHODS, Budget, Calibration, Unstructured
from allot.network.layers import is_batch_norm
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.problem import BATCH_NORMS, Candidate
from allot.sources import zoo
from allot.sources.load import load_model
from benchmarks.apart import peak_from_here, resident
from benchmarks.nets import lite0

BLOCK = 10
OURS = ("fcpts", "unipts", "distill")


def steps_of(name: str, model: nn.Module, inputs: Tensor, options: argparse.Namespace) -> Callable[[], None]:
    """A function that takes the next step of `plain`, or of a method."""
    calibration = Calibration.of(inputs, samples=len(inputs), batch_size=options.batch, device=inputs.device)
    return plain(model, calibration, options) if name == "plain" else ours(name, model, calibration, options)


def plain(model: nn.Module, calibration: Calibration, options: argparse.Namespace) -> Callable[[], None]:
    """Distillation of the dense model into a copy of itself, as one would write it in PyTorch."""
    student = copy.deepcopy(model)
    for module in student.modules():
        module.training = options.batch_norm == "batch" and is_batch_norm(module)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-4)
    at = iter(range(10**9))

    def step() -> None:
        batch, _ = calibration.batch(next(at))
        with torch.no_grad():
            theirs = (model(batch) / 2).log_softmax(1)
        loss = 4 * F.kl_div((student(batch) / 2).log_softmax(1), theirs, log_target=True, reduction="batchmean")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()  # both report their loss

    return step


def ours(name: str, model: nn.Module, calibration: Calibration, options: argparse.Namespace) -> Callable[[], None]:
    """The method itself, step by step."""
    problem = make_problem(model, Budget(sparsity=options.sparsity), Unstructured(), calibration=calibration)
    problem = replace(problem, batch_norm=options.batch_norm)
    method: Any = METHODS[name]
    method = replace(method, training=replace(method.training, steps=options.length))
    candidate = Candidate.dense(problem)
    if method.role == "repair":
        candidate = drive(METHODS["erk"], problem, candidate)
    state = method.init(problem, candidate)
    if method.role == "allocate":
        method.step(problem, candidate, state)  # the start

    def step() -> None:
        method.step(problem, candidate, state)
        if not options.cached:
            state["training"]["repeat"] = False

    return step


def setting(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model in eval mode and enough inputs."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    if options.model == "lite0":
        net = lite0.load(options.photos, side=options.side, calibration=max(2 * options.batch, 64), held_out=1)
        return net.model.to(device), net.calibration.to(device)
    source = options.model.removeprefix("zoo:")
    zoo_model = options.model.startswith("zoo:")
    model = zoo.model(source) if zoo_model else load_model(options.model, weights="random", shape=options.shape).model
    if zoo_model:
        data = zoo.data(source, "calibration")
        inputs = torch.stack([data[i][0] for i in range(min(512, len(data)))])
    else:
        inputs = torch.randn(max(2 * options.batch, 64), *options.shape)
    return model.eval().to(device), inputs.to(device)


def seconds(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step, block by block, both in turns."""
    model, inputs = setting(options)
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    steps = {name: steps_of(name, model, inputs, options) for name in ("plain", options.method)}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(options.length // BLOCK):
        for name, step in steps.items():
            started = clock()
            for _ in range(BLOCK):
                step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if block:  # the first one warms up
                found[name].append((clock() - started) / BLOCK)
    return found


def peak(name: str, options: argparse.Namespace) -> int:
    """Bytes that the steps of one of them add at their peak."""
    model, inputs = setting(options)
    step = steps_of(name, model, inputs, options)
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        peak_from_here()
        before = resident("VmRSS")
    for _ in range(2 * BLOCK):
        step()
    return (torch.cuda.max_memory_allocated() if options.device == "cuda" else resident("VmHWM")) - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=OURS, default="fcpts")
    parser.add_argument("--model", default="zoo:glyph-resnet20")
    parser.add_argument(
        "--shape",
        default="3,224,224",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="of one input; zoo nets have their own",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=200, help="steps of each")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--batch-norm", choices=BATCH_NORMS, default="batch", help="in both")
    parser.add_argument("--photos", type=Path, help="folder of photographs, for lite0")
    parser.add_argument("--side", type=int, default=128, help="of the inputs of lite0, in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--whole", type=int, default=0, help="also time a whole run of this many steps")
    parser.add_argument("--peak", choices=("plain", *OURS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.peak:
        sys.stdout.write(json.dumps(peak(options.peak, options)))
        return
    blocks = seconds(options)
    found = {name: statistics.median(some) for name, some in blocks.items()}
    times = [ours / plain for plain, ours in zip(blocks["plain"], blocks[options.method], strict=True)]
    memory = {}
    for name in found:
        command = [sys.executable, "-m", "benchmarks.cost", *sys.argv[1:], "--peak", name]
        memory[name] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    say = Console(soft_wrap=True).print
    say(f"{options.model}, batch {options.batch}, {options.device}, {options.method} at {options.sparsity:.0%}:")
    for name in found:
        say(f"  {name:6} {1000 * found[name]:8.1f} ms a step   {memory[name] / 2**20:8.1f} MiB at the peak")
    say(f"  ratio  {statistics.median(times):8.2f}               {memory[options.method] / memory['plain']:8.2f}")
    if options.whole:
        options.length = options.whole
        model, inputs = setting(options)
        for name in found:
            step, started = steps_of(name, model, inputs, options), time.perf_counter()
            for _ in range(options.whole):
                step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            say(f"  {name:6} {options.whole:,} steps: {(time.perf_counter() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
