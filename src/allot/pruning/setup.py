"""What is asked, tied to a model: the scope measured on one example, the budget on what is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from allot.errors import BudgetError, PatternError, UsageError
from allot.export.files import formats as files
from allot.export.timing.latency import Runtime, latency_of
from allot.network.call import attempt
from allot.network.channels import Group
from allot.network.coupling.find import coupled
from allot.network.layers import Rules, Scope, matches, plain_state
from allot.network.macs import measured
from allot.run.calibration import Calibration
from allot.run.patterns import Channels, Pattern
from allot.run.problem import Problem
from allot.run.scores import CHANNEL_SCORES, SCORES, ChannelScore, WeightScore

# tables of a model: (model, scope, groups, extents, terms, example, limit) -> times
Timing = Callable[[nn.Module, Scope, Sequence[Group], Sequence[Extent], Sequence[Term], Any, str], Latency]


def pose(
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
    layout = files.layout(state, files.about(model, scope, budget))
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
    found, whole = coupled(model, example)
    groups, skipped = _ruled(found, whole, rules)
    scope = replace(scope, groups=groups, skipped={**scope.skipped, **skipped})
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list({**skipped, **whole}.items())[:4])
        raise BudgetError(f"no channels can be removed from this model ({reasons or 'no layer writes any'}).")
    state, _ = plain_state(model)
    said = files.about(model, scope, budget)
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


def check_plain(model: nn.Module) -> None:
    """Raises:
    UsageError: the model is compiled, or wrapped in something.
    """
    around = torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel
    if isinstance(model, around) or hasattr(model, "_orig_mod"):
        raise UsageError(
            f"a compiled or wrapped model ({type(model).__name__}): pass the module that it was made from."
        )


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
