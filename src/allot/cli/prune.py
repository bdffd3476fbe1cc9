"""The work of the verbs that take one budget: prune, and plan, which needs no data."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from allot.cli.console import people, print_json, progress, say
from allot.cli.default_place import default_place
from allot.cli.finished_run import read_report
from allot.cli.loading import load_inputs, prune_arguments
from allot.cli.recipe import RecipeFile
from allot.errors import GuaranteeMissed, UsageError, VerificationError
from allot.export.files.formats import OWN
from allot.export.timing.latency import Runtime, latency_of
from allot.methods.rules import Given
from allot.network.layers import Scope
from allot.processes import on_first_process
from allot.pruning.assemble import assemble
from allot.pruning.prune import prune
from allot.pruning.request import left_dense
from allot.pruning.setup import make_problem
from allot.report import table
from allot.report.data import layer_rows, of_whole_model, weights_of
from allot.report.headline import headline_line
from allot.report.stages import training_sentences
from allot.run.driver import Progress as Step
from allot.run.driver import drive, interruptible, phase
from allot.run.named import import_from
from allot.run.patterns import Channels
from allot.run.problem import Candidate, Chain, Problem, Rule
from allot.run.store import write_json
from allot.sources.load import example_of, load_model, load_shapes
from allot.sources.names import REMOTE


def prune_command(wanted: RecipeFile, out: Path | None, *, as_json: bool) -> None:
    """Prune, verify and show the result.

    Args:
        out: the run directory; None: one that is named after the run, see `default_place`.
    """
    budget = wanted.parsed_budget()
    with progress(lines=not as_json) as display:
        source, calibration = load_inputs(wanted)
        place = out or default_place(wanted, source.model, calibration)
        begun = out is not None

        def on_step(step: Step) -> None:
            nonlocal begun
            if not begun:
                say(f"run directory: {place}")
            begun = True
            display(step)

        with interruptible() as should_stop:
            missed = None
            try:
                result = prune(
                    source.model, calibration, budget, method=wanted.method, seed=wanted.seed, save_to=place,
                    recipe=wanted.model_dump(mode="json", exclude_none=True), on_step=on_step, should_stop=should_stop,
                    max_drop=wanted.max_drop, min_fidelity=wanted.min_fidelity, **prune_arguments(wanted, source),
                )  # fmt: skip
            except GuaranteeMissed as error:  # shown below, like any finished run
                result, missed = error.result, error
            report = on_first_process(result.timed)
            checks: list[dict[str, Any]] = []
            if not as_json:
                with phase("verifying"):
                    checks = result.verify()["rows"]
    if as_json:
        print_json({**read_report(place), "run": str(place)})
    else:
        _show(report, checks, wanted, place)
    if missed:
        raise missed


def _show(report: dict[str, Any], checks: list[dict[str, Any]], wanted: RecipeFile, out: Path) -> None:
    people.print(headline_line(report), soft_wrap=True)
    people.print(table.run_table(report))
    for stage, (requested, left) in report["diagnostics"].get("fit", {}).get("steps", {}).items():
        say(f"cut to fit {wanted.max_minutes:g} minutes: {stage} takes {left:,} of {requested:,} steps")
    for sentence in training_sentences(report):
        say(f"training: {sentence}")
    _say_checks(checks, out)
    say(f"run directory: {out}")
    say(f"to look at: {out / 'report.html'}")


def _say_checks(rows: list[dict[str, Any]], out: Path) -> None:
    """Report how many checks passed, and which exports differ: these may have gone since.

    Raises:
        VerificationError: the run's own files are not what was written.
    """
    failed = [row for row in rows if not row["passed"]]
    if any(row["file"] in OWN for row in failed):
        raise VerificationError(f"{out} does not hold what was written there: allot verify {out} shows what differs.")
    for row in failed:
        say(f"note: {row['file']}: {row['check']}: promised {row['promised']}, found {row['found']}")
    passed = len(rows) - len(failed)
    say(f"verified: {passed} checks of the re-opened files passed (allot verify {out} --all shows them)")


def plan_command(wanted: RecipeFile, save: Path | None, *, as_json: bool) -> None:
    """Show the allocation, and write it to `save`."""
    model, budget = wanted.required_model(), wanted.parsed_budget()
    import_from(Path.cwd())  # functions that options name
    chain = assemble(
        wanted.method or "erk",
        allocate=wanted.allocate,
        pattern=wanted.pattern,
        repair=wanted.repair,
        options=wanted.options,
    )
    if chain.allocate.needs_data:
        raise UsageError(
            f"{chain.names.allocate} learns from data and cannot be planned: use `allot prune`, or --allocate erk."
        )
    with redirect_stdout(sys.stderr):
        problem = _planned_from_shapes(wanted, chain) or _planned(wanted, chain)
    allocation = drive(chain.allocate, problem, Candidate.dense(problem)).allocation
    if save:
        write_json(save, {**allocation.to_json(), "budget": budget.to_json()})
    plan = {
        "model": model,
        "method": chain.method,
        "pattern": chain.names.pattern,
        "budget": problem.budget.rows(allocation.kept),
        "kept": sum(problem.budget.sizes(allocation.kept).values()),
        "total": problem.budget.total,
        "layers": layer_rows(problem, allocation),
        "skipped": dict(problem.scope.skipped),
        "weights": weights_of(problem.model),
        "whole": of_whole_model(problem, allocation.kept),
    }
    if as_json:
        print_json(plan)
        return
    people.print(table.plan_table(plan))


def _planned(wanted: RecipeFile, chain: Chain) -> Problem:
    """The problem of a plan, of the model with its weights: a plan fetches none, and reads those of this machine."""
    model, names = wanted.required_model(), chain.names
    origin, _, name = model.partition(":")
    weights = wanted.weights or ("random" if origin in REMOTE and not Path(name).exists() else None)
    source = load_model(model, weights=weights, shape=wanted.input)
    if weights == "random" and names.allocate not in ("uniform", "erk"):
        say(f"note: random weights; {names.allocate} depends on the weights: give --weights for a real plan.")
    example = example_of(source, wanted.data, skip_corrupt=wanted.skip_corrupt)
    return make_problem(
        source.model, wanted.parsed_budget(), chain.pattern, example=example, rules=wanted.rules(), seed=wanted.seed,
        latency=partial(latency_of, runtime=Runtime.parse(wanted.runtime), seed=wanted.seed),
        left_dense=left_dense(source.model, names, wanted.rules()),
    )  # fmt: skip


def _planned_from_shapes(wanted: RecipeFile, chain: Chain) -> Problem | None:
    """The problem of a plan, of the model without weights; None where the plan depends on more than shapes."""
    by_shape = isinstance(chain.allocate, Rule) and (
        chain.names.allocate in ("uniform", "erk") or isinstance(chain.allocate.densities, Given)
    )
    numbers = isinstance(chain.pattern, Channels) or wanted.weights not in (None, "default", "random")
    source = load_shapes(wanted.required_model(), shape=wanted.input) if by_shape and not numbers else None
    if source is None or (source.example is None and wanted.data):  # of data, an example has numbers
        return None
    Scope.of(source.model, wanted.rules(), shapes_only=True)  # a rule that matches no layer is an error of its own
    try:
        return make_problem(
            source.model, wanted.parsed_budget(), chain.pattern, example=source.example, rules=wanted.rules(),
            seed=wanted.seed, left_dense=left_dense(source.model, chain.names, wanted.rules()), shapes_only=True,
        )  # fmt: skip
    except UsageError:  # a model that decides by numbers while it runs
        return None
