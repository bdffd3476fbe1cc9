"""What goes into a part of a model and comes out of it, under the names of the part and of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from allot.budget.allocation import Allocation
from allot.network.layers import Layer
from allot.run.scores import Evidence, WeightScore


def part_allocation(allocation: Allocation, names: Mapping[str, str]) -> Allocation:
    """The part of an allocation of layers that a part of the model has, as name in the part -> name; else all of it."""
    kept, total = allocation.kept, allocation.total
    if any(name not in kept for name in names.values()):
        return allocation  # of groups of channels
    return Allocation.of(*({inner: counts[name] for inner, name in names.items()} for counts in (kept, total)))


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Nested dicts and lists with the keys and texts that are in `names` replaced."""
    if isinstance(value, Mapping):
        return {names.get(key, key): renamed(part, names) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def merged(earlier: Any, later: Any) -> Any:
    """Nested dicts as one dict, lists one after the other; of other values the later one."""
    if isinstance(earlier, dict) and isinstance(later, dict):
        shared = {key: merged(earlier[key], later[key]) for key in earlier if key in later}
        return {**earlier, **later, **shared}
    return [*earlier, *later] if isinstance(earlier, list) and isinstance(later, list) else later


def renamed_text(text: str, names: Mapping[str, str]) -> str:
    """A text with the names in it replaced, where they stand as whole words.

    >>> renamed_text("steps.0.weight: 3 of steps.0.weights", {"steps.0.weight": "layers.7.weight"})
    'layers.7.weight: 3 of steps.0.weights'
    """
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w.])({longest_first})(?![\w]|\.\w)", lambda m: names[m[1]], text) if names else text


def outer_score(score: WeightScore, names: Mapping[str, str]) -> WeightScore:
    """The score for layers of a part; the score itself sees the layers' names in the model."""

    def scored(layer: Layer, weight: Tensor, evidence: Evidence) -> Tensor:
        outer = replace(
            layer, name=names[layer.name], aliases=tuple(names.get(alias, alias) for alias in layer.aliases)
        )
        return score(outer, weight, _OuterEvidence(evidence, {outer.name: layer}))

    return scored


@dataclass(frozen=True)
class _OuterEvidence:
    """Evidence about layers by their names in the model."""

    evidence: Evidence
    inner_layers: Mapping[str, Layer]

    @property
    def seed(self) -> int:
        return self.evidence.seed

    def input_norm(self, layer: Layer) -> Tensor:
        return self.evidence.input_norm(self.inner_layers[layer.name])
