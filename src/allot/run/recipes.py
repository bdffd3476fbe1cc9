"""Recipes: which parts of a chain go together, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A choice of parts by name.

    `dense_head` leaves the output head of a language model dense, and an embedding tied to it, where the user includes
    no layers by name.
    """

    allocate: str
    score: str = "magnitude"
    pattern: str = "unstructured"
    repair: tuple[str, ...] = ()
    dense_head: bool = False


RECIPES: dict[str, Recipe] = {
    "fcpts": Recipe("fcpts", repair=("bn",)),
    "fcpts-paper": Recipe("fcpts-paper", repair=("bn",)),
    "unipts": Recipe("unipts-search", repair=("unipts", "bn")),
    "unipts-paper": Recipe("unipts-paper", repair=("unipts", "bn")),
    "dsa": Recipe("dsa", score="scale", pattern="channels", repair=("lstsq", "distill", "bn")),
    "pot": Recipe("global-normalised", repair=("weight-moments", "layerwise", "bn", "bias")),
    "uniform": Recipe("uniform", repair=("bn", "variance")),
    "erk": Recipe("erk", repair=("bn", "variance")),
    "llm": Recipe("uniform", score="wanda", dense_head=True),
    "lamp": Recipe("lamp", repair=("bn", "variance")),
    "global": Recipe("global", repair=("bn", "variance")),
    "global-normalised": Recipe("global-normalised", repair=("bn", "variance")),
}
