"""A chain put together by name: recipes, and parts that replace theirs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from allot.budget.allocation import Allocation
from allot.errors import UsageError, unknown
from allot.methods import METHODS, RECIPES
from allot.methods.layerwise.streamed import WAYS, Streamed, usable
from allot.methods.rules import Given
from allot.methods.training.selection import Selection
from allot.run import patterns
from allot.run.patterns import Pattern
from allot.run.problem import Candidate, Chain, Method, Problem, Rule
from allot.run.recipes import Recipe
from allot.run.scores import CHANNEL_SCORES, SCORES, ChannelScore, WeightScore


def assemble(
    method: str,
    *,
    allocate: str | Method | Mapping[str, float] | None = None,
    score: str | WeightScore | ChannelScore | None = None,
    pattern: str | Pattern | None = None,
    repair: str | Sequence[str | Method] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Chain:
    """A recipe with parts replaced, as values.

    Args:
        options: method name -> hyperparameters that differ from the defaults.
    Raises:
        UsageError: an unknown name (with the nearest), a method in the wrong place, or an unknown option.
    """
    if method in METHODS and method not in RECIPES:
        raise UsageError(f"{method} is no whole recipe but a part of one: use --{METHODS[method].role} {method}.")
    if method not in RECIPES:
        raise unknown("method", method, RECIPES)
    recipe, options = RECIPES[method], dict(options or {})
    unused = dict(options)
    allocate = recipe.allocate if allocate is None else allocate
    repairs = recipe.repair if repair is None else repair
    if isinstance(repairs, str):
        repairs = () if repairs in ("", "none") else tuple(part.strip() for part in repairs.split(","))
    chosen = _allocator(allocate, options, unused)
    if pattern is None:
        pattern = (
            recipe.pattern if "weights" in _shares(chosen) or recipe.pattern.startswith("channels") else "channels"
        )
    structure = patterns.parse(pattern) if isinstance(pattern, str) else pattern
    shared = "channels" if isinstance(structure, patterns.Channels) else "weights"
    if shared not in _shares(chosen):
        others = [name for name, known in METHODS.items() if known.role == "allocate" and shared in _shares(known)]
        raise UsageError(f"{_name(allocate)} cannot share out {shared} (pattern {structure}): {', '.join(others)} can.")
    scores: Mapping[str, Any] = CHANNEL_SCORES if shared == "channels" else SCORES
    score = recipe.score if score is None else score
    if isinstance(score, str) and score not in scores:
        raise unknown("score", score, scores)
    found = tuple(
        _named(p, "repair", options, unused) if isinstance(p, str) else _fitting(p, "repair") for p in repairs
    )
    if unused:
        used = [n for n in (allocate, *repairs) if isinstance(n, str)]
        raise unknown("options: no method of this run is called", next(iter(unused)), used)
    names = Recipe(
        _name(allocate),
        score if isinstance(score, str) else getattr(score, "__name__", "custom"),
        str(structure),
        tuple(_name(part) for part in repairs),
    )
    return Chain(
        chosen,
        scores[score] if isinstance(score, str) else score,
        structure,
        found,
        names,
        method if names.allocate == recipe.allocate else names.allocate,
        _summary(METHODS[names.allocate]) if names.allocate in METHODS else "",
    )


def _summary(method: Any) -> str:
    described = method.densities if isinstance(method, Rule) else type(method)
    return (inspect.getdoc(described) or "").partition("\n")[0]


def streamed(parts: Chain, problem: Problem, device: str | torch.device) -> Chain:
    """The chain with one block of the model at a time on the device, for whatever looks at inputs.

    Raises:
        UsageError: a part that needs the whole net, or a device that is not there.
    """
    device = usable(device)
    ways = [name for name, known in METHODS.items() if getattr(known, "streams", None) in WAYS]
    free = [name for name, known in METHODS.items() if not known.needs_data]
    if parts.allocate.needs_data:
        can = [name for name in free if METHODS[name].role == "allocate"]
        raise UsageError(f"stream: {parts.names.allocate} needs the whole net on the device; {', '.join(can)} do not.")
    try:
        whole, blind = Candidate.dense(problem), replace(problem, calibration=None)
        Selection().step(blind, whole, Selection().init(blind, whole))
    except UsageError as error:
        raise UsageError(f"stream: the score {parts.names.score} needs the whole net; magnitude does not.") from error
    repair = []
    for name, part in zip(parts.names.repair, parts.repair, strict=True):
        if part.needs_data and getattr(part, "streams", None) not in WAYS:
            can = [*ways, *(other for other in free if METHODS[other].role == "repair")]
            raise UsageError(f"stream: {name} needs the whole net on the device; {', '.join(can)} do not.")
        repair.append(Streamed(part, device) if part.needs_data else part)
    return replace(parts, repair=tuple(repair))


_BOTH = ("weights", "channels")


def _shares(method: Method) -> tuple[str, ...]:
    """What an allocator can share out; one that does not say so is of single weights."""
    return getattr(method, "allocates", ("weights",))


SETTABLE = ("starts", "among")  # fields of several allocators that a recipe can name
Options = Mapping[str, Mapping[str, Any]]


def _allocator(allocate: str | Method | Mapping[str, float], options: Options, unused: dict[str, Any]) -> Method:
    """The allocator of this name, of the recipe of this name, or from a file."""
    if isinstance(allocate, Mapping):
        try:
            return Rule(Given({name: float(density) for name, density in allocate.items()}), _BOTH)
        except (TypeError, ValueError) as error:
            raise UsageError(f"allocate: a density is no number ({error}).") from error
    allocate = str(allocate) if isinstance(allocate, Path) else allocate
    if not isinstance(allocate, str):
        return _fitting(allocate, "allocate")
    role = METHODS[allocate].role if allocate in METHODS else None
    if role is None and (allocate.endswith(".json") or Path(allocate).is_dir()):
        path = Path(allocate)
        return Rule(Given(Allocation.load(path / "allocation.json" if path.is_dir() else path)), _BOTH)
    if role != "allocate" and allocate in RECIPES:
        allocate = RECIPES[allocate].allocate
    return _named(allocate, "allocate", options, unused)


def _named(name: str, role: str, options: Options, unused: dict[str, Any]) -> Method:
    accepted = [key for key, method in METHODS.items() if method.role == role]
    if name not in accepted:
        raise unknown({"allocate": "allocator", "repair": "repair"}[role], name, accepted)
    unused.pop(name, None)
    given = options.get(name, {})
    known = options_of(METHODS[name])
    for key in given:
        if key not in known:
            raise unknown(f"option of {name}", key, known)
        if given[key] == name:
            raise UsageError(f"options.{name}.{key}: {name} cannot be that of itself.")
    return _replaced(METHODS[name], given, name, options, unused)


def options_of(method: Any) -> dict[str, Any]:
    """Option -> default of a method: its fields, and the fields of the plain values that it holds.

    A field that holds a method takes what `allocate` takes, and its default is shown by name.
    """
    found: dict[str, Any] = {}
    for f in fields(method):
        value = getattr(method, f.name)
        if not f.metadata.get("option", True):
            continue
        if hasattr(value, "role"):
            found[f.name] = _name(value)
        elif _methods(value):
            if f.name in SETTABLE:
                found[f.name] = [label for label, _ in value]
        elif is_dataclass(value):
            found |= options_of(value)
        elif _plain(value):
            found[f.name] = value
    return found


def _methods(value: Any) -> bool:
    """Whether it is a tuple of (label, method)."""
    return isinstance(value, tuple) and bool(value) and hasattr(value[0], "__len__") and hasattr(value[0][-1], "role")


def _plain(value: Any) -> bool:
    """What a recipe can say."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _replaced(method: Any, given: Mapping[str, Any], name: str, options: Options, unused: dict[str, Any]) -> Any:
    """`method` with options of `options_of` set; a method among them takes its own from `options`."""
    changed = {}
    for f in fields(method):
        value = getattr(method, f.name)
        if hasattr(value, "role"):
            try:
                changed[f.name] = _allocator(given[f.name], options, unused) if f.name in given else value
            except UsageError as error:
                raise UsageError(f"options.{name}.{f.name}: {error}") from error
        elif _methods(value) and f.name in SETTABLE:
            changed[f.name] = _several(value, given.get(f.name), name, options, unused)
        elif is_dataclass(value) and given.keys() & options_of(value).keys():
            changed[f.name] = _replaced(value, given, name, options, unused)
        elif f.name in given:
            changed[f.name] = given[f.name]
    return replace(method, **changed)


def _several(
    value: tuple[tuple[str, Any], ...], names: Any, name: str, options: Options, unused: dict[str, Any]
) -> tuple[tuple[str, Any], ...]:
    """The allocators called `names`, or those that are there; each takes its own options."""
    if names is not None:
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list | tuple) or not names or not all(isinstance(part, str) for part in names):
            raise UsageError(f"options.{name}: {names!r}: names of allocators are accepted, like [erk, fcpts].")
        return tuple((part, _allocator(part, options, unused)) for part in names)
    found = []
    for label, method in value:
        given = options.get(label, {})
        unused.pop(label, None)
        known = options_of(method)
        for key in given:
            if key not in known:
                raise unknown(f"option of {label}", key, known)
        found.append((label, _replaced(method, given, label, options, unused) if given else method))
    return tuple(found)


def _fitting(part: Any, role: str) -> Method:
    if getattr(part, "role", None) != role:
        raise UsageError(f"{_name(part)} is no method with role {role!r}: a name or such a method is accepted.")
    return part


def _name(part: str | Method | Mapping[str, float]) -> str:
    """As given, as in `METHODS`, or what its function or class is called."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return "given"
    inner: Any = part.densities if isinstance(part, Rule) else part
    own = getattr(inner, "__name__", type(inner).__name__)
    return next((name for name, method in METHODS.items() if method == part), own)
