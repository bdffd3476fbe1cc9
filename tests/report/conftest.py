from __future__ import annotations

from pathlib import Path

import pytest

import allot
from contract.cases import CASES


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run on single weights that learned its densities, one on channels, one that learned nothing."""
    where = tmp_path_factory.mktemp("runs")
    case = CASES["with batch norm"]
    short = {"fcpts": {"steps": 8}, "dsa": {"steps": 6}, "distill": {"steps": 4}}
    for name, budget in (("fcpts", "sparsity=0.7"), ("dsa", "macs=50%"), ("erk", "sparsity=0.7")):
        known = {key: value for key, value in short.items() if key == name or (name == "dsa" and key == "distill")}
        allot.prune(
            case.make(), case.inputs(16), budget, method=name, options=known, label=f"<{name}> & co",
            save_to=where / name, batch_size=8, batch_norm="batch",
        )  # fmt: skip
    return {name: where / name for name in ("fcpts", "dsa", "erk")}
