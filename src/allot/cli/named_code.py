"""Code that a recipe names. A run directory may come from anybody: code is run where the command line names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from allot.cli.recipe import RecipeFile
from allot.errors import UsageError

_NO_CODE = {  # origins that name no code of their own: everything else is a place in Python
    "model": ("zoo", "torchvision", "timm", "hf"),
    "data": ("zoo", "folder", "npz", "text", "synthetic"),
}
_ORIGINS = {**_NO_CODE, "test": _NO_CODE["data"]}
_FUNCTIONS = ("metric", "outputs")  # a place in Python wherever they stand


def names_code(key: str, value: Any) -> bool:
    """Whether a value of a recipe is a place in Python, which is executed when it is loaded.

    >>> names_code("model", "zoo:digits-resnet20"), names_code("model", "net.py:make")
    (False, True)
    """
    if not isinstance(value, str):
        return False
    return key in _FUNCTIONS or (key in _ORIGINS and value.partition(":")[0] not in _ORIGINS[key])


def check_recipe(path: Path, wanted: RecipeFile, given: RecipeFile) -> None:
    """Refuse code that only the recipe in a run directory names.

    Args:
        path: of the recipe.
        wanted: the recipe, overridden by the command line.
        given: the command line alone.
    Raises:
        UsageError: the recipe lies in a run directory, and names code that the command line does not name.
    """
    from allot.export.files.destination import is_run  # imports torch

    if not is_run(path.parent):
        return
    named = dict(_places(given))
    for key, value in _places(wanted):
        if named.get(key) != value:
            raise UsageError(
                f"{path} names code as its {key} ({value}), and no command runs code that a run directory names: "
                f"{_how_to_give(key, value)} if you trust it, or copy the recipe to another directory."
            )


def _places(recipe: RecipeFile) -> Iterator[tuple[str, str]]:
    """(key, value) of every value that names code, options of methods included."""
    for key in (*_ORIGINS, *_FUNCTIONS):
        if names_code(key, value := getattr(recipe, key)):
            yield key, value
    for method, options in recipe.options.items():
        for key, value in options.items():
            if key in _FUNCTIONS and names_code(key, value):
                yield f"options.{method}.{key}", value


def _how_to_give(key: str, value: str) -> str:
    if key == "model":
        return f"give {value} as MODEL"
    return f"give --set {key}={value}" if "." in key else f"give --{key} {value}"
