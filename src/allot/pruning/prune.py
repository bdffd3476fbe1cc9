"""The chain: a trained model, calibration inputs and a budget in; a `Result` that meets the budget out."""

from __future__ import annotations

import itertools
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allot.budget.budget import Budget
from allot.budget.latency import Latency
from allot.errors import AllotError, Stopped, UsageError
from allot.export.files.formats import TABLES
from allot.export.files.latency_tables import load_tables
from allot.export.timing.latency import Runtime, latency_of
from allot.methods.training.selection import Selection
from allot.network.batch_norms import check_divisible
from allot.network.call import attempt
from allot.network.compute import Compute
from allot.network.layers import Rules, Scope
from allot.processes import all_gather_object, check_equal, on_first_process, single_process, world_size
from allot.pruning.assemble import Parts, assemble, settings, streamed
from allot.pruning.identity import fingerprint
from allot.pruning.memory_limit import chosen, of_one_process, tell_unused
from allot.pruning.result import Result
from allot.pruning.setup import check_made_nothing, check_plain, names_of, pose
from allot.pruning.stages import run_stages
from allot.pruning.time_limit import kept_cut, shortened
from allot.run.calibration import Calibration
from allot.run.driver import Progress, repeatable
from allot.run.evaluate import Score, evaluate
from allot.run.patterns import Channels, Pattern
from allot.run.problem import Candidate, Method
from allot.run.scores import ChannelScore, WeightScore
from allot.run.store import Log, open_store, read_run


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
        calibration: a tensor `[N, ...]`, Dataset, DataLoader, iterable or `Calibration`; labels are ignored. A
            DataLoader gives batches; any other iterable gives samples, or batches where only these fit the model.
            Of `Readable(dataset)`, samples that cannot be read are reported and left out.
            None where neither the method nor a macs budget needs inputs.
        budget: `Budget(sparsity=0.9)` or text like "macs=50%".
        method: recipe to start from, a key of `RECIPES`; the next four replace single parts of it.
        allocate: name in `METHODS`, a method, densities by layer name, or the path of an allocation.json.
        score: name in `SCORES` or a function `(layer, weight, evidence) -> tensor`.
        pattern: "unstructured", "2:4" or a `Pattern`.
        repair: names joined with commas ("none" for none), or a sequence of names and methods, done in this order.
        options: method name -> hyperparameters that differ from the defaults.
        rules: which layers, with which bounds.
        seed: decides every draw.
        samples, batch_size: how many calibration inputs are used, and how many at a time.
        workers: threads that read samples of calibration and test data; the result is the same whatever their number.
        example: a batch of one input, to count MACs with; the first calibration sample where there is one.
        runtime: what a budget of latency is measured in, "onnx" or "torch", with a batch size after a colon: "onnx:64";
            ONNX Runtime where it is installed, one sample at a time, where None.
        test: labelled data, never used for anything but the score before and after.
        label: what the model is called in reports; its class where None.
        save_to: run directory; an unfinished one with the same configuration goes on where it stopped, a finished
            one is opened and returned.
        max_minutes: training is cut to what fits, from what steps take here (`allot.pruning.time_limit`); a run that
            goes on keeps the cut that it began with.
        stream: the device on which layer-wise repairs have one block of the model at a time
            (`allot.methods.layerwise.streamed`), while the model stays where it is; None: the whole net at once.
        compute: choices about memory and speed, like {"micro_batch": 8}; see `Compute`.
        max_memory: bytes, or text like "6GB": what one step of training may take at its peak; choices of `compute`
            are made so that it does (`allot.pruning.memory_limit`). A run that goes on keeps them.
        recipe: what to write as recipe.yaml beside what is known here, like where the model comes from.
        dense_score: what `evaluate` gives for the dense model on `test`, where that is known already.
    Raises:
        UsageError, BudgetError, PatternError: what is wrong with the input, in one line.
        Stopped: `should_stop` said so; with `save_to` the same call goes on.
    """
    check_plain(model)
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    parts = assemble(method, allocate=allocate, score=score, pattern=pattern, repair=repair, options=options)
    # what is wrong with the model comes before a forward pass: one would fill lazy layers
    Scope.of(model, None if isinstance(parts.pattern, Channels) else rules)
    served, compute = Runtime.parse(runtime), Compute.of(compute)
    compute.check(model)
    log = Log()
    with repeatable(model, seed, "pose"):
        sizes = {"samples": samples, "batch_size": batch_size, "seed": seed, "workers": workers}
        inputs = _calibration(model, calibration, channels_last=compute.channels_last, **sizes)
        problem = pose(
            model,
            budget,
            parts.pattern,
            calibration=inputs,
            example=None if inputs else example,
            rules=rules,
            score=parts.score,
            seed=seed,
            latency=_timing(served, seed, save_to, log, on_step, should_stop),
        )
    for part in (parts.allocate, *parts.repair):
        if part.needs_data:
            problem.inputs()
    if world_size() > 1:
        _check_shared(model, inputs)
    if inputs is None:  # a score that needs inputs says so before anything is written
        whole = Candidate.dense(problem)
        Selection().step(problem, whole, Selection().init(problem, whole))
    chain = streamed(parts, problem, stream) if stream else parts
    problem = replace(problem, compute=compute)
    tell_unused(problem, chain)
    if held := on_first_process(partial(chosen, of_one_process(problem), chain, max_memory, save_to)):
        problem = replace(problem, compute=Compute.of(held["picked"]))
    cut = kept_cut(problem, chain, max_minutes, save_to)
    parts, chain = (shortened(some, cut) if cut else some for some in (parts, chain))
    if isinstance(test, Iterable) and not hasattr(test, "__len__") and not hasattr(test, "dataset"):
        test = list(test)  # it is read twice
    done = bool(save_to) and on_first_process(partial(_is_done, Path(save_to or "")))
    judge = partial(evaluate, data=test, workers=workers) if test is not None else None
    dense = dense_score
    if judge and not done:
        dense = dense or judge(model)  # unusable test data costs no run
    with single_process(), repeatable(model, seed, "fingerprint"):
        found = fingerprint(problem)
    for what, digest in found.items():
        check_equal(f"the {what}", digest)
    where_asked = {
        "runtime": str(served) if budget.latency is not None else None,
        "stream": str(stream) if stream else None,
        "fit": cut,
        "compute": problem.compute.identity(),
    }
    configuration = _configuration(budget, parts, rules, seed, inputs)
    configuration |= {key: value for key, value in where_asked.items() if value}
    asked = {"configuration": configuration, "fingerprint": found}
    chosen_parts = {key: value for key, value in configuration.items() if key not in ("hyperparameters", "fit")}
    told: dict[str, Any] = {name: value for name, value in (("fit", cut), ("memory", held)) if value}
    limits = [f"{kind}={amount}" for kind, amount in budget.to_json().items()]
    chosen_parts |= {"budget": limits, "options": settings(options or {}), "compute": compute.to_json()}
    device = next(iter(problem.dense.values())).device
    notes = {
        "versions": _versions(),
        "recipe": chosen_parts | dict(recipe or {}),
        "memory": held,
        "processes": world_size(),
    }
    store = open_store(save_to, asked, notes, device) if save_to else None
    try:
        name = label or type(model).__name__
        return run_stages(problem, chain, store, log, name, judge, dense, told, on_step, should_stop)
    finally:
        if store:
            store.close()


def _check_shared(model: nn.Module, inputs: Calibration | None) -> None:
    """Raises:
    UsageError: processes cannot share batches of this model, or of this size.
    """
    check_divisible(model)
    if inputs is None:
        return
    inputs.share(range(len(inputs) // inputs.batches))  # the smallest batch is large enough
    called: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(lambda *_, name=name: called.update([name]))
            stack.callback(handle.remove)
        attempt(model, inputs.batch(0)[0], {})
    if any(other != called for other in all_gather_object(called)):
        raise UsageError(
            "layers of this model run or not depending on the samples (as in a mixture of experts): processes cannot "
            "share its batches; leave torchrun out."
        )


def _is_done(run: Path) -> bool:
    return (run / "run.json").exists() and read_run(run)["state"] == "done"


def _timing(
    runtime: Runtime,
    seed: int,
    run: str | Path | None,
    log: Log,
    on_step: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Callable[..., Latency]:
    """What gives the tables of a budget of time: those of the run, where it began before; else they are measured."""

    def tell(done: int, of: int) -> None:
        if should_stop and should_stop():
            raise Stopped(f"stopped while timing layers, {done} of {of}: the next start times them anew", saved=False)
        if on_step:
            on_step(Progress("measure", done, of, {}))

    def measure(*problem: Any) -> Latency:
        started = time.monotonic()
        tables = latency_of(*problem, runtime=runtime, seed=seed, on_step=tell)
        log.seconds["measure"] = time.monotonic() - started
        return tables

    def timing(*problem: Any) -> Latency:
        path = Path(run) / TABLES if run else None
        if path and path.exists() and (path.parent / "run.json").exists():
            tables, extents = load_tables(path), problem[3]
            if tables.runtime != str(runtime):
                return measure(*problem)  # of a run that did not begin; of any other the store says what differs
            if not {layer.layer for layer in tables.layers} <= {extent.name for extent in extents}:
                raise UsageError(f"{run} belongs to another model: choose another directory or delete it.")
            return tables
        return measure(*problem)

    return lambda *problem: on_first_process(lambda: timing(*problem))


def _calibration(
    model: nn.Module, data: Any, *, samples: int, batch_size: int, seed: int, workers: int, channels_last: bool
) -> Calibration | None:
    """Calibration on the model's device; an iterable whose items are batches already is recognised by trying."""
    if isinstance(data, Calibration):
        return replace(data, channels_last=data.channels_last or channels_last)
    if data is None:
        return None
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    before = names_of(model)
    if isinstance(data, Iterable) and not hasattr(data, "__len__") and not hasattr(data, "dataset"):
        data = list(itertools.islice(data, samples))  # an iterator: it can only be read once, and may have no end

    def read(*, batched: bool) -> Calibration:
        found = Calibration.of(
            data,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            batched=batched,
            device=reference.device,
            dtype=reference.dtype,
            channels_last=channels_last,
        )
        attempt(model, found.example(), {})
        check_made_nothing(model, before)
        return found

    try:
        return read(batched=False)
    except UsageError as error:
        if not isinstance(data, Sequence) or isinstance(data, str):
            raise
        try:
            return read(batched=True)
        except (AllotError, TypeError, IndexError, AttributeError):
            raise error from None  # what is wrong with the data as samples


def _configuration(
    budget: Budget, parts: Parts, rules: Rules | None, seed: int, inputs: Calibration | None
) -> dict[str, Any]:
    return {
        "budget": budget.to_json(),
        "method": parts.method,
        "allocate": parts.names.allocate,
        "score": parts.names.score,
        "pattern": parts.names.pattern,
        "repair": list(parts.names.repair),
        "hyperparameters": {
            "allocate": settings(parts.allocate),
            "score": settings(parts.score),
            "pattern": settings(parts.pattern),
            "repair": [settings(part) for part in parts.repair],
        },
        **asdict(rules or Rules()),
        "seed": seed,
        "samples": len(inputs) if inputs else 0,
        "batch_size": inputs.batch_size if inputs else 0,
    }


def _versions() -> dict[str, str]:
    return {"allot": metadata.version("allot"), "torch": torch.__version__, "python": platform.python_version()}
