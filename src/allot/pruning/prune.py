"""The chain: a trained model, calibration inputs and a budget in; a `Result` that meets the budget out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allot.budget.budget import Budget
from allot.export.timing.latency import Runtime
from allot.network.compute import Compute
from allot.network.layers import Rules
from allot.processes import on_first_process
from allot.pruning.asked import Asked, Control
from allot.pruning.assemble import assemble, streamed
from allot.pruning.identity import Limited, identity, notes
from allot.pruning.memory_limit import choose_compute, of_one_process, warn_of_unused
from allot.pruning.result import Result
from allot.pruning.setup import set_up
from allot.pruning.stages import Run, run_stages
from allot.pruning.time_limit import cut_of, shortened
from allot.run.driver import Progress
from allot.run.evaluate import Score
from allot.run.patterns import Pattern
from allot.run.problem import Method, Problem
from allot.run.scores import ChannelScore, WeightScore
from allot.run.store import Log, open_store


@torch.inference_mode(mode=False)
def prune(
    model: nn.Module,
    calibration: Any,
    budget: Budget | str,
    *,
    method: str = "erk",
    allocate: str | Method | Mapping[str, float] | None = None,
    score: str | WeightScore | ChannelScore | None = None,
    pattern: str | Pattern | None = None,
    repair: str | Sequence[str | Method] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    rules: Rules | None = None,
    seed: int = 0,
    samples: int = 512,
    batch_size: int = 64,
    workers: int = 0,
    example: Any = None,
    runtime: str | None = None,
    test: Any = None,
    label: str | None = None,
    save_to: str | Path | None = None,
    max_minutes: float | None = None,
    stream: str | torch.device | None = None,
    compute: Compute | Mapping[str, Any] | None = None,
    max_memory: int | str | None = None,
    recipe: Mapping[str, Any] | None = None,
    dense_score: Score | None = None,
    on_step: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """A sparse version of `model` that meets `budget` exactly; the model passed in is untouched.

    Args:
        model: any trained module.
        calibration: a tensor `[N, ...]`, Dataset, DataLoader (of batches), iterable (of samples, or of batches where
            only these fit the model), `Readable` or `Calibration`; labels are ignored. None where nothing needs inputs.
        budget: `Budget(sparsity=0.9)` or text like "macs=50%".
        method: recipe to start from, a key of `RECIPES`; the next four replace single parts of it.
        allocate: name in `METHODS`, a method, densities by layer name, or the path of an allocation.json.
        score: name in `SCORES` or a function `(layer, weight, evidence) -> tensor`.
        pattern: "unstructured", "2:4" or a `Pattern`.
        repair: names joined with commas ("none" for none), or a sequence of names and methods, in this order.
        options: method name -> hyperparameters that differ from the defaults.
        rules: which layers, with which bounds.
        seed: decides every draw.
        samples, batch_size: how many calibration inputs are used, and how many at a time.
        workers: threads that read samples; the result is the same whatever their number.
        example: a batch of one input, to count MACs with; None: the first calibration sample.
        runtime: what latency is measured in: "onnx" or "torch", with a batch size like "onnx:64"; None: see `Runtime`.
        test: labelled data, used for the score before and after and for nothing else.
        label: what reports call the model; None: its class.
        save_to: run directory. An unfinished one of the same configuration resumes; a finished one is open_store.
        max_minutes: training is cut to what fits (`allot.pruning.time_limit`); a resumed run keeps its cut.
        stream: device that holds one block of the model at a time for layer-wise repairs; None: the whole net.
        compute: choices about memory and speed, like {"micro_batch": 8}; see `Compute`.
        max_memory: bytes, or like "6GB": the peak of one training step (`allot.pruning.memory_limit`).
        recipe: more for recipe.yaml, like where the model comes from.
        dense_score: `evaluate` of the dense model on `test`, where it is known already.
    Raises:
        UsageError, BudgetError, PatternError: what is wrong with the input, in one line.
        Stopped: `should_stop` said so; with `save_to` the same call resumes.
    """
    chain = assemble(method, allocate=allocate, score=score, pattern=pattern, repair=repair, options=options)
    log, control = Log(), Control(on_step, should_stop)
    asked = Asked(
        model, Budget.parse(budget) if isinstance(budget, str) else budget, chain, rules, seed,
        calibration, samples, batch_size, workers, example, test, dense_score,
        Runtime.parse(runtime), Compute.of(compute), stream, max_minutes, max_memory,
        label or type(model).__name__, Path(save_to) if save_to else None, dict(recipe or {}), dict(options or {}),
    )  # fmt: skip
    limited = _within_limits(asked, set_up(asked, log, control))
    return _run(asked, limited, log, control)


def _within_limits(asked: Asked, problem: Problem) -> Limited:
    """The problem and the chain, with training cut and memory saved as far as the limits of time and memory ask."""
    chain = streamed(asked.chain, problem, asked.stream) if asked.stream else asked.chain
    problem = replace(problem, compute=asked.compute)
    warn_of_unused(problem, chain)
    choose = partial(choose_compute, of_one_process(problem), chain, asked.max_memory)
    memory = on_first_process(lambda: choose(asked.earlier().get("memory")))
    if memory:
        problem = replace(problem, compute=Compute.of(memory["picked"]))
    time = cut_of(problem, chain, asked.max_minutes, lambda: asked.earlier().get("configuration", {}).get("fit"))
    as_asked, chain = (shortened(parts, time) if time else parts for parts in (asked.chain, chain))
    return Limited(problem, chain, as_asked, time, memory)


def _run(asked: Asked, limited: Limited, log: Log, control: Control) -> Result:
    """The result of the stages; the run directory is open meanwhile."""
    done = on_first_process(lambda: asked.earlier().get("state") == "done")
    dense_score = asked.dense_score
    if asked.score_of and not done:
        dense_score = dense_score or asked.score_of(asked.model)  # unusable test data costs no run
    device = next(iter(limited.problem.dense.values())).device
    named = identity(asked, limited)
    store = open_store(asked.directory, named, notes(asked, limited, named), device) if asked.directory else None
    try:
        return run_stages(Run(asked, limited, store, log, dense_score, control))
    finally:
        if store:
            store.close()
