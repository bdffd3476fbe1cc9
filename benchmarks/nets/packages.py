"""Packages that the benchmarks of trained nets need: found, or an error in one line; single files, imported alone.

Most of these packages import far more than the file that is needed (audio readers, downloads), so that only this file
is executed, and names that it imports from the others are given as stubs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from allot.errors import UsageError


def folder_of(module: str, package: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        UsageError: the package is missing; the message says how to install it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{module} is missing: pip install --no-deps {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def execute(file: Path, name: str, stubs: Mapping[str, Mapping[str, Any]]) -> ModuleType:
    """The module that `file` makes under this `name`; the modules of `stubs` hold the given names meanwhile.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "m.py").write_text("from absent.part import x")
    ...     execute(Path(folder, "m.py"), "m", {"absent": {}, "absent.part": {"x": 1}}).x
    1
    """
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    before = {stub: sys.modules.get(stub) for stub in stubs}
    for stub, names in stubs.items():
        sys.modules[stub] = ModuleType(stub)
        sys.modules[stub].__dict__.update(names, __path__=[])
    try:
        spec.loader.exec_module(module)
    finally:
        for stub, earlier in before.items():
            if earlier is None:
                del sys.modules[stub]
            else:
                sys.modules[stub] = earlier
    return module


def hide_if_broken(module: str) -> None:
    """Makes a module that cannot be imported look absent, so that packages which can do without it are imported."""
    try:
        importlib.import_module(module)
    except Exception:  # noqa: BLE001 - a wheel for another torch raises whatever it likes
        for name in [name for name in sys.modules if name.partition(".")[0] == module]:
            del sys.modules[name]
        sys.modules[module] = None  # type: ignore[assignment]
