"""The stages of a run, one after the other, and the result of a finished run read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml

from allot.budget.allocation import Allocation
from allot.budget.unused import warn_unused
from allot.errors import BudgetError, Stopped, UsageError, VerificationError
from allot.export.certificate import certificate
from allot.export.certificate.records import rewrite
from allot.export.files import formats as files
from allot.export.files.latency_tables import save_tables
from allot.export.runtimes.answers import SLIM_TOLERANCE, allowed, off
from allot.methods.training.selection import Selection, channel_masks
from allot.methods.training.where_it_helps import WhereItHelps
from allot.network.call import attempt, write_into
from allot.network.channels import ChannelPlan, slimmed
from allot.network.trees import floats_in
from allot.processes import on_first_process, single_process
from allot.pruning.latency_limit import latency_report, latency_stages, slow_tables
from allot.pruning.request import Prepared
from allot.pruning.result import Result
from allot.pruning.scoring import compared_scores, guarantees, is_score_of
from allot.report.exports import update_report
from allot.report.stages import stages as stages_of
from allot.run import patterns
from allot.run.activity import activity, tell
from allot.run.driver import drive, repeatable
from allot.run.evaluate import Score
from allot.run.guard import Guard
from allot.run.problem import Candidate, Chain, Method, Problem, innermost
from allot.run.store import Log, Store, write


@dataclass(frozen=True)
class Run:
    """One run: the request as prepared, its run directory and its log.

    Attributes:
        store: the run directory; None where nothing is saved.
        dense_score: the score of the dense model; None without test data, and where a finished run is opened.
    """

    prepared: Prepared
    store: Store | None
    log: Log
    dense_score: Score | None


def run_stages(run: Run) -> Result:
    """The result of all stages, scored, verified and saved; an unfinished stage in the store resumes.

    Raises:
        Stopped: `should_stop` returned True.
    """
    problem, store = run.prepared.problem, run.store
    if store and store.done:
        return _reopen(run, store)
    if store and store.leads and "latency" in problem.budget.asked:
        save_tables(store.directory, problem)
    stages, before = _stages(run), 0
    saved = store.saved if store else None
    log = saved.log if saved else run.log
    limits = {"fit": run.prepared.cut, "memory": run.prepared.memory}
    limits = {name: limit for name, limit in limits.items() if limit}
    candidate = replace(Candidate.dense(problem), diagnostics=limits)
    if saved:
        problem = slow_tables(problem, saved.candidate["diagnostics"])
        candidate = Candidate.from_state(saved.candidate, problem)
        before = [name for name, _ in stages].index(saved.stage)
        stages = stages[before:]
    guard = Guard(problem, log)
    guard.note_dense(Candidate.dense(problem))
    for number, (name, method) in enumerate(stages, 1 + before):
        with activity(_title(name, run.prepared.chain, method), number, before + len(stages)):
            if name == "select":
                candidate = _select_stage(run, method, candidate, guard)
            else:
                candidate = _drive_stage(run, name, method, candidate, guard)
                if (trainings := candidate.diagnostics.get("helps")) and isinstance(method, WhereItHelps):
                    guard.note_left_out(name, trainings[-1]["left_out"])
        names = run.prepared.chain.names
        told = {"allocate": names.allocate, "score": names.score, "fidelity": log.fidelity, "guard": log.guard}
        (stage,) = stages_of({**told, "seconds": {name: 0.0}})
        if stage.outcome:
            tell(stage.text)
        if name.startswith("latency"):
            problem = guard.problem = slow_tables(problem, candidate.diagnostics)
    guard.note_useless(candidate)
    scores, score_of = None, run.prepared.request.score_of
    if score_of and run.dense_score:
        with activity("scoring the sparse model"):
            scores = compared_scores(problem, candidate, score_of, run.dense_score)
    if problem.scope.groups:
        with single_process():
            _check_slim(problem, candidate)
    candidate = replace(candidate)  # without the masked copy of the model that scoring made
    result = _result(run, problem, candidate, log, scores)
    if "latency" in problem.budget.asked:
        result = replace(result, latency=on_first_process(partial(latency_report, problem, candidate)))
    on_first_process(partial(warn_unused, problem.budget, candidate.allocation.kept))
    if store:
        on_first_process(partial(_save, result, store, log))
    return result if store is None or store.leads else replace(result, directory=store.directory)


def _stages(run: Run) -> list[tuple[str, Method]]:
    chain = run.prepared.chain
    stages: list[tuple[str, Method]] = [("allocate", chain.allocate)]
    if "latency" in run.prepared.problem.budget.asked:
        stages += latency_stages(chain.allocate)
    stages.append(("select", chain.select or Selection()))
    repairs = zip(chain.names.repair, chain.repair, strict=True)
    return stages + [(f"repair-{i}-{name}", method) for i, (name, method) in enumerate(repairs, 1)]


def _title(stage: str, chain: Chain, method: Method) -> str:
    """What a stage does, in the words of a user."""
    if stage.startswith("allocate"):
        return f"sparsity per layer ({chain.names.allocate})"
    if not stage.startswith("repair-"):
        return {"select": "choosing weights", "latency": "timing nets", "latency-again": "timing nets again"}[stage]
    inner = innermost(method)
    trains, refits = hasattr(inner, "training") or hasattr(inner, "then"), hasattr(inner, "iterations")
    return f"{'training' if trains else 'refitting' if refits else 'correcting'} ({stage.split('-', 2)[2]})"


def _select_stage(run: Run, method: Method, allocated: Candidate, guard: Guard) -> Candidate:
    """The candidate after selection: of the weights that the allocator trained, or of the dense ones if better.

    Where batch-norm re-estimation follows, they are compared after it.
    """
    if not allocated.tensors or guard.watch is None:
        return _drive_stage(run, "select", method, allocated, guard)
    trained = _drive_stage(run, "select", method, allocated, guard, guarded=False)
    untrained = drive(method, guard.problem, replace(allocated, tensors={}), stage="select", log=guard.log)
    chain = run.prepared.chain
    before, after = untrained, trained
    if chain.names.repair[:1] == ("bn",):
        before, after = (drive(chain.repair[0], guard.problem, c, stage="bn", log=guard.log) for c in (before, after))
    guard.note("dense weights", 0, before)
    kept = guard.after("select", 1, before, after, cause=f"training in {chain.names.allocate}")
    return trained if kept is after else replace(untrained, diagnostics=trained.diagnostics)


def _drive_stage(
    run: Run, stage: str, method: Method, candidate: Candidate, guard: Guard, *, guarded: bool = True
) -> Candidate:
    """The candidate after a stage; errors name the stage.

    Args:
        guarded: whether it is compared with the candidate before.
    Raises:
        Stopped: `should_stop` returned True; run.json records that.
    """
    request = run.prepared.request
    try:
        return drive(
            method, guard.problem, candidate, stage=stage, store=run.store, log=guard.log, on_step=request.on_step,
            should_stop=request.should_stop, guard=guard if guarded else None,
        )  # fmt: skip
    except Stopped:
        if run.store:
            run.store.describe("stopped", guard.log)
        raise
    except (UsageError, BudgetError) as error:
        raise type(error)(f"{stage}: {error}") from error
    except Exception as error:
        error.add_note(f"in stage {stage!r} of allot.prune")
        raise


def _result(run: Run, problem: Problem, candidate: Candidate, log: Log, scores: Mapping[str, Any] | None) -> Result:
    chain, label = run.prepared.chain, run.prepared.request.label
    kept = guarantees(run.prepared.request, scores, log)
    return Result(
        problem, candidate, log, chain.names, chain.method, label, scores, summary=chain.summary, guarantees=kept
    )


def _save(result: Result, store: Store, log: Log) -> None:
    if result.latency:
        save_tables(store.directory, result.problem)
    write(store.directory / files.RECIPE, yaml.safe_dump(store.notes["recipe"], sort_keys=False))
    result.save(store.directory)
    rewrite(store.directory, {files.RUN: store.description("done", log)})  # the last file of a run
    store.forget()


def _reopen(run: Run, store: Store) -> Result:
    """The result of a finished run, read back from its files.

    Raises:
        VerificationError: the files do not hold what was promised.
    """
    problem, score_of = run.prepared.problem, run.prepared.request.score_of
    rows, _ = certificate.certificate_rows(store.directory)
    if failed := [row for row in rows if not row["passed"]]:
        differences = "; ".join(f"{row['file']}: {row['check']}: {row['found']}" for row in failed[:3])
        raise VerificationError(
            f"{store.directory} is not what the run left there ({differences}): delete it and run again."
        )
    try:
        report = json.loads((store.directory / "report.json").read_text())
        kept = json.loads((store.directory / "certificate.json").read_text())["promised"]["kept"]
        images, watch = report["images"], dict(report.get("watch", {}))
        log = Log(
            report["seconds"], images["forward"], images["backward"], fidelity=report.get("fidelity", []),
            guard=report.get("guard", []), watched=watch.pop("images", 0), watch=watch,
            untrained=report.get("untrained", []),
        )  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{store.directory}/report.json cannot be read: {error}") from error
    scores = report.get("scores")
    state = {n: v.to(problem.dense[n].device) for n, v in files.load(store.directory).items() if n in problem.dense}
    tensors = {name: value for name, value in state.items() if not torch.equal(value, problem.dense[name])}
    channels: dict[str, tuple[int, ...]] = {}
    if problem.scope.groups:
        channels = dict(ChannelPlan.from_json(json.loads((store.directory / files.PLAN).read_text())).kept)
        kept = {name: len(indices) for name, indices in channels.items()}
        masks = channel_masks(problem, channels)
    else:
        # a weight that is zero but kept does not show in the file: any position will do to keep the count
        masks = {
            layer.name: patterns.select((state[layer.name] != 0).float(), kept[layer.name]) for layer in problem.scope
        }
    allocation = Allocation.of(kept, {term.name: term.total for term in problem.budget.terms})
    candidate = Candidate(allocation, masks, tensors, channels, report.get("diagnostics", {}))
    dense = run.dense_score
    if score_of and not is_score_of(scores, dense):  # other test data, or another metric, than the run was scored with
        scores = compared_scores(problem, candidate, score_of, dense or score_of(problem.model))
    result = _result(run, problem, candidate, log, scores)
    result = replace(result, latency=report.get("latency"), directory=store.directory)
    if result.guarantees and list(result.guarantees) != report.get("guarantees"):
        changes = {"scores": scores, "guarantees": list(result.guarantees)}
        on_first_process(partial(update_report, store.directory, changes))
    return result


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
    outputs = []
    for model, replaced in ((problem.model, tensors), (slim, {})):
        with repeatable(problem.model, problem.seed, "slim"):
            outputs.append(floats_in(attempt(model, inputs, replaced)))
    masked, cut = outputs
    if masked and not any(tensor.numel() for tensor in (*masked, *cut)):
        return  # a detector that finds nothing in these samples, masked or cut
    if not (error := off(cut, masked)) <= allowed(masked, SLIM_TOLERANCE):
        raise VerificationError(
            f"the smaller net answers otherwise than the masked one, off by {error:.2g} of the largest output: its "
            "channels hang together in a way that was not seen. Leave layers out (--exclude) until it agrees."
        )
