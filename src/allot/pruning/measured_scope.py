"""The scope of a problem as inputs show it: MACs of each layer, and the layers that run and whose zeros arrive."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import nn

from allot.network.arrival import IDLE, conditional, without_lost_zeros
from allot.network.call import attempt
from allot.network.layers import Scope
from allot.network.macs import Uses, measured
from allot.network.preserved import refused_writes
from allot.network.products import observed
from allot.report.data import weights_of
from allot.run.calibration import Calibration

log = logging.getLogger("allot")


def measured_scope(
    scope: Scope, model: nn.Module, example: Any, calibration: Calibration | None, *, weights: bool
) -> Scope:
    """The scope with MACs, without layers that no input reaches or whose zeros do not arrive.

    A layer that the example does not reach, as an expert, may be reached by other calibration inputs.

    Args:
        weights: whether single weights are pruned, whose zeros have to arrive: channels are cut from the layer itself.
    """
    uses = Uses()
    with refused_writes(model):
        scope = measured(scope, model, lambda: attempt(model, example, {}), uses)
    if weights:
        scope = without_lost_zeros(scope, model, uses, lambda tensors: attempt(model, example, tensors))
    return scope.without(dict.fromkeys(_never_run(scope, model, uses.idle, calibration), IDLE))


def warn_small_scope(model: nn.Module, scope: Scope) -> None:
    """Log a warning where less than half of the model's weights are in scope: a budget holds for these alone."""
    total, weights = sum(layer.total for layer in scope), weights_of(model)
    if 2 * total < weights:
        reasons = Counter(scope.skipped.values()).most_common(3)
        log.warning(
            "in scope: %.1f %% of the model's weights (%s of %s): the budget holds for these alone; %s",
            100 * total / weights, f"{total:,}", f"{weights:,}",
            "; ".join(f"{count} x {reason}" for reason, count in reasons) or "see the rules",
        )  # fmt: skip


def _never_run(scope: Scope, model: nn.Module, idle: set[str], calibration: Calibration | None) -> set[str]:
    """Those of the idle layers that no calibration input reaches; of a layer's experts, without such inputs, none."""
    if calibration is None:
        return idle - conditional(model, idle)
    reached: set[str] = set()
    layers = [layer for layer in scope if layer.name in idle]
    with observed(model, layers, lambda product, cost: reached.add(cost[0])):
        for k in range(calibration.batches):
            if idle <= reached:
                break
            attempt(model, calibration.pick(calibration.positions(k)), {})
    return idle - reached
