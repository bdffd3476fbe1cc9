"""The chain: a trained model, calibration inputs and a budget in; a `Result` that meets the budget out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from allot.budget.budget import Budget
from allot.budget.units import KINDS
from allot.errors import AllotError, CannotWrite, GuaranteeMissed, UsageError, users_errors
from allot.export.timing.latency import Runtime
from allot.network.arguments import typed_but
from allot.network.compute import Compute
from allot.network.layers import Rules
from allot.network.preserved import preserved
from allot.processes import on_first_process
from allot.pruning.assemble import adapted, assemble, fitted, repair_by_blocks, stream_repairs
from allot.pruning.identity import identity, notes
from allot.pruning.memory_limit import choose_compute
from allot.pruning.request import Prepared, Request, default_method
from allot.pruning.result import Result
from allot.pruning.setup import set_up
from allot.pruning.stages import Run, run_stages
from allot.pruning.time_limit import choose_cut, limit_steps, shorten
from allot.report.progress import shown_in_python
from allot.run.activity import activity
from allot.run.calibration import Data
from allot.run.driver import Progress
from allot.run.evaluate import Score
from allot.run.labelled import LabelledData
from allot.run.max_drop import MaxDrop
from allot.run.min_fidelity import MinFidelity
from allot.run.outputs import Comparison, Outputs
from allot.run.patterns import Pattern
from allot.run.places import check_directory_place
from allot.run.problem import Method, Problem
from allot.run.scores import ChannelScore, WeightScore
from allot.run.store import Log, open_store
from allot.run.untrained import note_untrained, sign_in_score


@typed_but("budget", "metric", "allocate", "repair", "min_fidelity")
@users_errors("allot.prune")
@torch.inference_mode(mode=False)
def prune(
    model: nn.Module,
    calibration: Data | None,
    budget: Budget | str | float | Mapping[str, float | int | str] | None = None,
    *,
    method: str | None = None,
    allocate: str | Method | Mapping[str, float] | None = None,
    score: str | WeightScore | ChannelScore | None = None,
    pattern: str | Pattern | None = None,
    repair: str | Sequence[str | Method] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    rules: Rules | None = None,
    seed: int = 0,
    samples: int | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    example: Any = None,
    runtime: str | None = None,
    test: LabelledData | None = None,
    metric: Callable[..., Any] | str | None = None,
    max_drop: float | str | None = None,
    min_fidelity: float | str | None = None,
    label: str | None = None,
    save_to: str | os.PathLike[str] | None = None,
    max_minutes: float | None = None,
    max_steps: int | None = None,
    stream: str | torch.device | None = None,
    compute: Compute | Mapping[str, Any] | None = None,
    max_memory: int | str | None = None,
    outputs: str | Outputs | None = None,
    loss: Literal["kl", "mse"] | None = None,
    batch_norm: Literal["auto", "batch", "frozen"] = "auto",
    views: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    dense_score: Score | None = None,
    on_step: Callable[[Progress], None] | None = None,
    progress: bool | None = None,
    should_stop: Callable[[], bool] | None = None,
    **limits: float | str,
) -> Result:
    """A sparse version of `model` that meets `budget` exactly; the model passed in is untouched.

    Args:
        model: any trained module.
        calibration: a tensor `[N, ...]`, Dataset, DataLoader (of batches), iterable (of samples, or of batches where
            only these fit the model), `Readable` or `Calibration`; labels are ignored. None where nothing needs inputs.
        budget: `Budget(sparsity=0.9)`, text like "macs=50%", a dict of limits by kind, or a number: a sparsity.
        method: recipe to start from, a key of `RECIPES`; the next four replace single parts of it. None: see
            `default_method`.
        allocate: name in `METHODS`, a method, densities by layer name, or the path of an allocation.json.
        score: name in `SCORES` or a function `(layer, weight, evidence) -> tensor`.
        pattern: "unstructured", "rows", "2:4" or a `Pattern`.
        repair: names joined with commas ("none" for none), or a sequence of names and methods, in this order.
        options: method name -> hyperparameters that differ from the defaults.
        rules: which layers, with which bounds.
        seed: decides every draw.
        samples, batch_size: how many calibration inputs are used, and how many at a time. None: 512 and 64; of texts
            for a model of transformers 128, and as many as make 1,024 tokens.
        workers: threads that read samples; the result is the same whatever their number.
        example: a batch of one input, to count MACs with; None: the first calibration sample.
        runtime: measures latency: "onnx" or "torch", with a batch size like "onnx:64"; None: see `Runtime`.
        test: labelled data, used for the score before and after only.
        metric: what scores them, a function or its place, see `evaluate`; None: top-1.
        max_drop: how much worse than dense the score may be, "1pt", "5%" or a number (`allot.run.max_drop`).
        min_fidelity: the least agreement with the dense model on the watch set, 0.95 or "95%" (`run.min_fidelity`).
        label: what reports call the model; None: its class.
        save_to: run directory. An unfinished one of the same configuration resumes; a finished one is opened.
        max_minutes: training is cut until it fits (`allot.pruning.time_limit`), and with steps=auto uses the time that
            is left, while it pays; a resumed run keeps its cut.
        max_steps: most steps of each repair that trains with steps=auto, all its rounds together.
        stream: device that holds one block of the model at a time for layer-wise repairs; None: the whole net.
        compute: choices about memory and speed, like {"micro_batch": 8}; see `Compute`.
        max_memory: bytes, or like "6GB": the peak of one training step (`allot.pruning.memory_limit`).
        outputs: which tensors of the model's output are compared with the dense model's: a function of the output, or
            its place like "file.py:function"; None: `.logits`, or all floating-point tensors.
        loss: "kl" or "mse"; None: see `Comparison`.
        batch_norm: in training, batch norms normalise by the "batch", or by their running statistics, which stay
            ("frozen"); "auto": by the batch, unless the dense model answers otherwise with statistics of the batch.
        views: of each picture among the inputs, how many random crops, half of them mirrored, stand beside it in
            statistics and training; None: as repairs ask for them (of `best`, 3 on trial).
        recipe: further entries of recipe.yaml, like the origin of the model.
        dense_score: `evaluate` of the dense model on `test`, where it was computed already.
        progress: whether the run is shown on standard error while it lasts; None: on a terminal and in a notebook.
        limits: the budget as keywords, like sparsity=0.9, macs="50%".
    Raises:
        UsageError, BudgetError, PatternError: the input cannot be used; the message says why, in one line.
        Stopped: `should_stop` returned True; with `save_to` the same call resumes.
        Exception: what the model or the data raise themselves, with a note. A run directory that was begun goes, unless
            it holds seconds of work from which the same call resumes.
        GuaranteeMissed: the score dropped by more than `max_drop`, or fidelity is below `min_fidelity`. The run is
            finished and saved; the error holds its `result`.

    >>> prune(nn.Linear(4, 4), None, "sparsity=0.5", repair="none").report()["kept"]
    8
    """
    method = method or default_method(model, calibration, allocate, pattern, score, repair, stream)
    chain = assemble(method, allocate=allocate, score=score, pattern=pattern, repair=repair, options=options)
    with shown_in_python(progress, on_step) as step_shown:
        request = Request(
            model=model, budget=_budget(budget, limits), chain=chain, rules=rules, seed=seed, calibration=calibration,
            samples=samples, batch_size=batch_size, workers=workers, example=example,
            test=test, metric=metric, max_drop=None if max_drop is None else MaxDrop.read(max_drop),
            min_fidelity=None if min_fidelity is None else MinFidelity.read(min_fidelity),
            dense_score=dense_score, runtime=Runtime.parse(runtime), compute=Compute.of(compute), stream=stream,
            comparison=Comparison(outputs, loss), batch_norm=batch_norm, views=views, default_repair=repair is None,
            max_minutes=max_minutes, max_steps=max_steps, max_memory=max_memory, label=label or type(model).__name__,
            directory=None if save_to is None else check_directory_place(save_to),
            recipe=dict(recipe or {}), options=dict(options or {}), on_step=step_shown, should_stop=should_stop,
        )  # fmt: skip
        log = Log()
        with preserved(model):
            return _run(_prepare(request, set_up(request, log)), log)


def _budget(budget: Any, limits: Mapping[str, float | str]) -> Budget:
    """The budget, given as one value or as keywords.

    Raises:
        TypeError: a keyword that `prune` does not have.
        UsageError: no budget, or two.
    """
    if other := sorted(limits.keys() - set(KINDS)):
        raise TypeError(f"prune() got an unexpected keyword argument {other[0]!r}")
    if (budget is None) == (not limits):
        raise UsageError(f"{'two budgets' if limits else 'no budget'}: give one, like 'macs=50%' or sparsity=0.9.")
    return Budget.of(limits if budget is None else budget)


def _prepare(request: Request, problem: Problem) -> Prepared:
    """The request with the limits of time and memory applied; a resumed run keeps the choices it began with."""
    chain = limit_steps(request.chain, request.max_steps, required=True)
    if request.default_repair:
        chain = fitted(chain, problem, request.views)
    requested = chain
    chain = stream_repairs(chain, problem, request.stream) if request.stream else repair_by_blocks(chain, problem)
    earlier = on_first_process(request.earlier)
    problem = replace(problem, compute=request.compute)
    memory = choose_compute(problem, chain, request.max_memory, earlier.get("memory"))
    if memory:
        problem = replace(problem, compute=Compute.of(memory["picked"]))
    with activity("timing steps") if request.max_minutes else nullcontext():
        cut = choose_cut(problem, chain, request.max_minutes, earlier.get("configuration", {}).get("fit"))
    chain, requested = (shorten(parts, cut) for parts in (chain, requested))
    if request.max_steps and cut and cut.get("max_steps", 0) > request.max_steps:
        chain, requested = (limit_steps(parts, request.max_steps) for parts in (chain, requested))
    chain = adapted(chain, problem, request.views)
    return Prepared(request, problem, chain, requested, cut, memory, earlier.get("state") == "done")


def _run(prepared: Prepared, log: Log) -> Result:
    """The result of the stages; the run directory is open meanwhile."""
    request, store = prepared.request, None
    dense_score = request.dense_score
    if request.score_of and not prepared.done:
        with activity("scoring the dense model"):  # unusable test data is an error before the run
            dense_score = dense_score or request.score_of(request.model)
    if dense_score and dense_score.at_chance:
        note_untrained(log, sign_in_score(dense_score.metric, dense_score.score))
    if request.max_drop and dense_score:
        request.max_drop.limit(dense_score.metric, dense_score.score, lower=dense_score.metric in dense_score.lower)
    device = next(iter(prepared.problem.dense.values())).device
    identified = identity(prepared)
    if request.directory:
        store = open_store(request.directory, identified, notes(prepared, identified), device)
    try:
        result = run_stages(Run(prepared, store, log, dense_score))
    except Exception as error:
        if store and _blames_input(error) and store.abandon():
            error.add_note(f"{store.directory} holds the work before it: the same call resumes")
        raise
    finally:
        if store:
            store.close()
    if missed := [row["text"] for row in result.guarantees if not row["met"]]:
        raise GuaranteeMissed(f"{'; '.join(missed)}.", result)
    return result


def _blames_input(error: Exception) -> bool:
    """Whether model, data or options are at fault: with others in their place, the directory would be in the way."""
    return not isinstance(error, AllotError) or (isinstance(error, UsageError) and not isinstance(error, CannotWrite))
