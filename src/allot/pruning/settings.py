"""The types of the arguments that a search and a sweep pass on to `prune`, so that a type checker sees a misspelt name.

They stand in the signature of `prune` as well, which no type can be made from; a test holds both equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch

from allot.errors import unknown
from allot.network.compute import Compute
from allot.network.layers import Rules
from allot.run.driver import Progress
from allot.run.labelled import LabelledData
from allot.run.outputs import Outputs
from allot.run.patterns import Pattern
from allot.run.problem import Method
from allot.run.scores import ChannelScore, WeightScore


class Settings(TypedDict, total=False):
    """What every run has in common."""

    allocate: str | Method | Mapping[str, float] | None
    score: str | WeightScore | ChannelScore | None
    pattern: str | Pattern | None
    repair: str | Sequence[str | Method] | None
    options: Mapping[str, Mapping[str, Any]] | None
    rules: Rules | None
    samples: int | None
    batch_size: int | None
    workers: int
    example: Any
    runtime: str | None
    metric: Callable[..., Any] | str | None
    min_fidelity: float | str | None
    label: str | None
    max_minutes: float | None
    max_steps: int | None
    stream: str | torch.device | None
    compute: Compute | Mapping[str, Any] | None
    max_memory: int | str | None
    outputs: str | Outputs | None
    loss: Literal["kl", "mse"] | None
    batch_norm: Literal["auto", "batch", "frozen"]
    views: int | None
    recipe: Mapping[str, Any] | None
    on_step: Callable[[Progress], None] | None
    progress: bool | None
    should_stop: Callable[[], bool] | None


def check_settings(settings: Mapping[str, Any], known: type) -> None:
    """Look at the names, before the first run.

    Raises:
        UsageError: a setting that is not `known`, with the nearest one.
    """
    for name in settings:
        if name not in known.__annotations__:
            raise unknown("setting", name, sorted(known.__annotations__))


class SearchSettings(Settings, total=False):
    """A search sets the budget, the scores and the place of each run."""

    method: str | None
    seed: int


class SweepSettings(Settings, total=False):
    """A sweep sets the method, the budget, the seed and the place of each run."""

    test: LabelledData | None
    max_drop: float | str | None
