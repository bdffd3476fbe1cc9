"""What is asked, tied to a model: the scope measured on one example, the budget on what is in it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import nn

from allot.budget.budget import Budget
from allot.budget.channels import ChannelBudget, Dimension, Extent, channel_terms
from allot.budget.costs import Term
from allot.budget.latency import Latency
from allot.errors import AllotError, BudgetError, PatternError, Stopped, UsageError
from allot.export.files import formats as files
from allot.export.files.formats import TABLES
from allot.export.files.latency_tables import load_tables
from allot.export.timing.latency import Runtime, latency_of
from allot.methods.training.selection import Selection
from allot.network.call import attempt
from allot.network.compute import check_divisible
from allot.network.coupling.find import find_groups
from allot.network.layers import Group, Rules, Scope, matches, plain_state
from allot.network.macs import measured
from allot.processes import all_gather_object, on_first_process, world_size
from allot.pruning.asked import Asked, Control, check_plain
from allot.run.calibration import Calibration
from allot.run.driver import Progress, repeatable
from allot.run.patterns import Channels, Pattern
from allot.run.problem import Candidate, Problem
from allot.run.scores import CHANNEL_SCORES, SCORES, ChannelScore, WeightScore
from allot.run.store import Log

# tables of a model: (model, scope, groups, extents, terms, example, limit) -> times
Timing = Callable[[nn.Module, Scope, Sequence[Group], Sequence[Extent], Sequence[Term], Any, str], Latency]


def set_up(asked: Asked, log: Log, control: Control) -> Problem:
    """The problem: inputs read, scope measured on one of them, budget tied to it.

    Args:
        log: the seconds are added that timing layers took, for a budget of latency.
    Raises:
        UsageError, BudgetError, PatternError: what is wrong with the model, the inputs or the budget.
        Stopped: while layers were timed.
    """
    chain = asked.chain
    with repeatable(asked.model, asked.seed, "pose"):
        inputs = _calibration(asked)
        problem = make_problem(
            asked.model,
            asked.budget,
            chain.pattern,
            calibration=inputs,
            example=None if inputs else asked.example,
            rules=asked.rules,
            score=chain.score,
            seed=asked.seed,
            latency=_timing(asked, log, control),
        )
    if any(part.needs_data for part in (chain.allocate, *chain.repair)):
        problem.inputs()
    if world_size() > 1:
        _check_shared(asked.model, inputs)
    if inputs is None:  # a score that needs inputs says so before anything is written
        whole = Candidate.dense(problem)
        Selection().step(problem, whole, Selection().init(problem, whole))
    return problem


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
) -> Problem:
    """The problem: scope measured on one example, budget tied to it.

    Args:
        example: a batch of inputs of one sample, to count MACs and follow channels with; from the calibration data
            where None.
        score: of weights, or of channels; by magnitude where None.
        latency: where the tables of a budget of time come from; measured in the runtime that is installed where None.
    Raises:
        UsageError: weights that are not finite, a compiled or wrapped model, or inputs that the model does not take.
        BudgetError, PatternError: nothing meets the budget in this pattern.
    """
    check_plain(model)
    score = score or (CHANNEL_SCORES if isinstance(pattern, Channels) else SCORES)["magnitude"]
    scope = Scope.of(model, None if isinstance(pattern, Channels) else rules)  # of channels, rules say which groups
    before = names_of(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach()).all()):
            raise UsageError(f"{name} holds nan or infinite values: the model cannot be pruned as it is.")
    for name, buffer in model.named_buffers():
        # infinite is what attention masks hold
        if buffer.is_floating_point() and not buffer.is_meta and bool(torch.isnan(buffer).any()):
            raise UsageError(f"{name} holds nan: the model cannot be pruned as it is.")
    example = calibration.example() if example is None and calibration else example
    if example is not None:
        scope = measured(scope, model, lambda: attempt(model, example, {}))
    check_made_nothing(model, before)
    if isinstance(pattern, Channels):
        if example is None:
            raise UsageError("channels are found by running the model: give --data or --input (example= in Python).")
        timing = latency or partial(latency_of, runtime=Runtime.parse(None), seed=seed)
        scope, channels = _of_channels(model, scope, budget, pattern.step, example, rules or Rules(), timing)
        return Problem(model, scope, channels, pattern, score, calibration, seed, example)
    state, _ = plain_state(model)
    layout = files.layout(state, files.metadata_of(model, scope, budget))
    terms = []
    for layer, (step, lower, upper) in zip(scope, _feasible(scope, pattern), strict=True):
        size = state[layer.name].element_size()
        terms.append(
            Term(
                layer.name, layer.total, lower, upper, step, layer.macs,
                dense_bytes=size * layer.total, value_bytes=size,
            )
        )  # fmt: skip
    fixed = layout.header + layout.others
    bound = budget.on(tuple(terms), fixed_bytes=fixed, full_bytes=layout.plain)
    return Problem(model, scope, bound, pattern, score, calibration, seed, example)


def _of_channels(
    model: nn.Module, scope: Scope, budget: Budget, step: int, example: Any, rules: Rules, timing: Timing
) -> tuple[Scope, ChannelBudget]:
    """The scope with its groups, and the budget on them."""
    found, whole = find_groups(model, example)
    groups, skipped = _ruled(found, whole, rules)
    scope = replace(scope, groups=groups, skipped={**scope.skipped, **skipped})
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list({**skipped, **whole}.items())[:4])
        raise BudgetError(f"no channels can be removed from this model ({reasons or 'no layer writes any'}).")
    state, _ = plain_state(model)
    said = files.metadata_of(model, scope, budget)
    held: dict[tuple[str, int], list[tuple[Group, int]]] = {}  # which groups, with how many places a channel
    for group in groups:
        for member in group.members:
            held.setdefault((member.tensor, member.dim), []).append((group, len(member.places[0])))

    def dimension(name: str, dim: int, size: int) -> Dimension:
        own = held.get((name, dim), [])
        return size - sum(places * group.total for group, places in own), tuple((g.name, places) for g, places in own)

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
    full = {"full_bytes": files.layout(state, said).plain, "full_latency": tables.dense if tables else 0}
    header = files.slim_header(state, said, groups)
    return scope, ChannelBudget(budget.with_terms(weights, **full), terms, tuple(extents), header, tables)


def _ruled(
    groups: Sequence[Group], skipped: Mapping[str, str], rules: Rules
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups that rules leave in, with bounds; and why the others are whole.

    Raises:
        UsageError: a pattern that means no group.
    """
    if str(rules.floor).endswith("/row"):
        raise PatternError(
            f"floor={rules.floor!r}: channels have no rows; a number of channels or a share is accepted."
        )
    kept: list[Group] = []
    left, used = dict(skipped), set[str]()
    for group in groups:
        written = [group.name, *group.layers, *(m.tensor for m in group.members if not m.reads)]
        touched = [group.name, *(name for m in group.members for name in (m.tensor, m.tensor.rpartition(".")[0]))]
        used.update(pattern for pattern in rules.patterns if matches(pattern, written))
        used.update(pattern for pattern in rules.exclude if matches(pattern, touched))
        if rules.include and not any(matches(pattern, written) for pattern in rules.include):
            left[group.name] = "no include rule matches it"
        elif excluding := [pattern for pattern in rules.exclude if matches(pattern, touched)]:
            left[group.name] = f"excluded by rule {excluding[0]!r}"
        else:
            least, most = rules.bounds(group.total, written)
            kept.append(replace(group, min_kept=max(least, 1), max_kept=most))
    if unused := [pattern for pattern in rules.patterns if pattern not in used]:
        names = ", ".join(group.name for group in groups[:6])
        raise UsageError(f"rule {unused[0]!r} matches no group of channels; there are {names or 'none'}.")
    return tuple(kept), left


def _feasible(scope: Scope, pattern: Pattern) -> list[tuple[int, int, int]]:
    found, refused = [], []
    for layer in scope:
        try:
            found.append(pattern.feasible(layer))
        except PatternError as error:
            refused.append((layer.name, error))
    if len(refused) > 1:
        names = " ".join(f"--exclude {name}" for name, _ in refused)
        raise PatternError(f"{refused[0][1]} So it is with {len(refused)} layers: {names}.") from refused[0][1]
    if refused:
        raise refused[0][1]
    return found


def names_of(model: nn.Module) -> set[str]:
    """Names of every parameter and buffer."""
    return {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}


def check_made_nothing(model: nn.Module, before: set[str]) -> None:
    """Raises:
    UsageError: the model has parameters or buffers that it had not before.
    """
    if made := sorted(names_of(model) - before):
        raise UsageError(
            f"the model made {', '.join(made[:3])} when it first ran: prune it again now that it has them."
        )


def _calibration(asked: Asked) -> Calibration | None:
    """Calibration on the model's device; an iterable whose items are batches already is recognised by trying."""
    model, data, channels_last = asked.model, asked.calibration, asked.compute.channels_last
    if isinstance(data, Calibration):
        return replace(data, channels_last=data.channels_last or channels_last)
    if data is None:
        return None
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    before = names_of(model)
    if isinstance(data, Iterable) and not hasattr(data, "__len__") and not hasattr(data, "dataset"):
        data = list(itertools.islice(data, asked.samples))  # an iterator: it can only be read once, and may have no end

    def read(*, batched: bool) -> Calibration:
        found = Calibration.of(
            data,
            samples=asked.samples,
            batch_size=asked.batch_size,
            seed=asked.seed,
            workers=asked.workers,
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


def _timing(asked: Asked, log: Log, control: Control) -> Callable[..., Latency]:
    """What gives the tables of a budget of time: those of the run, where it began before; else they are measured."""

    def tell(done: int, of: int) -> None:
        if control.should_stop and control.should_stop():
            raise Stopped(f"stopped while timing layers, {done} of {of}: the next start times them anew", saved=False)
        if control.on_step:
            control.on_step(Progress("measure", done, of, {}))

    def measure(*problem: Any) -> Latency:
        started = time.monotonic()
        tables = latency_of(*problem, runtime=asked.runtime, seed=asked.seed, on_step=tell)
        log.seconds["measure"] = time.monotonic() - started
        return tables

    def timing(*problem: Any) -> Latency:
        path = asked.directory / TABLES if asked.directory else None
        if path and path.exists() and (path.parent / "run.json").exists():
            tables, extents = load_tables(path), problem[3]
            if tables.runtime != str(asked.runtime):
                return measure(*problem)  # of a run that did not begin; of any other the store says what differs
            if not {layer.layer for layer in tables.layers} <= {extent.name for extent in extents}:
                raise UsageError(f"{asked.directory} belongs to another model: choose another directory or delete it.")
            return tables
        return measure(*problem)

    return lambda *problem: on_first_process(lambda: timing(*problem))


def _check_shared(model: nn.Module, inputs: Calibration | None) -> None:
    """Raises:
    UsageError: world_size cannot share batches of this model, or of this size.
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
            "layers of this model run or not depending on the samples (as in a mixture of experts): world_size cannot "
            "share its batches; leave torchrun out."
        )
