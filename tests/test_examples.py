"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import allot

SOURCE = Path(allot.__file__).parent
MODULES = [
    ".".join(("allot", *file.relative_to(SOURCE).with_suffix("").parts))
    for file in sorted(SOURCE.rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]
PUBLIC = [name for name in allot.__all__ if callable(getattr(allot, name))]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(module)
    failed, tried = doctest.testmod(found, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
    assert list(tmp_path.iterdir()) == []  # an example leaves no files


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_shows_an_example(name: str):
    public: Any = getattr(allot, name)
    if inspect.isclass(public) and issubclass(public, allot.AllotError):
        return  # what raises it is the example
    assert ">>> " in (inspect.getdoc(public) or ""), f"{public.__module__}.{name}"


def test_an_example_that_lies_is_found():
    def liar() -> None:
        """>>> 1 + 1
        3
        """

    (test,) = doctest.DocTestFinder().find(liar, "liar", globs={})
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1
