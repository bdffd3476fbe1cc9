"""Python objects by name: `package.module:name`, `file.py:name`, and optional packages."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from allot.errors import UsageError, unknown, with_cause


def called(spec: str, kind: Any, wanted: str) -> Any:
    """The result of the factory at `package.module:factory` or `file.py:factory`.

    Args:
        kind: required class or classes of the result; `wanted` names them in words.
    Raises:
        UsageError: no such name, a factory of Python itself, or one that fails or returns another class.
    """
    where, _, factory = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            module = _executed(Path(where))
        else:
            import_from(Path.cwd())
            module = importlib.import_module(where)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"cannot import {where!r} of {spec!r}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, factory, None)):
        names = [name for name, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
        raise unknown(f"factory in {where}", factory, [name for name in names if callable(getattr(module, name))])
    _refuse_standard(getattr(module, factory), spec)
    try:
        result = getattr(module, factory)()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, kind):
        raise UsageError(f"{spec} returned {type(result).__name__}: {wanted} is accepted.")
    return result


def function_at(spec: str) -> Any:
    """The function at `package.module:function` or `file.py:function`; a file is executed once.

    Raises:
        UsageError: no such name, no function of this name, or a function of Python itself.
    """
    where, _, name = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            function = getattr(_executed_once(Path(where).resolve()), name)
        else:
            function = pkgutil.resolve_name(spec)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{error}; file.py:function or package.module:function is accepted.") from error
    if not callable(function):
        raise UsageError("it is no function: file.py:function or package.module:function is accepted.")
    _refuse_standard(function, spec)
    return function


def _refuse_standard(function: Any, spec: str) -> None:
    """Raises:
    UsageError: a function or class of Python itself, like os:system, which is called with nothing that it expects.
    """
    function = function.func if isinstance(function, functools.partial) else function
    if not (inspect.isroutine(function) or inspect.isclass(function)):  # an object that the user made
        return
    module = sys.modules.get(str(getattr(function, "__module__", "")))
    file = getattr(module, "__file__", None)
    by_name = module is not None and module.__name__.partition(".")[0] in sys.stdlib_module_names
    if by_name and (file is None or Path(file).is_relative_to(sysconfig.get_path("stdlib"))):
        raise UsageError(f"{spec} is part of Python itself and is not called: a function of your own is accepted.")


def optional(module: str, package: str, extra: str) -> ModuleType:
    """A module of an optional package, which an extra of allot installs.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise UsageError(f"{package} is not installed: pip install 'allot[{extra}]'.") from error
        raise UsageError(f"{package} is installed but cannot be imported here: {with_cause(error)}") from error


def import_from(folder: Path) -> None:
    """Let modules in `folder` be imported, as Python does for the script that it runs."""
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))


def _executed(path: Path) -> ModuleType:
    """The module of a Python file, which can import other files of its folder."""
    located = importlib.util.spec_from_file_location(path.stem, path)
    if located is None or located.loader is None:
        raise UsageError(f"{path} is no Python file.")
    import_from(path.parent)
    module = importlib.util.module_from_spec(located)
    sys.modules.setdefault(located.name, module)
    located.loader.exec_module(module)
    return module


_executed_once = functools.cache(_executed)
