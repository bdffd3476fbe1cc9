"""Names and files of a recipe, checked before torch is imported: a misspelt word is an error within a second."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from allot.cli.recipe import RecipeFile
from allot.errors import unknown
from allot.run.recipes import RECIPES
from allot.sources.names import check_data, check_model, zoo_models


def check_names(wanted: RecipeFile) -> None:
    """Raises:
    UsageError: a method, a part of one, a net or data of the zoo, or a file that does not exist.
    """
    if "torch" in sys.modules:  # whatever is wrong is found without a wait
        return
    if wanted.model is not None:
        check_model(wanted.model, wanted.weights)
    for data in (wanted.data, wanted.test):
        if data is not None:
            check_data(data)
    allocators, repairs, scores = allocator_names(), repair_names(), score_names()
    if wanted.method is not None and wanted.method not in (*RECIPES, *allocators, *repairs):
        raise unknown("method", wanted.method, RECIPES)
    part = wanted.allocate
    if part is not None and part not in (*RECIPES, *allocators) and not (part.endswith(".json") or Path(part).is_dir()):
        raise unknown("allocator", part, allocators)
    if wanted.score is not None and wanted.score not in scores:
        raise unknown("score", wanted.score, scores)
    for repair in () if wanted.repair in (None, "", "none") else str(wanted.repair).split(","):
        if repair.strip() not in repairs:
            raise unknown("repair", repair.strip(), repairs)


def method_names() -> list[str]:
    """Values of --method, for the shell to complete."""
    return list(RECIPES)


def allocator_names() -> list[str]:
    """Values of --allocate."""
    return _keys("methods/__init__.py", "ALLOCATORS")


def repair_names() -> list[str]:
    """Values of --repair."""
    return _keys("methods/__init__.py", "REPAIRS")


def score_names() -> list[str]:
    """Values of --score, of weights and of channels."""
    return sorted({*_keys("run/scores.py", "SCORES"), *_keys("run/scores.py", "CHANNEL_SCORES")})


def models() -> list[str]:
    """Values of MODEL that need no download."""
    return [f"zoo:{name}" for name in zoo_models()]


def _keys(file: str, table: str) -> list[str]:
    """The keys of a dict that a file of this package writes out: importing the file would import torch."""
    for node in ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table:
            assert isinstance(node.value, ast.Dict)
            return [str(ast.literal_eval(key)) for key in node.value.keys if key is not None]
    raise LookupError(f"{file} has no table {table}")
