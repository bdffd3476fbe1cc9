"""Never run on ImageNet. Cells of a table: each a run that goes on where it stopped, what it gave kept in results.json.

OUT/NET/BUDGET/CHAIN/seed-N are ordinary run directories of `allot.prune`. A cell in results.json is not run again; one
that was begun with other settings is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import allot
from allot.errors import BudgetError, Stopped, UsageError
from allot.network.trees import flatten_keys
from allot.run.evaluate import Score
from allot.run.problem import Chain, Method
from allot.run.store import write
from allot.sources.load import ModelSource, load_data
from benchmarks.imagenet import recipes
from benchmarks.imagenet.epochs import TRAINING, Epochs, Judge
from benchmarks.imagenet.pictures import Augmented, load_net
from benchmarks.imagenet.recipes import Cell, Small, Table


@dataclass(frozen=True)
class Setting:
    """What a run of a table is given beside the table.

    Attributes:
        train, val: folders of pictures, one sub-folder a class.
        out: where runs and results.json live.
        weights: see `load_net`.
        device: where nets live.
        workers: threads that read pictures.
        every: epochs from score to score.
        small: what a try changes.
    """

    train: Path
    val: Path
    out: Path
    weights: str | None = None
    device: str = "cpu"
    workers: int = 0
    every: int = 1
    small: Small = field(default_factory=Small)

    @property
    def results(self) -> Path:
        """The file of what was measured."""
        return self.out / "results.json"


@dataclass(frozen=True)
class Bench:
    """A net on its device, with its pictures and its dense score."""

    source: ModelSource
    train: Any
    val: Any
    dense: Score

    @property
    def model(self) -> nn.Module:
        """The dense net."""
        return self.source.model


def run(
    table: Table,
    cells: Sequence[Cell],
    setting: Setting,
    *,
    should_stop: Callable[[], bool] | None = None,
    on_cell: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure what is missing; what results.json holds then.

    Args:
        on_cell: called with that after every cell.
    Raises:
        UsageError: data or weights that cannot be had, or cells of other settings.
        Stopped: `should_stop` said so, or was about to; the same call goes on.
    """
    found = read(setting)
    if not setting.results.exists():
        setting.out.mkdir(parents=True, exist_ok=True)
    asked = {cell: _asked(table, cell, setting) for cell in cells}
    for cell in cells:
        _refuse_other(found["cells"].get(cell.key, {}), asked[cell], cell.key, setting)
    bench: tuple[str, Bench] | None = None
    for i, cell in enumerate(cells, 1):
        if "score" in found["cells"].get(cell.key, {}):
            continue
        if should_stop and should_stop():
            raise Stopped(f"stopped before cell {i} of {len(cells)}")
        logging.info("%d of %d: %s", i, len(cells), cell.key)
        if bench is None or bench[0] != cell.net:
            bench = cell.net, _bench(table, cell.net, setting, found)
        try:
            told = _measure(table, cell, setting, bench[1], should_stop)
        except BudgetError as error:
            told = {"error": str(error)}
            logging.warning("  %s", error)
        found["cells"][cell.key] = {**vars(cell), "asked": asked[cell], **told}
        write(setting.results, json.dumps(found, indent=1) + "\n")
        if on_cell:
            on_cell(found)
    return found


def read(setting: Setting) -> dict[str, Any]:
    """What was measured so far.

    Raises:
        UsageError: the file cannot be read.
    """
    if not setting.results.exists():
        return {"dense": {}, "cells": {}}
    try:
        return json.loads(setting.results.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{setting.results} cannot be read ({error}): delete it, finished runs are opened.") from error


def _asked(table: Table, cell: Cell, setting: Setting) -> dict[str, Any]:
    """Everything that decides what a cell measures, JSON-ready."""
    said = recipes.recipe(table, cell, setting.small).model_dump(mode="json", exclude_defaults=True)
    weights = table.nets[cell.net].weights if setting.weights is None else setting.weights
    decided = {"recipe": said, "augment": table.augment, "weights": weights, "every": setting.every}
    return json.loads(json.dumps(decided))


def _refuse_other(before: Mapping[str, Any], asked: Mapping[str, Any], key: str, setting: Setting) -> None:
    if "asked" not in before or before["asked"] == asked:
        return
    was, now = flatten_keys(before["asked"]), flatten_keys(asked)
    differing = next(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
    raise UsageError(
        f"{setting.results}: {key!r} was measured with {differing}={was.get(differing)}, asked is "
        f"{now.get(differing)}: choose another --out, or delete it there, and its run."
    )


def _bench(table: Table, name: str, setting: Setting, found: dict[str, Any]) -> Bench:
    """The net and its pictures; its dense score from the results, where it stands there."""
    net = table.nets[name]
    size = recipes.size_of(net, setting.small)
    asked = {"weights": net.weights if setting.weights is None else setting.weights, "size": size}
    _refuse_other(found["dense"].get(name, {}), asked, f"{name}, dense", setting)
    source = load_net(name, net, setting.weights, size)
    source.model.to(torch.device(setting.device))
    train, val = (load_data(f"folder:{folder}", source) for folder in (setting.train, setting.val))
    known = found["dense"].get(name)
    if known is None:
        score = allot.evaluate(source.model, val, workers=setting.workers)
        kept = {key: getattr(score, key) for key in ("metric", "score", "samples", "nll", "unreadable")}
        known = found["dense"][name] = {**kept, "classes": len(val.classes), "asked": asked}
        write(setting.results, json.dumps(found, indent=1) + "\n")
    elif known["samples"] != len(val):
        raise UsageError(
            f"{setting.results}: {name} was scored on {known['samples']} pictures, {setting.val} has {len(val)}: "
            "choose another --out."
        )
    return Bench(
        source, train, val, Score(*(known[key] for key in ("metric", "score", "samples", "nll", "unreadable")))
    )


def _measure(
    table: Table, cell: Cell, setting: Setting, bench: Bench, should_stop: Callable[[], bool] | None
) -> dict[str, Any]:
    said = recipes.recipe(table, cell, setting.small)
    parts = _watched(recipes.parts(table, cell, setting.small), table, setting, bench)
    directory = cell.directory(setting.out)
    directory.parent.mkdir(parents=True, exist_ok=True)
    result = allot.prune(
        bench.model,
        bench.train,
        allot.Budget.parse(*said.budget),
        method=said.method,
        allocate=parts.allocate,
        score=parts.score,
        pattern=parts.pattern,
        repair=parts.repair,
        seed=said.seed,
        samples=said.samples,
        batch_size=said.batch_size,
        workers=setting.workers,
        example=bench.source.example,
        test=bench.val,
        dense_score=bench.dense,
        label=cell.net,
        save_to=directory,
        recipe={"model": said.model, "options": said.options, "augment": table.augment},
        should_stop=should_stop,
    )
    report = result.report()
    epochs = report["diagnostics"].get("epochs", [])
    scoring = sum(epoch["seconds"] for epoch in epochs)
    return {
        "score": report["scores"]["sparse"],
        "nll": report["scores"]["nll"]["sparse"],
        "kept": report["kept"],
        "total": report["total"],
        "macs": report["macs"],
        "images": report["images"],
        "seconds": sum(report["seconds"].values()) - scoring,
        "scoring_seconds": scoring,
        "device": torch.cuda.get_device_name() if setting.device.startswith("cuda") else "CPU",
        "epochs": epochs,
    }


def _watched(parts: Chain, table: Table, setting: Setting, bench: Bench) -> Chain:
    """The parts, those that train weights scored after every epoch, on random crops where the table says so."""
    judge = Judge(bench.val, setting.workers)
    size = bench.source.example.shape[-1]
    crops = Augmented(bench.train, size, bench.source.normalise) if table.augment else None

    def watched(part: Method, name: str) -> Method:
        return Epochs(part, name, judge, crops, setting.every) if isinstance(part, TRAINING) else part

    repair = tuple(watched(part, name) for part, name in zip(parts.repair, parts.names.repair, strict=True))
    return replace(parts, allocate=watched(parts.allocate, parts.names.allocate), repair=repair)
