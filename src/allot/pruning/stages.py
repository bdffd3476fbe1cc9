"""The stages of a run one after the other, and a finished run opened again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import yaml

from allot.budget.allocation import Allocation
from allot.errors import BudgetError, Stopped, UsageError, VerificationError
from allot.export.certificate import certificate
from allot.export.files import formats as files
from allot.export.files.latency_tables import save_tables
from allot.export.runtimes.answers import check_slim
from allot.methods.training.selection import Selection, channel_masks
from allot.network.channels import ChannelPlan
from allot.processes import on_first_process, single_process
from allot.pruning.assemble import Parts
from allot.pruning.latency_limit import Held, paced, told
from allot.pruning.result import Result
from allot.run import patterns
from allot.run.driver import Progress, drive
from allot.run.evaluate import Score as Accuracy
from allot.run.problem import Candidate, Method, Problem
from allot.run.store import Log, Store, write

Judge = Callable[..., Accuracy]  # `evaluate` on the test data


def run_stages(
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
    """The result of all stages, from where `store` left off; scored, verified and saved.

    Args:
        judge: scores on the test data; None: there is none.
        dense: what it says of the dense model.
        told_first: what the report says before any stage: what training was cut to (`allot.pruning.time_limit`), what
            was chosen to save memory (`allot.pruning.memory_limit`).
    Raises:
        Stopped: `should_stop` said so.
    """
    stages: list[tuple[str, Method]] = [("allocate", parts.allocate), ("select", Selection())]
    if "latency" in problem.budget.asked:
        stages.insert(1, ("latency", Held()))
        if store and store.leads and not store.done:
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
        with single_process():
            check_slim(problem, candidate)
    if "latency" in problem.budget.asked:
        result = replace(result, latency=on_first_process(partial(told, problem, candidate)))
    if store:
        on_first_process(partial(_save, result, store, log))
    return result if store is None or store.leads else replace(result, directory=store.directory)


def _save(result: Result, store: Store, log: Log) -> None:
    if result.latency:
        save_tables(store.directory, result.problem)
    write(store.directory / "recipe.yaml", yaml.safe_dump(store.notes["recipe"], sort_keys=False))
    result.save(store.directory)
    store.finish(log)


def _reopened(
    problem: Problem, parts: Parts, store: Store, label: str, judge: Judge | None, dense: Accuracy | None
) -> Result:
    """The result of a finished run, read back from its files.

    Raises:
        VerificationError: they do not hold what was promised.
    """
    rows, _ = certificate.certified(store.directory)
    if failed := [row for row in rows if not row["passed"]]:
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
