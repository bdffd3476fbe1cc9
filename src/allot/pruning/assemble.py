"""A chain put together from names: a recipe, and parts that replace parts of it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from allot.budget.allocation import Allocation
from allot.errors import UsageError, unknown
from allot.methods import METHODS, RECIPES
from allot.methods.layerwise.streamed import WAYS, Streamed, by_blocks
from allot.methods.layerwise.streamed_block import usable
from allot.methods.rules import Given
from allot.methods.training.rounds import in_rounds
from allot.methods.training.selection import Selection
from allot.methods.training.viewed import Viewed
from allot.methods.training.where_it_helps import Helps, WhereItHelps
from allot.network.arguments import check_type
from allot.run import patterns
from allot.run.driver import repeatable
from allot.run.patterns import Pattern
from allot.run.problem import Candidate, Chain, Method, Problem, Rule, innermost
from allot.run.recipes import Recipe
from allot.run.scores import CHANNEL_SCORES, SCORES, ChannelScore, WeightScore
from allot.run.views import SIDE, are_pictures

log = logging.getLogger("allot")


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
    recipe = RECIPES[method]
    settings = _Options(options or {}, recipe.options)
    allocate = recipe.allocate if allocate is None else allocate
    repair = recipe.repair if repair is None else repair
    if isinstance(repair, str):
        repair = () if repair in ("", "none") else tuple(part.strip() for part in repair.split(","))
    check_type("repair", repair, Sequence[Any])
    allocator = _allocator(allocate, settings)
    if pattern is None:
        whole = "weights" not in _units(allocator) and not recipe.pattern.startswith("channels")
        pattern = "channels" if whole else recipe.pattern
    structure = patterns.parse(pattern) if isinstance(pattern, str) else pattern
    unit = "channels" if isinstance(structure, patterns.Channels) else "weights"
    if unit not in _units(allocator):
        others = [name for name, other in METHODS.items() if other.role == "allocate" and unit in _units(other)]
        raise UsageError(f"{_name(allocate)} cannot share out {unit} (pattern {structure}): {', '.join(others)} can.")
    scores: Mapping[str, Any] = CHANNEL_SCORES if unit == "channels" else SCORES
    repairs = tuple(_method(part, "repair", settings) for part in repair)
    for part, method_of_part in zip(repair, repairs, strict=True):
        if unit not in getattr(method_of_part, "allocates", _BOTH):
            raise UsageError(f"{_name(part)} cannot share out {unit} (pattern {structure}): leave this repair out.")
    if score is None:
        chosen = any(getattr(part, "chooses_masks", False) for part in repairs)
        score = recipe.score if chosen or unit == "channels" else recipe.score_alone or recipe.score
    if isinstance(score, str) and score not in scores:
        raise unknown("score", score, scores)
    if settings.unused:
        used = [name for name in (allocate, *repair) if isinstance(name, str)]
        raise unknown("options: no method of this run is called", next(iter(settings.unused)), used)
    names = Recipe(
        _name(allocate),
        score if isinstance(score, str) else getattr(score, "__name__", "custom"),
        str(structure),
        tuple(map(_name, repair)),
        recipe.dense_head,
        settings.taken,
    )
    return Chain(
        allocator,
        scores[score] if isinstance(score, str) else score,
        structure,
        repairs,
        names,
        method if names.allocate == recipe.allocate else names.allocate,
        _summary(METHODS[names.allocate]) if names.allocate in METHODS else "",
    )


def fitted(chain: Chain, problem: Problem, views: int | None) -> Chain:
    """The chain without those repairs of its recipe that do not suit the model or its inputs.

    Statistics of a batch, where they mislead; a trial of views, where inputs are no pictures or `views` are given;
    training that the watch set decides about, where outputs cannot be compared.
    """
    unsuitable = {"bn", "variance"} if problem.batch_norm == "frozen" else set[str]()
    pairs = zip(chain.names.repair, chain.repair, strict=True)
    tried = are_pictures(problem.example) and views is None
    compared = not (problem.watch and problem.watch.reason)

    def suits(method: Method) -> bool:
        return (tried or not getattr(method, "views", 0)) and (compared or getattr(method, "helps", Helps()) == Helps())

    repairs = [(name, method) for name, method in pairs if name not in unsuitable and suits(method)]
    if compared and views is None and not tried:
        for name in sorted(set(chain.names.repair) - unsuitable - {name for name, _ in repairs}):
            log.info("%s left out: inputs are no pictures, of which it would add crops.", name)
    names = replace(chain.names, repair=tuple(name for name, _ in repairs))
    return replace(chain, names=names, repair=tuple(method for _, method in repairs))


def stream_repairs(chain: Chain, problem: Problem, device: str | torch.device) -> Chain:
    """The chain whose selection and repairs have one block of the model at a time on the device.

    Raises:
        UsageError: a part that needs the whole net, or a device that does not exist.
    """
    device = usable(device)
    if chain.allocate.needs_data:
        can = ", ".join(name for name, m in METHODS.items() if m.role == "allocate" and not m.needs_data)
        raise UsageError(f"stream: {chain.names.allocate} needs the whole net on the device; {can} do not.")
    try:
        dense, without_data = Candidate.dense(problem), replace(problem, calibration=None)
        Selection().step(without_data, dense, Selection().init(without_data, dense))
    except UsageError as error:
        if problem.scope.groups:
            raise UsageError(
                f"stream: the score {chain.names.score} needs the whole net; magnitude does not."
            ) from error
        problem.inputs()
        chain = replace(chain, select=Streamed(Selection(by_inputs=True), device))
    repairs = []
    for name, method in zip(chain.names.repair, chain.repair, strict=True):
        if method.needs_data and not _streams(method):
            free = [other for other, m in METHODS.items() if m.role == "repair" and not m.needs_data]
            can = ", ".join([*(other for other, m in METHODS.items() if _streams(m)), *free])
            raise UsageError(f"stream: {name} needs the whole net on the device; {can} do not.")
        repairs.append(Streamed(method, device) if method.needs_data else method)
    return replace(chain, repair=tuple(repairs))


def repair_by_blocks(chain: Chain, problem: Problem) -> Chain:
    """The chain whose repairs go block by block where they say so: a pass of the whole net for each layer is slow.

    Raises:
        UsageError: a repair that needs blocks, for a model that has none.
    """
    with repeatable(problem.model, problem.seed, "blocks"):
        return replace(chain, repair=tuple(by_blocks(method, problem) for method in chain.repair))


def adapted(chain: Chain, problem: Problem, views: int | None) -> Chain:
    """The chain whose repairs do what they ask for: see views of inputs, and train in rounds, and where it helps.

    Args:
        views: crops of each picture, in all repairs; None: where repairs ask for them.
    """
    pictures = are_pictures(problem.example)

    def adapt(method: Method) -> Method:
        helps, mixtures = getattr(method, "helps", Helps()), getattr(method, "mixtures", 0)
        own = getattr(innermost(method), "views", 0)
        crops = views if views is not None and method.needs_data else own
        if crops and not pictures:
            log.warning("views=%d: inputs are no pictures [C, height, width] of %d pixels or more", crops, SIDE)
            crops = 0
        method = in_rounds(method, problem)
        if crops or mixtures:
            method = Viewed(method, crops, mixtures)
        return WhereItHelps(method, helps) if problem.watch and helps != Helps() else method

    return replace(chain, repair=tuple(map(adapt, chain.repair)))


def options_of(method: Any) -> dict[str, Any]:
    """Option -> default of a method: its fields, and the fields of the plain values that it holds.

    A field that holds a method accepts the values of `allocate`, and its default is shown by name.
    """
    options: dict[str, Any] = {}
    for f in fields(method):
        value = getattr(method, f.name)
        if not f.metadata.get("option", True):
            continue
        if hasattr(value, "role"):
            options[f.name] = _name(value)
        elif _labelled(value):
            if f.name in SETTABLE:
                options[f.name] = [label for label, _ in value]
        elif is_dataclass(value):
            options |= options_of(value)
        elif _plain(value):
            options[f.name] = value
    return options


_BOTH = ("weights", "channels")
SETTABLE = ("starts", "among")  # fields of several allocators that a recipe can name


class _Options:
    """Method name -> hyperparameters, as given; `unused` are the methods that no part of the chain took, `taken` the
    hyperparameters that parts took.

    Args:
        recipe: hyperparameters of the recipe, which hold where none are given; they need no part that takes them.
    """

    def __init__(
        self, given: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        recipe = recipe or {}
        self.given = {name: {**recipe.get(name, {}), **given.get(name, {})} for name in {**recipe, **given}}
        self.unused = dict.fromkeys(given)
        self.taken: dict[str, Mapping[str, Any]] = {}

    def take(self, name: str, method: Any) -> Any:
        """`method` with the options that are given under its name.

        Raises:
            UsageError: an unknown option, or a method inside of itself.
        """
        self.unused.pop(name, None)
        given, accepted = self.given.get(name, {}), options_of(method)
        for key in given:
            if key not in accepted:
                raise unknown(f"option of {name}", key, accepted)
            if given[key] == name:
                raise UsageError(f"options.{name}.{key}: {name} cannot be that of itself.")
        if given:
            self.taken[name] = given
        return self._changed(method, given, name)

    def _changed(self, method: Any, given: Mapping[str, Any], name: str) -> Any:
        """`method` with options of `options_of` set; a method inside of it takes the options under its name."""
        changed = {}
        for f in fields(method):
            value = getattr(method, f.name)
            if hasattr(value, "role"):
                try:
                    changed[f.name] = _allocator(given[f.name], self) if f.name in given else value
                except UsageError as error:
                    raise UsageError(f"options.{name}.{f.name}: {error}") from error
            elif _labelled(value) and f.name in SETTABLE:
                changed[f.name] = self._allocators(value, given.get(f.name), name)
            elif is_dataclass(value) and given.keys() & options_of(value).keys():
                changed[f.name] = self._changed(value, given, name)
            elif f.name in given:
                changed[f.name] = given[f.name]
        return replace(method, **changed)

    def _allocators(self, defaults: tuple[tuple[str, Any], ...], names: Any, name: str) -> tuple[tuple[str, Any], ...]:
        """The allocators called `names`, the default ones for None, each with its options."""
        if names is None:
            return tuple((label, self.take(label, method)) for label, method in defaults)
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list | tuple) or not names or not all(isinstance(part, str) for part in names):
            raise UsageError(f"options.{name}: {names!r}: names of allocators are accepted, like [erk, fcpts].")
        return tuple((part, _allocator(part, self)) for part in names)


def _allocator(allocate: str | Method | Mapping[str, float], options: _Options) -> Method:
    """The allocator of this name, of the recipe of this name, or from a file."""
    if isinstance(allocate, Mapping):
        try:
            return Rule(Given({name: float(density) for name, density in allocate.items()}), _BOTH)
        except (TypeError, ValueError) as error:
            raise UsageError(f"allocate: a density is no number ({error}).") from error
    allocate = str(allocate) if isinstance(allocate, Path) else allocate
    if isinstance(allocate, str):
        if allocate not in METHODS and (allocate.endswith(".json") or Path(allocate).is_dir()):
            path = Path(allocate)
            return Rule(Given(Allocation.load(path / "allocation.json" if path.is_dir() else path)), _BOTH)
        if allocate in RECIPES and (allocate not in METHODS or METHODS[allocate].role != "allocate"):
            allocate = RECIPES[allocate].allocate
    return _method(allocate, "allocate", options)


def _method(part: str | Method, role: str, options: _Options) -> Method:
    """The method of this name with its options, or the method itself."""
    if not isinstance(part, str):
        if getattr(part, "role", None) != role:
            raise UsageError(f"{_name(part)} is no method with role {role!r}: a name or such a method is accepted.")
        return part
    accepted = [name for name, method in METHODS.items() if method.role == role]
    if part not in accepted:
        raise unknown({"allocate": "allocator"}.get(role, role), part, accepted)
    method: Method = options.take(part, METHODS[part])
    return method


def _units(method: Method) -> tuple[str, ...]:
    """The units that an allocator can allocate; weights where it does not say so."""
    return getattr(method, "allocates", ("weights",))


def _streams(method: Method) -> bool:
    return getattr(method, "streams", None) in WAYS


def _labelled(value: Any) -> bool:
    """Whether `value` is a tuple of (label, method)."""
    return isinstance(value, tuple) and bool(value) and hasattr(value[0], "__len__") and hasattr(value[0][-1], "role")


def _plain(value: Any) -> bool:
    """Whether a recipe file can hold `value`."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _name(part: str | Method | Mapping[str, float]) -> str:
    """The name as given, the name in `METHODS`, or else the name of the function or class."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return "given"
    inner: Any = part.densities if isinstance(part, Rule) else part
    default = getattr(inner, "__name__", type(inner).__name__)
    return next((name for name, method in METHODS.items() if method == part), default)


def _summary(method: Any) -> str:
    documented = method.densities if isinstance(method, Rule) else type(method)
    return (inspect.getdoc(documented) or "").partition("\n")[0]
