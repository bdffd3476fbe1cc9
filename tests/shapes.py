"""Checks the shapes that jaxtyping annotations promise, and nothing else, in tests only.

Plain beartype would also refuse what allot itself refuses with its own message, and stumbles over protocols.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jaxtyping
from beartype import beartype


def check_shapes_of(source: Path) -> list[str]:
    """Modules under `source` whose annotations will be checked: those that mention jaxtyping (the rest cost nothing).

    Call it before any of them is imported.
    """
    files = sorted(file for file in source.rglob("*.py") if "jaxtyping" in file.read_text(encoding="utf-8"))
    modules = [".".join(file.relative_to(source).with_suffix("").parts) for file in files]
    jaxtyping.jaxtyped = _where_shapes_are_named(jaxtyping.jaxtyped)  # the hook calls it by this name
    jaxtyping.install_import_hook(modules, "shapes.checked")
    return modules


def _where_shapes_are_named(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """`jaxtyped` for classes, `in_one_scope` for functions with a shape: `jaxtyped` checks arguments twice."""

    def decorator(**settings: Any) -> Callable[[Any], Any]:
        full = jaxtyped(**settings)
        return lambda it: full(it) if inspect.isclass(it) else in_one_scope(it)

    return decorator


def in_one_scope(function: Callable[..., Any], scope: Any = jaxtyping.jaxtyped) -> Callable[..., Any]:
    """The function with its shapes checked: a letter means one number within a call. Itself when it names no shape."""
    once = checked(function)
    if once is function:
        return function

    @functools.wraps(function)
    def in_scope(*args: Any, **named: Any) -> Any:
        with scope("context"):
            return once(*args, **named)

    return in_scope


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its jaxtyping annotations checked by beartype; itself when it has none."""
    hints = function.__annotations__
    shapes = {name: read for name, hint in hints.items() if _names_a_shape(read := _read(hint, function))}
    if not shapes:
        return function
    function.__annotations__ = shapes
    try:
        return beartype(function)
    finally:
        function.__annotations__ = hints


def _read(hint: object, function: Callable[..., Any]) -> object:
    """An annotation that was left as text, where it names a tensor; None where it means nothing to jaxtyping."""
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, function.__globals__) if "[Tensor" in hint else None
    except AttributeError:  # like Shaped[Tensor, ...]
        return None


def _names_a_shape(hint: object) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_a_shape(part) for part in get_args(hint))
