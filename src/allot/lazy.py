"""Packages whose names come with their first use: torch takes seconds to import, and `allot --help` needs none."""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib import import_module
from types import ModuleType
from typing import Any


def lazily(package: str, *, over: Collection[str] = ()) -> None:
    """Make the names of the module `api` of a package names of the package; the first one that is used imports it.

    Args:
        over: names of `api` that are names of folders too: the name in `api` counts.

    >>> import allot.run
    >>> allot.run.Unstructured()
    Unstructured()
    """
    module = sys.modules[package]
    module.__dict__["_over"] = frozenset(over)
    module.__class__ = _Package


class _Package(ModuleType):
    _over: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__all__":  # what Python asks of any module while it imports
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        api = import_module(f"{self.__name__}.api")
        if name in self.__dict__:  # a folder, which api imported
            return self.__dict__[name]
        if not hasattr(api, name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(api, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in self._over and isinstance(value, ModuleType)):  # as Python does with a folder it has imported
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})
