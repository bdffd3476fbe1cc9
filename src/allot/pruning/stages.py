"""The stages of a run one after the other, and a finished run opened again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml

from allot.budget.allocation import Allocation
from allot.errors import BudgetError, Stopped, UsageError, VerificationError
from allot.export.certificate import certificate
from allot.export.files import formats as files
from allot.export.files.latency_tables import save_tables
from allot.export.runtimes.answers import SLIM_TOLERANCE, allowed, off
from allot.methods.training.selection import Selection, channel_masks
from allot.network.call import attempt, write_into
from allot.network.channels import ChannelPlan, slimmed
from allot.network.trees import floats_in
from allot.processes import on_first_process, single_process
from allot.pruning.asked import Asked, Control
from allot.pruning.identity import Limited
from allot.pruning.latency_limit import Held, paced, told
from allot.pruning.result import Result
from allot.run import patterns
from allot.run.driver import drive, repeatable
from allot.run.evaluate import Score
from allot.run.problem import Candidate, Method, Problem
from allot.run.store import Log, Store, write


@dataclass(frozen=True)
class Run:
    """One run: what was asked, what limits made of it, where it is kept, and who hears of it.

    Attributes:
        store: the run directory; None where nothing is saved.
        dense_score: the score of the dense model; None without test data, and where a finished run is opened.
    """

    asked: Asked
    limited: Limited
    store: Store | None
    log: Log
    dense_score: Score | None
    control: Control


def run_stages(run: Run) -> Result:
    """The result of all stages, resumed where the store has one unfinished; scored, verified and saved.

    Raises:
        Stopped: `should_stop` said so.
    """
    problem, store = run.limited.problem, run.store
    if store and store.done:
        return _reopened(run, store)
    if store and store.leads and "latency" in problem.budget.asked:
        save_tables(store.directory, problem)
    stages = _stages(run)
    saved = store.saved if store else None
    log = saved.log if saved else run.log
    candidate = replace(Candidate.dense(problem), diagnostics=run.limited.diagnostics)
    if saved:
        problem = paced(problem, saved.candidate["diagnostics"])
        names = [name for name, _ in stages]
        stages = stages[names.index(saved.stage) :]
    for name, method in stages:
        candidate = _driven(run, name, method, problem, candidate, log)
        if name == "latency":
            problem = paced(problem, candidate.diagnostics)
    scores = None
    if run.asked.score_of and run.dense_score:
        scores = _scores(problem, candidate, run.asked.score_of, run.dense_score)
    if problem.scope.groups:
        with single_process():
            _check_slim(problem, candidate)
    result = _result(run, problem, candidate, log, scores)
    if "latency" in problem.budget.asked:
        result = replace(result, latency=on_first_process(partial(told, problem, candidate)))
    if store:
        on_first_process(partial(_save, result, store, log))
    return result if store is None or store.leads else replace(result, directory=store.directory)


def _stages(run: Run) -> list[tuple[str, Method]]:
    chain = run.limited.chain
    stages: list[tuple[str, Method]] = [("allocate", chain.allocate)]
    if "latency" in run.limited.problem.budget.asked:
        stages.append(("latency", Held()))
    stages.append(("select", Selection()))
    repairs = zip(chain.names.repair, chain.repair, strict=True)
    return stages + [(f"repair-{i}-{name}", method) for i, (name, method) in enumerate(repairs, 1)]


def _driven(run: Run, stage: str, method: Method, problem: Problem, candidate: Candidate, log: Log) -> Candidate:
    """What a stage makes of the candidate; errors name the stage.

    Raises:
        Stopped: `should_stop` said so; the run directory says it as well.
    """
    control = run.control
    try:
        return drive(
            method, problem, candidate, stage=stage, store=run.store, log=log, on_step=control.on_step,
            should_stop=control.should_stop,
        )  # fmt: skip
    except Stopped:
        if run.store:
            run.store.describe("stopped", log)
        raise
    except (UsageError, BudgetError) as error:
        raise type(error)(f"{stage}: {error}") from error
    except Exception as error:
        error.add_note(f"in stage {stage!r} of allot.prune")
        raise


def _result(run: Run, problem: Problem, candidate: Candidate, log: Log, scores: Mapping[str, Any] | None) -> Result:
    chain = run.limited.chain
    return Result(problem, candidate, log, chain.names, chain.method, run.asked.label, scores, summary=chain.summary)


def _save(result: Result, store: Store, log: Log) -> None:
    if result.latency:
        save_tables(store.directory, result.problem)
    write(store.directory / "recipe.yaml", yaml.safe_dump(store.notes["recipe"], sort_keys=False))
    result.save(store.directory)
    store.finish(log)


def _reopened(run: Run, store: Store) -> Result:
    """The result of a finished run, read back from its files.

    Raises:
        VerificationError: they do not hold what was promised.
    """
    problem, score_of = run.limited.problem, run.asked.score_of
    rows, _ = certificate.certificate_rows(store.directory)
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
    dense = run.dense_score
    same = dense and scores and scores.get("nll", {}).get("dense") == dense.nll and scores["dense"] == dense.score
    if score_of and not same:  # the data may be others than the run was scored on
        scores = _scores(problem, candidate, score_of, dense or score_of(problem.model))
    result = _result(run, problem, candidate, log, scores)
    return replace(result, latency=report.get("latency"), directory=store.directory)


def _scores(problem: Problem, candidate: Candidate, score_of: Callable[..., Score], dense: Score) -> dict[str, Any]:
    sparse = score_of(problem.model, tensors=candidate.effective(problem))
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


def _check_slim(problem: Problem, candidate: Candidate) -> None:
    """Compare the smaller net with the masked one on real inputs: groups were proven on random weights.

    Raises:
        VerificationError: their outputs differ.
    """
    inputs = problem.calibration.batch(0)[0] if problem.calibration else problem.example
    tensors = candidate.effective(problem)
    plan = ChannelPlan.of(problem.model, problem.scope.groups, candidate.channels)
    slim = slimmed(problem.model, plan).eval()
    write_into(slim, {name: plan.cut(name, value) for name, value in tensors.items()})
    answers = []
    for model, replaced in ((problem.model, tensors), (slim, {})):
        with repeatable(problem.model, problem.seed, "slim"):
            answers.append(floats_in(attempt(model, inputs, replaced)))
    wanted, outputs = answers
    if wanted and not any(tensor.numel() for tensor in (*wanted, *outputs)):
        return  # a detector that finds nothing in these samples, dense or cut
    if not (error := off(outputs, wanted)) <= allowed(wanted, SLIM_TOLERANCE):
        raise VerificationError(
            f"the smaller net answers otherwise than the masked one, off by {error:.2g} of the largest output: its "
            "channels hang together in a way that was not seen. Leave layers out (--exclude) until it agrees."
        )
