"""Every test of models and data by name runs in a directory of its own."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(autouse=True)
def few_pictures_of_the_zoo_to_score_on():
    """Not here, where the splits themselves are looked at."""
