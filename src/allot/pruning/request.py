"""The arguments of `prune` as one value, checked as far as no forward pass is needed, and prepared for the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allot.budget.budget import Budget
from allot.errors import UsageError, check_number, unknown
from allot.export.timing.latency import Runtime
from allot.network.compute import Compute
from allot.network.layers import Rules, Scope
from allot.processes import on_first_process
from allot.pruning.checks import check_plain
from allot.run.driver import Progress
from allot.run.evaluate import Score, evaluate
from allot.run.max_drop import MaxDrop
from allot.run.metric import Metric
from allot.run.min_fidelity import MinFidelity
from allot.run.outputs import Comparison
from allot.run.patterns import Channels
from allot.run.places import check_run_place
from allot.run.problem import BATCH_NORMS, Chain, Problem
from allot.run.recipes import Recipe
from allot.run.store import read_run


@dataclass(frozen=True)
class Request:
    """The arguments of `prune`, which describes them; `chain` holds the parts that it names.

    Attributes:
        default_repair: whether the repairs are those of the recipe.
    Raises:
        UsageError: a compiled or wrapped model, a rule that matches no layer, a choice of `compute` that this model
            or device does not allow, a metric or guarantee without data to score on, or a directory of other files.
    """

    model: nn.Module
    budget: Budget
    chain: Chain
    rules: Rules | None
    seed: int
    calibration: Any
    samples: int | None
    batch_size: int | None
    workers: int
    example: Any
    test: Any
    metric: Callable[..., Any] | str | None
    max_drop: MaxDrop | None
    min_fidelity: MinFidelity | None
    dense_score: Score | None
    runtime: Runtime
    compute: Compute
    comparison: Comparison
    batch_norm: str
    views: int | None
    default_repair: bool
    stream: str | torch.device | None
    max_minutes: float | None
    max_steps: int | None
    max_memory: int | str | None
    label: str
    directory: Path | None
    recipe: Mapping[str, Any]
    options: Mapping[str, Mapping[str, Any]]
    on_step: Callable[[Progress], None] | None
    should_stop: Callable[[], bool] | None

    def __post_init__(self) -> None:
        if self.batch_norm not in (*BATCH_NORMS, "auto"):
            raise unknown("batch_norm", str(self.batch_norm), (*BATCH_NORMS, "auto"))
        if self.views is not None:
            check_number("views", self.views, 0, whole=True)
        if self.directory is not None:
            on_first_process(partial(check_run_place, self.directory))
        check_plain(self.model)
        # errors of the model come before a forward pass, which would fill lazy layers
        Scope.of(self.model, None if isinstance(self.chain.pattern, Channels) else self.rules)
        self.compute.check(self.model)
        for name, value in (("metric", self.metric), ("max-drop", self.max_drop)):
            if value is not None and self.test is None:
                raise UsageError(f"{name}: there is nothing to score: give --test DATA (test= in Python).")
        if self.min_fidelity is not None and self.calibration is None:
            raise UsageError("min-fidelity: there is nothing to compare on: give --data DATA (calibration in Python).")
        if self.metric is not None:
            Metric.of(self.metric)  # its errors come before the work

    @cached_property
    def score_of(self) -> Callable[..., Score] | None:
        """`evaluate` on the test data: a function of a model and tensors to replace; None without test data."""
        test = self.test
        if test is None:
            return None
        if isinstance(test, Iterable) and not hasattr(test, "__len__") and not hasattr(test, "dataset"):
            test = list(test)  # for the dense and for the sparse net

        def score(model: nn.Module, **tensors: Any) -> Score:
            return evaluate(model, test, metric=self.metric, workers=self.workers, **tensors)

        return score

    @property
    def left_dense(self) -> dict[str, str]:
        """Parameters that the recipe leaves dense, with the reason."""
        return left_dense(self.model, self.chain.names, self.rules)

    @property
    def known_untrained(self) -> str:
        """A sign for `allot.run.untrained`: the recipe loads no trained weights; empty where it does not say so."""
        return "its weights are random" if self.recipe.get("weights") == "random" else ""

    def earlier(self) -> dict[str, Any]:
        """run.json of the run that began in the directory before; empty without one."""
        if self.directory is None or not (self.directory / "run.json").exists():
            return {}
        return read_run(self.directory)


@dataclass(frozen=True)
class Prepared:
    """A request with its problem, its training cut to the limit of time and its memory to the limit of memory.

    Attributes:
        chain: the parts that run: training cut, repairs streamed.
        requested_chain: the parts that were requested, training cut.
        cut: see `choose_cut`; None without a limit of time.
        memory: see `choose_compute`; None without a limit of memory.
        done: whether the run directory holds a finished run.
    """

    request: Request
    problem: Problem
    chain: Chain
    requested_chain: Chain
    cut: Mapping[str, Any] | None
    memory: Mapping[str, Any] | None
    done: bool


def default_method(model: nn.Module, calibration: Any, allocate: Any, pattern: Any, *parts: Any) -> str:
    """The recipe of a run that names none: `best`, of a language model `llm`, for channels `dsa`.

    Without data, and where an allocator, another pattern, or further parts of a recipe (a score, repairs, a device to
    stream to) are given, `erk`: its parts are the plainest, to be replaced.

    >>> model, data = nn.Linear(2, 2), torch.zeros(4, 2)
    >>> [default_method(model, *rest) for rest in ((data, None, None), (None, None, None), (data, None, "channels:8"))]
    ['best', 'erk', 'dsa']
    """
    if allocate is None and str(pattern).partition(":")[0] == "channels":
        return "dsa"
    parts = (allocate, pattern, *parts)
    if calibration is None or any(part is not None for part in parts):
        return "erk"
    return "llm" if _output_head(model) is not None else "best"


def _output_head(model: nn.Module) -> nn.Parameter | None:
    """The weight of a language model's output head, as models of transformers name it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def left_dense(model: nn.Module, recipe: Recipe, rules: Rules | None) -> dict[str, str]:
    """Parameters that a recipe leaves dense, with the reason; none where `rules` include layers by name."""
    if not recipe.dense_head or (rules and rules.include):
        return {}
    if (weight := _output_head(model)) is None:
        return {}
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    tied = ", which is the embedding as well" if weight is getattr(embeddings, "weight", None) else ""
    reason = f"output head of a language model{tied}: the recipe leaves it dense unless --include names it"
    return {name: reason for name, parameter in model.named_parameters() if parameter is weight}
