"""Recipes: which parts of a chain go together, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A choice of parts by name.

    `score_alone` is the score where no repair chooses masks, if another one: statistics for masks that a repair
    replaces would be wasted. `options` are hyperparameters by method that differ from the defaults. `dense_head` leaves
    the output head of a language model dense, and an embedding tied to it, where the user includes no layers by name.
    """

    allocate: str
    score: str = "magnitude"
    pattern: str = "unstructured"
    repair: tuple[str, ...] = ()
    dense_head: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    score_alone: str | None = None


RECIPES: dict[str, Recipe] = {
    "fcpts": Recipe("fcpts", repair=("bn",)),
    "fcpts-paper": Recipe("fcpts-paper", repair=("bn",)),
    "unipts": Recipe("unipts-search", repair=("unipts", "bn")),
    "unipts-paper": Recipe("unipts-paper", repair=("unipts", "bn")),
    "dsa": Recipe("dsa", score="scale", pattern="channels", repair=("lstsq", "distill", "bn")),
    "pot": Recipe("global-normalised", repair=("weight-moments", "layerwise", "bn", "bias")),
    "uniform": Recipe("uniform", repair=("bn", "variance")),
    "erk": Recipe("erk", repair=("bn", "variance")),
    "best": Recipe("erk", repair=("admm", "admm-views", "polish", "anew")),
    "admm": Recipe("layer-errors", repair=("admm",)),
    "llm": Recipe(
        "uniform",
        pattern="rows",
        repair=("admm",),
        dense_head=True,
        options={"admm": {"iterations": 10, "refinement": 4}},
        score_alone="wanda",
    ),
    "lamp": Recipe("lamp", repair=("bn", "variance")),
    "global": Recipe("global", repair=("bn", "variance")),
    "global-normalised": Recipe("global-normalised", repair=("bn", "variance")),
}
