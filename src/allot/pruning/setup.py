"""The problem of a request: inputs read, scope measured on one example, budget tied to the scope."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.budget.channels import ChannelBudget, Dimension, Extent, channel_terms
from allot.budget.costs import Term
from allot.budget.latency import Latency
from allot.errors import AllotError, BudgetError, NothingInScope, PatternError, Stopped, UsageError
from allot.export.files import formats as files
from allot.export.files.formats import TABLES
from allot.export.files.latency_tables import load_tables
from allot.export.timing.latency import Runtime, latency_of
from allot.methods.training.selection import Selection
from allot.network.call import attempt, dtype_for
from allot.network.compute import check_divisible
from allot.network.coupling.find import find_groups
from allot.network.kinds import FLOATS, FROZEN, INSIDE
from allot.network.layers import Group, Rules, Scope, matches, plain_state
from allot.network.preserved import refused_writes
from allot.processes import all_gather_object, on_first_process, world_size
from allot.pruning.checks import check_followed, check_numbers, check_plain, nothing_in_scope, packed_weights
from allot.pruning.measured_scope import measured_scope, warn_small_scope
from allot.pruning.request import Request
from allot.run.activity import activity
from allot.run.batch_norm_mode import MOVED, batch_norm_error
from allot.run.calibration import BATCH, SAMPLES, TEXTS, Calibration, inputs_of, texts_at_a_time
from allot.run.driver import Progress, repeatable
from allot.run.fidelity import Watch
from allot.run.input_advice import with_advice
from allot.run.outputs import Comparison
from allot.run.patterns import Channels, Pattern
from allot.run.problem import Candidate, Problem
from allot.run.scores import CHANNEL_SCORES, SCORES, ChannelScore, WeightScore
from allot.run.store import Log
from allot.run.untrained import note_untrained, sign_in_outputs, sign_in_weights

logger = logging.getLogger("allot")

# tables of a model: (model, scope, groups, extents, terms, example, limit) -> times
Timing = Callable[[nn.Module, Scope, Sequence[Group], Sequence[Extent], Sequence[Term], Any, str], Latency]


def set_up(request: Request, log: Log) -> Problem:
    """The problem: inputs read, scope measured on one of them, budget tied to it.

    Args:
        log: gets the seconds that timing layers took, for a budget of latency; signs of a model without training.
    Raises:
        UsageError, BudgetError, PatternError: the model, the inputs or the budget cannot be used.
        Stopped: `should_stop` returned True while layers were timed.
    """
    chain = request.chain
    with repeatable(request.model, request.seed, "pose"):  # the name decides draws: another one, other draws
        with activity("reading samples"):
            inputs, watch = _calibration(request), None
        if inputs is not None:
            inputs, watched = inputs.parted()
            watch = Watch(request.model, watched, request.comparison)
        with activity("measuring MACs"):
            problem = make_problem(
                request.model, request.budget, chain.pattern, calibration=inputs, rules=request.rules,
                score=chain.score, example=None if inputs else request.example, seed=request.seed,
                latency=_timing(request, log), left_dense=request.left_dense, comparison=request.comparison,
            )  # fmt: skip
    seen = sign_in_outputs(watch.kind, watch.dense_outputs()) if watch else ""
    note_untrained(log, request.known_untrained, sign_in_weights(request.model), seen)
    warn_small_scope(request.model, problem.scope)
    if any(part.needs_data for part in (chain.allocate, *chain.repair)):
        problem.inputs()
    if world_size() > 1:
        _check_shared(request.model, inputs)
    if inputs is None:  # a score that needs inputs says so before anything is written
        Selection().step(problem, whole := Candidate.dense(problem), Selection().init(problem, whole))
    with activity("looking at batch norms"):
        return replace(problem, watch=watch, batch_norm=_batch_norm(request.batch_norm, problem, log))


def _batch_norm(requested: str, problem: Problem, log: Log) -> str:
    """How batch norms normalise in training; by their running statistics where those of a batch move the outputs."""
    if requested != "auto" or problem.calibration is None or (error := batch_norm_error(problem)) is None:
        return "batch" if requested == "auto" else requested
    mode = "frozen" if error >= MOVED else "batch"
    log.watch["batch_norm"] = {"mode": mode, "error": error}
    if mode == "frozen":
        logger.warning(
            "with batch statistics the dense model answers otherwise (relative error %.2g): batch norms keep their "
            "running statistics", error,
        )  # fmt: skip
    return mode


def make_problem(
    model: nn.Module,
    budget: Budget,
    pattern: Pattern,
    *,
    calibration: Calibration | None = None,
    example: Any = None,
    rules: Rules | None = None,
    score: WeightScore | ChannelScore | None = None,
    seed: int = 0,
    latency: Timing | None = None,
    left_dense: Mapping[str, str] | None = None,
    shapes_only: bool = False,
    comparison: Comparison | None = None,
) -> Problem:
    """The problem: scope measured on one example, budget tied to it.

    Args:
        example: a batch of inputs of one sample, to count MACs and follow channels with; from the calibration data
            where None.
        score: of weights, or of channels; by magnitude where None.
        latency: makes the tables of a budget of time; None: they are measured in the runtime that is installed.
        left_dense: parameters that are not in scope, with the reason.
        shapes_only: whether the model's parameters may have shapes and no values, for an allocator that reads none.
        comparison: how outputs are compared with the dense net's.
    Raises:
        UsageError: weights that are not finite, a compiled or wrapped model, or inputs that the model does not take.
        BudgetError, PatternError: nothing meets the budget in this pattern.
    """
    check_plain(model)
    score = score or (CHANNEL_SCORES if isinstance(pattern, Channels) else SCORES)["magnitude"]
    # rules on channels choose groups, below
    scope = Scope.of(model, None if isinstance(pattern, Channels) else rules, shapes_only=shapes_only)
    scope = _without_channels(scope) if isinstance(pattern, Channels) else scope
    scope = scope.without(left_dense or {})
    scope = replace(scope, skipped={**scope.skipped, **packed_weights(model)})
    before = tensor_names(model)
    check_numbers(model)
    example = calibration.example() if example is None and calibration else example
    if example is not None:
        scope = measured_scope(scope, model, example, calibration, weights=not isinstance(pattern, Channels))
    check_no_new_tensors(model, before)
    if not scope.layers:
        raise NothingInScope(nothing_in_scope(scope, rules))
    if isinstance(pattern, Channels):
        check_followed(model)
        if example is None:
            raise UsageError("channels are found by running the model: give --data or --input (example= in Python).")
        timing = latency or partial(latency_of, runtime=Runtime.parse(None), seed=seed)
        scope, channels = _channel_budget(model, scope, budget, pattern.step, example, rules or Rules(), timing)
        posed = Problem(model, scope, channels, pattern, score, calibration, seed, example)
        return _compared(posed, comparison)
    state, _ = plain_state(model)
    layout = files.layout(state, files.metadata_of(model, scope, budget))
    sizes = {layer.name: state[layer.name].element_size() for layer in scope}
    terms = tuple(
        Term(
            layer.name, layer.total, lower, upper, step, layer.macs,
            dense_bytes=sizes[layer.name] * layer.total, value_bytes=sizes[layer.name],
        )
        for layer, (step, lower, upper) in zip(scope, _feasible_counts(scope, pattern), strict=True)
    )  # fmt: skip
    bound = budget.on(terms, fixed_bytes=layout.header + layout.others, full_bytes=layout.plain)
    return _compared(Problem(model, scope, bound, pattern, score, calibration, seed, example), comparison)


def _compared(problem: Problem, comparison: Comparison | None) -> Problem:
    """The problem with its comparison, after a look at the model's outputs, where there are inputs."""
    problem = replace(problem, comparison=comparison or Comparison())
    if problem.calibration is not None:
        with suppress(Exception):  # who compares outputs raises it again
            problem.reading()
    return problem


def _without_channels(scope: Scope) -> Scope:
    """`scope` without the layers that stay whole where channels are removed."""
    whole = {layer.name: layer.kind.partition("_")[0] for layer in scope if layer.kind in INSIDE}
    reasons = {name: f"{kind} weights stay whole where channels are removed" for name, kind in whole.items()}
    return replace(scope.without(reasons), undecided=())


def _channel_budget(
    model: nn.Module, scope: Scope, budget: Budget, step: int, example: Any, rules: Rules, timing: Timing
) -> tuple[Scope, ChannelBudget]:
    """The scope with its groups, and the budget on them."""
    found, whole = find_groups(model, example)
    found, whole = _without_frozen(found, whole, scope)
    groups, skipped = _apply_rules(found, whole, rules)
    scope = replace(scope, groups=groups, skipped={**scope.skipped, **skipped})
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list({**skipped, **whole}.items())[:4])
        raise BudgetError(f"no channels can be removed from this model ({reasons or 'no layer writes any'}).")
    state, _ = plain_state(model)
    metadata = files.metadata_of(model, scope, budget)
    writers: dict[tuple[str, int], list[tuple[Group, int]]] = {}  # (tensor, dimension) -> (group, places per channel)
    for group in groups:
        for member in group.members:
            writers.setdefault((member.tensor, member.dim), []).append((group, len(member.places[0])))

    def dimension(name: str, dim: int, size: int) -> Dimension:
        groups = writers.get((name, dim), [])
        whole = size - sum(places * group.total for group, places in groups)
        return whole, tuple((group.name, places) for group, places in groups)

    layers = {layer.name: layer for layer in scope}
    extents = []
    for name, value in state.items():
        dims = tuple(dimension(name, dim, size) for dim, size in enumerate(value.shape))
        layer = layers.get(name)
        uses = Fraction(layer.macs or 0, layer.total) if layer else Fraction(0)
        extents.append(Extent(name, 1, dims, uses, layer is not None, value.element_size()))
    terms = channel_terms(((g.name, g.total, g.min_kept, g.max_kept) for g in groups), step)
    limit = str(budget.latency) if budget.latency is not None else None
    tables = timing(model, scope, groups, extents, terms, example, limit) if limit else None
    weights = [Term(layer.name, layer.total, 0, layer.total, macs=layer.macs) for layer in scope]
    full = {"full_bytes": files.layout(state, metadata).plain, "full_latency": tables.dense if tables else 0}
    header = files.slim_header(state, metadata, groups)
    return scope, ChannelBudget(budget.with_terms(weights, **full), terms, tuple(extents), header, tables)


def _without_frozen(
    groups: Sequence[Group], whole: Mapping[str, str], scope: Scope
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups of channels that no frozen weight holds, and the reasons with those of the others."""
    frozen = {name for name, reason in scope.skipped.items() if reason == FROZEN}
    holders = {group.name: {member.tensor for member in group.members} & frozen for group in groups}
    reasons = {name: f"{min(held)} is {FROZEN}" for name, held in holders.items() if held}
    return tuple(group for group in groups if group.name not in reasons), {**whole, **reasons}


def _apply_rules(
    groups: Sequence[Group], skipped: Mapping[str, str], rules: Rules
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups in scope by the rules, with bounds; and the reason why each other group stays whole.

    Raises:
        UsageError: a pattern that matches no group.
    """
    if str(rules.floor).endswith("/row"):
        raise PatternError(
            f"floor={rules.floor!r}: channels have no rows; a number of channels or a share is accepted."
        )
    in_scope: list[Group] = []
    skipped, used = dict(skipped), set[str]()
    for group in groups:
        written = [group.name, *group.layers, *(m.tensor for m in group.members if not m.reads)]
        touched = [group.name, *(name for m in group.members for name in (m.tensor, m.tensor.rpartition(".")[0]))]
        used.update(pattern for pattern in rules.patterns if matches(pattern, written))
        used.update(pattern for pattern in rules.exclude if matches(pattern, touched))
        if rules.include and not any(matches(pattern, written) for pattern in rules.include):
            skipped[group.name] = "no include rule matches it"
        elif excluding := [pattern for pattern in rules.exclude if matches(pattern, touched)]:
            skipped[group.name] = f"excluded by rule {excluding[0]!r}"
        else:
            least, most = rules.bounds(group.total, written)
            in_scope.append(replace(group, min_kept=max(least, 1), max_kept=most))
    if unused := [pattern for pattern in rules.patterns if pattern not in used]:
        names = ", ".join(group.name for group in groups[:6])
        raise UsageError(f"rule {unused[0]!r} matches no group of channels; there are {names or 'none'}.")
    return tuple(in_scope), skipped


def _feasible_counts(scope: Scope, pattern: Pattern) -> list[tuple[int, int, int]]:
    """(step, fewest, most) weights that the pattern can keep, of every layer.

    Raises:
        PatternError: layers that the pattern does not fit.
    """
    counts, refused = [], []
    for layer in scope:
        try:
            counts.append(pattern.feasible(layer))
        except PatternError as error:
            refused.append((layer.name, error))
    if len(refused) > 1:
        names = " ".join(f"--exclude {name}" for name, _ in refused)
        raise PatternError(f"{refused[0][1]} So it is with {len(refused)} layers: {names}.") from refused[0][1]
    if refused:
        raise refused[0][1]
    return counts


def tensor_names(model: nn.Module) -> set[str]:
    """Names of every parameter and buffer."""
    return {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}


def check_no_new_tensors(model: nn.Module, before: set[str]) -> None:
    """Raises:
    UsageError: the model has new parameters or buffers.
    """
    if made := sorted(tensor_names(model) - before):
        raise UsageError(
            f"the model made {', '.join(made[:3])} when it first ran: run one batch through it, and then prune it."
        )


def _calibration(request: Request) -> Calibration | None:
    """Calibration data, on the model's device: samples, or batches where only these fit the model."""
    model, data, channels_last = request.model, request.calibration, request.compute.channels_last
    if isinstance(data, Calibration):
        return replace(data, channels_last=data.channels_last or channels_last)
    if data is None:
        return None
    reference = next((p for p in model.parameters() if p.dtype in FLOATS), torch.zeros(()))
    before = tensor_names(model)
    samples = SAMPLES if request.samples is None else request.samples
    if isinstance(data, Iterable) and not hasattr(data, "__len__") and not hasattr(data, "dataset"):
        data = list(itertools.islice(data, samples))  # an iterator is read once only, and may have no end

    def read(*, batched: bool) -> Calibration:
        calibration = Calibration.of(
            data, samples=samples, batch_size=BATCH if request.batch_size is None else request.batch_size,
            seed=request.seed, workers=request.workers, batched=batched, device=reference.device,
            channels_last=channels_last,
        )  # fmt: skip
        try:
            with refused_writes(model):
                calibration = replace(calibration, dtype=dtype_for(model, calibration.example()))
                example = calibration.example()
                attempt(model, example, {})
        except UsageError as error:
            inputs = inputs_of(calibration.source[calibration.indices[0]])
            raise with_advice(error, model, inputs) from error.__cause__
        check_no_new_tensors(model, before)
        return _of_text(calibration, request, example)

    try:
        return read(batched=False)
    except UsageError as error:
        if not isinstance(data, Sequence) or isinstance(data, str):
            raise
        try:
            return read(batched=True)
        except (AllotError, TypeError, IndexError, AttributeError):
            raise error from None  # the error of the data as samples


def _of_text(calibration: Calibration, request: Request, example: Any) -> Calibration:
    """The calibration with fewer samples, and fewer at a time, where they are texts and the user gave no numbers."""
    ids = example.get("input_ids") if isinstance(example, Mapping) else example
    takes_tokens = getattr(request.model, "main_input_name", None) == "input_ids"
    if not takes_tokens or not isinstance(ids, Tensor) or ids.dim() != 2:
        return calibration
    indices = calibration.indices[: TEXTS if request.samples is None else None]
    batch_size = texts_at_a_time(ids.shape[1], BATCH) if request.batch_size is None else request.batch_size
    return replace(calibration, indices=indices, batch_size=batch_size)


def _timing(request: Request, log: Log) -> Callable[..., Latency]:
    """Makes the tables of a budget of time: read from the directory of a run that began before, else measured."""

    def report(done: int, of: int) -> None:
        if request.should_stop and request.should_stop():
            raise Stopped(f"stopped while timing layers, {done} of {of}: the next start times them anew", saved=False)
        if request.on_step:
            request.on_step(Progress("measure", done, of, {}))

    def timing(*problem: Any) -> Latency:
        path = request.directory / TABLES if request.directory else None
        if path and path.exists() and (path.parent / "run.json").exists():
            tables, extents = load_tables(path), problem[3]
            if tables.runtime == str(request.runtime):  # else the run did not begin, or the store reports what differs
                if {layer.layer for layer in tables.layers} <= {extent.name for extent in extents}:
                    return tables
                raise UsageError(f"{path.parent} belongs to another model: choose another directory or delete it.")
        started = time.monotonic()
        tables = latency_of(*problem, runtime=request.runtime, seed=request.seed, on_step=report)
        log.seconds["measure"] = time.monotonic() - started
        return tables

    return lambda *problem: on_first_process(lambda: timing(*problem))


def _check_shared(model: nn.Module, inputs: Calibration | None) -> None:
    """Raises:
    UsageError: the processes of torchrun cannot share batches of this model, or of this size.
    """
    check_divisible(model)
    if inputs is None:
        return
    inputs.share(range(len(inputs) // inputs.batches))  # the smallest batch is large enough
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
            stack.callback(handle.remove)
        attempt(model, inputs.batch(0)[0], {})
    if any(other != calls for other in all_gather_object(calls)):
        raise UsageError(
            "layers of this model run or not depending on the samples (as in a mixture of experts): processes "
            "cannot share its batches; leave torchrun out."
        )
