"""The chain: a trained model, calibration inputs and a budget in; a `Result` that meets the budget out."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from allot import patterns
from allot.allocation import Allocation
from allot.budget import Budget
from allot.calibration import Calibration
from allot.channels import ChannelPlan
from allot.compute import Compute
from allot.errors import AllotError, BudgetError, Stopped, UsageError, VerificationError
from allot.evaluate import Score as Accuracy
from allot.evaluate import attempt, evaluate
from allot.fingerprint import fingerprint
from allot.fit import kept_cut, shortened
from allot.latency import Latency
from allot.layers import Rules, Scope
from allot.memory import chosen
from allot.parts import Parts, assemble, settings
from allot.patterns import Channels, Pattern
from allot.pose import check_made_nothing, check_plain, names_of, pose
from allot.realise import certificate, files
from allot.realise.compare import check_slim
from allot.realise.files import TABLES
from allot.realise.held import Held, load_tables, paced, save_tables, told
from allot.realise.timing import Runtime, latency_of
from allot.result import Result
from allot.run import Candidate, Method, Problem, Progress, drive, repeatable
from allot.scores import ChannelScore, Score
from allot.selection import Selection, channel_masks
from allot.store import Log, Store, read_run, write

Judge = Callable[..., Accuracy]  # `evaluate` on the test data


@torch.inference_mode(mode=False)
def prune(
    model: nn.Module,
    calibration: Any,
    budget: Budget | str,
    *,
    method: str = "erk",
    allocate: str | Method | Mapping[str, float] | None = None,
    score: str | Score | ChannelScore | None = None,
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
    dense: Accuracy | None = None,
    label: str | None = None,
    save_to: str | Path | None = None,
    max_minutes: float | None = None,
    compute: Compute | Mapping[str, Any] | None = None,
    max_memory: int | str | None = None,
    recipe: Mapping[str, Any] | None = None,
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
        dense: the score before, where it is known: several runs on one model measure it once.
        label: what the model is called in reports; its class where None.
        save_to: run directory; an unfinished one with the same configuration goes on where it stopped, a finished
            one is opened and returned.
        max_minutes: training is cut to what fits, from what steps take here (`allot.fit`); a run that goes on keeps
            the cut that it began with.
        compute: choices about memory and speed, like {"micro_batch": 8}; see `Compute`.
        max_memory: bytes, or text like "6GB": what one step of training may take at its peak; choices of `compute`
            are made so that it does (`allot.memory`). A run that goes on keeps them.
        recipe: what to write as recipe.yaml beside what is known here, like where the model comes from.
        on_step: called after every step.
        should_stop: asked before every step.
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
    if inputs is None:  # a score that needs inputs says so before anything is written
        whole = Candidate.dense(problem)
        Selection().step(problem, whole, Selection().init(problem, whole))
    problem = replace(problem, compute=compute)
    if held := chosen(problem, parts, max_memory, save_to):
        problem = replace(problem, compute=Compute.of(held["picked"]))
    cut = kept_cut(problem, parts, max_minutes, save_to)
    parts = shortened(parts, cut) if cut else parts
    if isinstance(test, Iterable) and not hasattr(test, "__len__") and not hasattr(test, "dataset"):
        test = list(test)  # it is read twice
    done = save_to and (Path(save_to) / "run.json").exists() and read_run(save_to)["state"] == "done"
    judge = partial(evaluate, data=test, workers=workers) if test is not None else None
    if judge and not done:
        dense = dense or judge(model)  # unusable test data costs no run
    with repeatable(model, seed, "fingerprint"):
        found = fingerprint(problem)
    asked = {"configuration": _configuration(budget, parts, rules, seed, inputs), "fingerprint": found}
    if budget.latency is not None:
        asked["configuration"]["runtime"] = str(served)
    known = {key: value for key, value in asked["configuration"].items() if key != "hyperparameters"}
    if cut:
        asked["configuration"]["fit"] = cut
    if identity := problem.compute.identity():
        asked["configuration"]["compute"] = identity
    told: dict[str, Any] = {name: value for name, value in (("fit", cut), ("memory", held)) if value}
    limits = [f"{kind}={amount}" for kind, amount in budget.to_json().items()]
    known |= {"budget": limits, "options": settings(options or {}), "compute": compute.to_json()}
    device = next(iter(problem.dense.values())).device
    notes = {"versions": _versions(), "recipe": {**known, **(recipe or {})}, "memory": held}
    store = Store(save_to, asked, notes, device) if save_to else None
    try:
        name = label or type(model).__name__
        return _chain(problem, parts, store, log, name, judge, dense, told, on_step, should_stop)
    finally:
        if store:
            store.close()


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

    return timing


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


def _chain(
    problem: Problem,
    parts: Parts,
    store: Store | None,
    log: Log,
    label: str,
    judge: Judge | None,
    dense: Accuracy | None,
    told_first: Mapping[str, Any],
    on_step: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Result:
    stages: list[tuple[str, Method]] = [("allocate", parts.allocate), ("select", Selection())]
    if "latency" in problem.budget.asked:
        stages.insert(1, ("latency", Held()))
        if store and not store.done:
            save_tables(store.directory, problem)
    stages += [
        (f"repair-{i}-{name}", part)
        for i, (name, part) in enumerate(zip(parts.names.repair, parts.repair, strict=True), 1)
    ]
    if store and store.done:
        return _reopened(problem, parts, store, label, judge, dense)
    log = store.saved.log if store and store.saved else log
    names = [name for name, _ in stages]
    first = names.index(store.saved.stage) if store and store.saved else 0
    candidate = replace(Candidate.dense(problem), diagnostics=told_first)
    if store and store.saved:
        problem = paced(problem, store.saved.candidate["diagnostics"])
    for name, part in stages[first:]:
        try:
            candidate = drive(
                part, problem, candidate, stage=name, store=store, log=log, on_step=on_step, should_stop=should_stop
            )
        except Stopped:
            if store:
                store.describe("stopped", log)
            raise
        except (UsageError, BudgetError) as error:
            raise type(error)(f"{name}: {error}") from error
        except Exception as error:
            error.add_note(f"in stage {name!r} of allot.prune")
            raise
        if name == "latency":
            problem = paced(problem, candidate.diagnostics)
    scores = _scores(problem, candidate, judge, dense) if judge and dense else None
    result = Result(problem, candidate, log, parts.names, parts.method, label, scores)
    if problem.scope.groups:
        check_slim(problem, candidate)
    if "latency" in problem.budget.asked:
        result = replace(result, latency=told(problem, candidate))
        if store:
            save_tables(store.directory, problem)
    if store:
        write(store.directory / "recipe.yaml", yaml.safe_dump(store.notes["recipe"], sort_keys=False))
        result.save(store.directory)
        store.finish(log)
    return result


def _reopened(
    problem: Problem, parts: Parts, store: Store, label: str, judge: Judge | None, dense: Accuracy | None
) -> Result:
    """The result of a finished run, read back from its files.

    Raises:
        VerificationError: they do not hold what was promised.
    """
    found = certificate.verify(store.directory)
    if failed := [row for row in found["rows"] if not row["passed"]]:
        what = "; ".join(f"{row['file']}: {row['check']}: {row['found']}" for row in failed[:3])
        raise VerificationError(f"{store.directory} is not what the run left there ({what}): delete it and run again.")
    try:
        report = json.loads((store.directory / "report.json").read_text())
        kept = json.loads((store.directory / "certificate.json").read_text())["promised"]["kept"]
        log = Log(report["seconds"], report["images"]["forward"], report["images"]["backward"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{store.directory}/report.json cannot be read: {error}") from error
    scores = report.get("scores")
    state = {n: v.to(problem.dense[n].device) for n, v in files.load(store.directory).items() if n in problem.dense}
    tensors = {name: value for name, value in state.items() if not torch.equal(value, problem.dense[name])}
    channels: dict[str, tuple[int, ...]] = {}
    if problem.scope.groups:
        channels = dict(ChannelPlan.from_json(json.loads((store.directory / files.PLAN).read_text())).kept)
        kept = {name: len(some) for name, some in channels.items()}
        masks = channel_masks(problem, channels)
    else:
        # a weight that is zero but kept does not show in the file: any position will do to keep the count
        masks = {
            layer.name: patterns.select((state[layer.name] != 0).float(), kept[layer.name]) for layer in problem.scope
        }
    allocation = Allocation.of(kept, {term.name: term.total for term in problem.budget.terms})
    candidate = Candidate(allocation, masks, tensors, channels, report.get("diagnostics", {}))
    same = dense and scores and scores.get("nll", {}).get("dense") == dense.nll and scores["dense"] == dense.score
    if judge and not same:  # the data may be others than the run was scored on
        scores = _scores(problem, candidate, judge, dense or judge(problem.model))
    latency = report.get("latency")
    return Result(problem, candidate, log, parts.names, parts.method, label, scores, latency, store.directory)


def _scores(problem: Problem, candidate: Candidate, judge: Judge, dense: Accuracy) -> dict[str, Any]:
    sparse = judge(problem.model, tensors=candidate.effective(problem))
    found = {
        "metric": dense.metric,
        "dense": dense.score,
        "sparse": sparse.score,
        "samples": dense.samples,
        "nll": {"dense": dense.nll, "sparse": sparse.nll},
    }
    if dense.perplexity is not None:
        found["perplexity"] = {"dense": dense.perplexity, "sparse": sparse.perplexity}
    return found | ({"unreadable": dense.unreadable} if dense.unreadable else {})


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
