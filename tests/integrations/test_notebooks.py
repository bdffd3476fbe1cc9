"""The notebooks of the docs: they run from top to bottom, and what they show is what they gave when they last ran."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import allot

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_is_one_for_vision_and_one_for_language():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["language-model", "vision"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_that_ends_in_a_value_shows_it_and_none_an_error(notebook: Path):
    for cell in code_of(notebook):
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert set(kinds) <= {"execute_result", "display_data"}
        ends_in_value = isinstance(ast.parse(source(cell)).body[-1], ast.Expr)
        assert ("execute_result" in kinds) == ends_in_value, source(cell)
    shown = json.dumps([cell["outputs"] for cell in code_of(notebook)])
    assert "/tmp" not in shown and "border-left" in shown  # a card


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib").use("Agg")
    if notebook.stem == "language-model":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(code_of(notebook)):
        exec(compile(source(cell), f"{notebook.name}:{number}", "exec"), names)
    scores = names["result"].report()["scores"]
    assert scores["sparse"] >= scores["dense"] - 0.02
    if notebook.stem == "vision":
        dense, quick = (allot.evaluate(net, names["test"]).score for net in (names["net"], names["quick"].model()))
        assert quick < allot.evaluate(names["tuned"], names["test"]).score < dense
