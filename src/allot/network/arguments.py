"""Arguments of public functions, checked against their annotations: a wrong type is an error that names the argument.

The entries of mappings and sequences are checked too; of a protocol, the names of its attributes. What a value of the
right type may be is checked where it is used.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from allot.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")

LONGEST = 60  # characters of a value in an error
_MANY = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None",
    nn.Module: "an nn.Module", Tensor: "a tensor", Mapping: "a dict", Sequence: "a list",
    Callable: "a function", os.PathLike: "a path",
}  # fmt: skip
_PLAIN = (str, int, float, bool, bytes, list, tuple, dict, type(None))  # written out in an error
_NO_LIST = (str, bytes, bytearray, Mapping, Tensor)  # iterable, but no list
_AS_GOOD: dict[Any, Any] = {Path: os.PathLike, torch.device: (torch.device, str), bool: (bool, numpy.bool_)}


def typed(function: Callable[P, T]) -> Callable[P, T]:
    """The function; an argument whose type its annotation excludes is a `UsageError` before the function begins.

    >>> @typed
    ... def double(number: float) -> float:
    ...     return 2 * number
    >>> double("2")
    Traceback (most recent call last):
    allot.errors.UsageError: double: number='2': a number is accepted.
    """
    return typed_but()(function)


def typed_but(*names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`typed`, except for these arguments, about which the function itself says more."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        called = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")
        unchecked = {name for name, given in signature.parameters.items() if given.kind in _MANY} | set(names)
        hints = cache(lambda: get_type_hints(function))  # when it is called: modules may be unfinished before

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # too many, too few or unknown: Python says so
                return function(*args, **kwargs)
            for name, value in given.items():
                if name in hints() and name not in unchecked:
                    check_type(f"{called}: {name}", value, hints()[name])
            return function(*args, **kwargs)

        return checked

    return decorate


def check_type(name: str, value: object, annotation: Any) -> None:
    """Compare a value with an annotation.

    Args:
        name: what the error calls the value.
    Raises:
        UsageError: the annotation excludes the value, or one of its entries.

    >>> check_type("masks", {"fc.weight": 1}, Mapping[str, Tensor])
    Traceback (most recent call last):
    allot.errors.UsageError: masks['fc.weight']=1: a tensor is accepted.
    """
    if fits(value, annotation):
        return
    kinds = [kind for kind in _kinds(annotation) if fits(value, get_origin(kind) or kind)]
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, Sequence) else ()
    for key, entry in entries if kinds else ():  # the container is right, an entry is not
        inner = get_args(kinds[0])
        if isinstance(value, Mapping):
            check_type(f"{name}: the key", key, inner[0])
        check_type(f"{name}[{key!r}]", entry, inner[-1] if isinstance(value, Mapping) else inner[0])
    *others, last = dict.fromkeys(map(_words, _kinds(annotation)))
    accepted = f"{', '.join(others)} or {last}" if others else last
    raise UsageError(f"{name}={_shown(value)}: {accepted} is accepted.{_advice(value, _kinds(annotation))}")


def fits(value: object, annotation: Any) -> bool:
    """Whether a value is of an annotated type. Annotations that say nothing, and type variables, accept everything.

    >>> fits(3, float), fits(True, float), fits("ab", Sequence[str]), fits([1], Sequence[str])
    (True, False, False, False)
    """
    kinds, origin, inner = _kinds(annotation), get_origin(annotation), get_args(annotation)
    if len(kinds) > 1:
        return any(fits(value, kind) for kind in kinds)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin is Literal:
        return isinstance(value, tuple({type(choice) for choice in inner}))  # which text is for the function to say
    kind = origin or annotation
    if kind is Any or not isinstance(kind, type):
        return True
    if isinstance(value, type):
        return kind in (object, type, Callable)
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, member) for member in _members(kind))
    if kind is Dataset:  # anything that holds samples: who reads them says what is accepted
        return True
    if kind in (tuple, list, Sequence, Iterable):  # a list is as good as a tuple, and a set; an iterator is left whole
        entries = value if isinstance(value, Collection) else ()
        return isinstance(value, Iterable) and not isinstance(value, _NO_LIST) and _all_fit(entries, inner[:1])
    if issubclass(kind, Mapping):
        return isinstance(value, kind) and _all_fit(value, inner[:1]) and _all_fit(value.values(), inner[1:])
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:  # nan is a number, and for the function to refuse
        real = isinstance(value, Real) and not isinstance(value, bool)
        return real and not (isinstance(value, int) and abs(value) > sys.float_info.max)
    return isinstance(value, _AS_GOOD.get(kind, kind))


def _all_fit(entries: Iterable[object], annotation: Sequence[Any]) -> bool:
    return not annotation or annotation[0] is Any or all(fits(entry, annotation[0]) for entry in entries)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, else the annotation alone; None as its type."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(type(None) if member is None else member for member in members)


def _members(protocol: type) -> set[str]:
    """The names that a protocol demands."""
    own = {*vars(protocol), *vars(protocol).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")} | ({"__call__"} & own)


def _words(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    kind = get_origin(kind) or kind
    name = getattr(kind, "__name__", str(kind))
    return _WORDS.get(kind, _with_article(name))


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOaeio' else 'a'} {name}"


def _shown(value: object) -> str:
    """A value as an error shows it: plain values written out and cut, of others the type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if type(value) not in _PLAIN and not isinstance(value, os.PathLike):
        return _with_article(type(value).__name__)
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a list may hold anything, and a number more digits than Python writes
        return _with_article(type(value).__name__)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _advice(value: object, kinds: Sequence[Any]) -> str:
    """What to do with what is often given in place of a model; empty where nothing is known."""
    if nn.Module not in kinds:
        return ""
    if isinstance(value, type):
        return f" Make one of the class: {value.__name__}(...)."
    if isinstance(value, Mapping):
        return " A state dict needs its model: model.load_state_dict(...)."
    if not isinstance(value, str | os.PathLike):
        return ""
    text = str(value)
    named = repr(text) if ":" in text else f"'file.py:factory', weights={text!r}"  # a file of weights has no code
    return f" Load it first: from allot.sources.load import load_model; model = load_model({named}).model"
