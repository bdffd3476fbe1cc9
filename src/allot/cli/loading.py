"""What a recipe names, loaded: the model, its data, and the arguments that `prune` and `sweep` share."""

from __future__ import annotations

from typing import Any

from allot.cli.recipe import RecipeFile
from allot.run.activity import activity
from allot.sources.load import load_data, load_model
from allot.sources.origins import ModelSource

_SAME = (  # keys of a recipe that are arguments of `prune` under the same name
    "allocate", "score", "pattern", "repair", "options", "samples", "batch_size", "workers", "runtime", "max_minutes",
    "max_steps", "stream", "compute", "max_memory", "outputs", "loss", "batch_norm", "views", "metric",
)  # fmt: skip


def load_inputs(wanted: RecipeFile) -> tuple[ModelSource, Any]:
    """The model on its device, and the calibration data; None where none was given."""
    with activity("loading model"):
        source = load_model(wanted.required_model(), weights=wanted.weights, shape=wanted.input, device=wanted.device)
    if wanted.data is None:
        return source, None
    with activity("opening data"):
        return source, load_data(wanted.data, source, skip_corrupt=wanted.skip_corrupt)


def prune_arguments(wanted: RecipeFile, source: ModelSource) -> dict[str, Any]:
    """The arguments that `prune` and `sweep` take from a recipe alike."""
    test = None
    if wanted.test:
        test = load_data(wanted.test, source, split="test", skip_corrupt=wanted.skip_corrupt)
    elif wanted.data and wanted.data.startswith("zoo:"):
        test = load_data(wanted.data, source, split="test")
    arguments = {key: getattr(wanted, key) for key in _SAME}
    return arguments | {
        "progress": False,
        "rules": wanted.rules(),
        "example": source.example,
        "test": test,
        "label": wanted.model,
    }
