"""Checks the shapes that jaxtyping annotations promise, and nothing else, in tests only.

Plain beartype would also refuse what allot itself refuses with its own message, and stumbles over protocols.
"""

from __future__ import annotations

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
    """`jaxtyped` for classes, and for functions with a shape: others would be slowed down, and nothing checked."""

    def decorator(**settings: Any) -> Callable[[Any], Any]:
        full = jaxtyped(**settings)
        return lambda it: full(it) if inspect.isclass(it) or "[Tensor" in str(it.__annotations__) else it

    return decorator


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its jaxtyping annotations checked by beartype; itself when it has none."""
    shapes = {name: hint for name, hint in function.__annotations__.items() if _names_a_shape(hint)}
    if not shapes:
        return function
    function.__annotations__ = shapes
    return beartype(function)


def _names_a_shape(hint: object) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_a_shape(part) for part in get_args(hint))
