"""What `prune` was asked, read and checked as far as no forward pass is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.export.timing.latency import Runtime
from allot.network.compute import Compute
from allot.network.layers import Rules, Scope
from allot.run.driver import Progress
from allot.run.evaluate import Score, evaluate
from allot.run.patterns import Channels
from allot.run.problem import Chain
from allot.run.store import read_run


@dataclass(frozen=True)
class Control:
    """What hears of every step, and what may stop a run; both may be left out."""

    on_step: Callable[[Progress], None] | None = None
    should_stop: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Asked:
    """The arguments of `prune`, which describes them; `chain` is what its names of parts were read as.

    Raises:
        UsageError: a compiled or wrapped model, a rule that matches no layer, or a choice of `compute` that this model
            or device does not allow.
    """

    model: nn.Module
    budget: Budget
    chain: Chain
    rules: Rules | None
    seed: int
    calibration: Any
    samples: int
    batch_size: int
    workers: int
    example: Any
    test: Any
    dense_score: Score | None
    runtime: Runtime
    compute: Compute
    stream: str | torch.device | None
    max_minutes: float | None
    max_memory: int | str | None
    label: str
    directory: Path | None
    recipe: Mapping[str, Any]
    options: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        check_plain(self.model)
        # what is wrong with the model comes before a forward pass: one would fill lazy layers
        Scope.of(self.model, None if isinstance(self.chain.pattern, Channels) else self.rules)
        self.compute.check(self.model)

    @cached_property
    def score_of(self) -> Callable[..., Score] | None:
        """`evaluate` on the test data, for a model and tensors in place of its own; None: there is no test data."""
        test = self.test
        if test is None:
            return None
        if isinstance(test, Iterable) and not hasattr(test, "__len__") and not hasattr(test, "dataset"):
            test = list(test)  # it is read twice

        def score(model: nn.Module, **tensors: Any) -> Score:
            return evaluate(model, test, workers=self.workers, **tensors)

        return score

    def earlier(self) -> dict[str, Any]:
        """run.json of the run directory where a run began there before; else empty."""
        began = self.directory is not None and (self.directory / "run.json").exists()
        return read_run(self.directory) if began and self.directory else {}


def check_plain(model: nn.Module) -> None:
    """Raises:
    UsageError: the model is compiled, or wrapped in something.
    """
    around = torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel
    if isinstance(model, around) or hasattr(model, "_orig_mod"):
        raise UsageError(
            f"a compiled or wrapped model ({type(model).__name__}): pass the module that it was made from."
        )
