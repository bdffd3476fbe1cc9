"""What goes into a part of a model and comes out of it, under the names of the part and of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allot.budget.allocation import Allocation


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
