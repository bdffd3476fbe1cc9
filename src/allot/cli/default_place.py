"""The run directory of a command that names none: `runs/MODEL-METHOD-BUDGET`."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from allot.cli.recipe import RecipeFile
from allot.pruning.request import default_method
from allot.run.places import check_run_place

RUNS = Path("runs")


def default_place(wanted: RecipeFile, model: nn.Module, calibration: Any) -> Path:
    """The directory of a run with these settings: a new one, or the one that such a run began or finished.

    A directory of a run with other settings, or of other files, is left alone: -2, -3, ... follow the name.

    Raises:
        CannotWrite: no directory can be made here.
    """
    parts = (wanted.allocate, wanted.score, wanted.pattern, wanted.repair, wanted.stream)
    method = wanted.allocate or wanted.method or default_method(model, calibration, *parts)
    name = "-".join(map(_plain, (_model_name(wanted.required_model()), method, *wanted.budget)))
    request = wanted.model_dump(mode="json", exclude_none=True)
    places = itertools.chain([RUNS / name], (RUNS / f"{name}-{number}" for number in itertools.count(2)))
    return check_run_place(next(path for path in places if not path.exists() or _request_of(path) == request))


def _model_name(spec: str) -> str:
    """What a model is called: of an origin its name, of code its file or module and its factory.

    >>> _model_name("zoo:digits-resnet20"), _model_name("nets/small.py:make"), _model_name("hf:org/tiny")
    ('digits-resnet20', 'small-make', 'tiny')
    """
    where, _, name = spec.rpartition(":")
    if where.endswith(".py"):
        return f"{Path(where).stem}-{name}"
    if "." in where:
        return f"{where.rpartition('.')[2]}-{name}"
    return Path(name).name


def _plain(text: str) -> str:
    """A text as part of a name that no shell takes apart.

    >>> _plain("macs=50%,bytes=3MB"), _plain("0.9")
    ('macs-50pct-bytes-3MB', '0.9')
    """
    return re.sub(r"[^\w.]+", "-", text.replace("%", "pct")).strip("-")


def _request_of(path: Path) -> Any:
    """What a run was requested with; None where the directory holds no run."""
    try:
        return json.loads((path / "run.json").read_text(encoding="utf-8"))["requested"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
