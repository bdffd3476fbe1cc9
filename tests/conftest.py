"""The ground every test stands on: a home of its own, one torch thread, no network, shapes checked."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

import shapes
import vision

ROOT = Path(__file__).resolve().parent.parent
_home: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Sets the scene before torch and allot are imported; the workers of xdist inherit the environment."""
    global _home
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _home = Path(tempfile.mkdtemp(prefix="allot-test-home-"))
        os.environ |= {
            "HOME": str(_home),  # several packages write there when imported
            "XDG_CACHE_HOME": str(_home / "cache"),
            "XDG_CONFIG_HOME": str(_home / "config"),
            "MPLCONFIGDIR": str(_home / "matplotlib"),
            "TORCH_HOME": str(_home / "torch"),
            "HF_HOME": str(_home / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # one thread a worker, and idle threads sleep: spinning ones halve the speed
            "OMP_WAIT_POLICY": "passive",
        }
    shapes.check_shapes_of(ROOT / "src")
    vision.declare_operators_when_needed()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _home is not None:
        shutil.rmtree(_home, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to share out
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests are shared out in two halves, and a worker that is done takes from the other one's end.

    Shared out in small parts, the documents, which come last and are long, all went to one worker.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


CLOCKS = {
    "pruning.advise": "timed",
    "export.timing.latency": "timed",
    "export.export": "side_by_side",
    "export.timing.sparse_layers": "side_by_side",
}


@pytest.fixture(autouse=True)
def three_rounds_of_every_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets are timed in three rounds and not for two seconds: what a fast test claims holds for any time."""
    if request.node.get_closest_marker("slow") or request.node.get_closest_marker("gpu"):
        return
    clock = importlib.import_module("allot.export.timing.clock")
    for name, what in CLOCKS.items():
        module, real = importlib.import_module(f"allot.{name}"), getattr(clock, what)
        monkeypatch.setattr(module, what, lambda *runs, real=real, **settings: real(*runs, seconds=0, least=3))


@pytest.fixture(autouse=True)
def few_pictures_of_the_zoo_to_score_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """See pictures.py; a test of the whole scores is slow."""
    if request.node.get_closest_marker("slow") or request.node.get_closest_marker("gpu"):
        return
    pictures = importlib.import_module("pictures")
    monkeypatch.setattr(pictures.load, "_open_data", pictures.few_of_the_zoo())
