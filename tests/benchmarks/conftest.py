"""Cells of benchmarks, run in the process of the test."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import apart


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells run here, not in processes of their own; the keys of those that ran."""
    ran = []

    def run(command, **options):
        module, asked = importlib.import_module(command[2]), json.loads(command[4])
        ran.append(Path(asked["scratch"]).name)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = apart.answer(module.measure, command[4])
        return SimpleNamespace(returncode=code, stdout=f"a line of a library\n{printed.getvalue()}")

    monkeypatch.setattr(apart.subprocess, "run", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return ran
