"""A sweep is its cells: stopped anywhere and started again it ends in the table of one that was not stopped."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import allot
from allot.errors import BudgetError, Stopped, UsageError
from allot.pruning import request
from allot.pruning import sweep as sweeping
from allot.pruning.prune import prune
from allot.pruning.settings import SearchSettings, SweepSettings
from allot.pruning.sweep import Cell, budgets_of, cells_of, options_for, sweep, with_controls
from allot.run.recipes import RECIPES
from allot.sources import zoo
from contract.cases import CASES

CASE = CASES["with batch norm"]
CELLS = cells_of(("erk", "fcpts"), ("sparsity=0.5", "sparsity=0.7"), 2)
SHORT = {"fcpts": {"steps": 6}}


def labelled() -> list[tuple[torch.Tensor, int]]:
    x = CASE.inputs(12)
    return [(x[i], i % 3) for i in range(len(x))]


def swept(out: Path, **settings: Any) -> dict[str, Any]:
    known = {"batch_size": 8, "test": labelled(), "options": SHORT, **settings}
    return sweep(CASE.make(), CASE.inputs(16), CELLS, out, **known)


@pytest.fixture
def whole(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table of a sweep that nothing stopped, and a copy of it in the folder `whole`."""
    made = tmp_path_factory.getbasetemp() / "sweeps" / "whole"
    table = swept(made)  # made once, opened again by the other tests
    shutil.copytree(made, tmp_path / "whole")
    return table


def steady(table: dict[str, Any]) -> Any:
    """Without what a clock says."""
    clocks = ("seconds", "faster")
    return [{key: value for key, value in row.items() if key not in clocks} for row in table["cells"]], table["means"]


def test_a_sweep_killed_twice_equals_one_that_was_not(whole: dict[str, Any], tmp_path: Path):
    assert len(whole["cells"]) == 8 and len(whole["means"]) == 4
    asked = 0
    for stop in (9, 40):  # in the second cell; some cells later
        calls = iter(range(10**6))
        with pytest.raises(Stopped):
            swept(tmp_path / "part", should_stop=lambda calls=calls, stop=stop: next(calls) >= stop)
        asked += len(list((tmp_path / "part").glob("*/*/*/certificate.json")))
    assert 0 < asked < 16
    again = swept(tmp_path / "part")
    assert steady(again) == steady(whole)
    for cell in CELLS:
        for name in ("model.safetensors", "model.bitmask.safetensors", "allocation.json"):
            left, right = (cell.directory(tmp_path / which) / name for which in ("whole", "part"))
            assert left.read_bytes() == right.read_bytes()
    assert (tmp_path / "part/report.html").exists()
    assert json.loads((tmp_path / "part/results.json").read_text()) == again


def test_data_that_can_be_read_once_serves_every_cell(whole: dict[str, Any], tmp_path: Path):
    once = {"batch_size": 8, "options": SHORT, "test": iter(labelled())}
    table = sweep(CASE.make(), iter(CASE.inputs(16)), CELLS, tmp_path / "once", **once)
    assert steady(table) == steady(whole)


def test_the_dense_model_is_scored_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    evaluate = sweeping.evaluate
    for module in (sweeping, request):
        monkeypatch.setattr(module, "evaluate", lambda *a, **k: (seen.append(k.get("tensors")), evaluate(*a, **k))[1])
    swept(tmp_path)
    assert sum(tensors is None for tensors in seen) == 1 and len(seen) == 1 + len(CELLS)
    first = swept(tmp_path)
    assert len(seen) == 2 + len(CELLS)  # cells that are done keep their score, where the dense one is the same
    other = swept(tmp_path, test=labelled()[:7])
    assert other["cells"][0]["score"] != first["cells"][0]["score"] and len(seen) == 3 + 2 * len(CELLS)


def test_means_and_spreads_are_those_of_the_cells(whole: dict[str, Any]):
    for mean in whole["means"]:
        own = [c["score"] for c in whole["cells"] if (c["budget"], c["method"]) == (mean["budget"], mean["method"])]
        assert mean["seeds"] == len(own) == 2 and mean["failed"] == 0
        assert mean["score"] == pytest.approx(sum(own) / 2)
        assert mean["spread"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5)


def test_options_go_to_the_methods_that_have_them(tmp_path: Path):
    assert options_for("fcpts", SHORT, {}) == SHORT and options_for("erk", SHORT, {}) == {}
    with pytest.raises(UsageError, match="nobody is no method of any cell"):
        sweep(CASE.make(), CASE.inputs(4), CELLS, tmp_path, options={"nobody": {}})
    with pytest.raises(UsageError, match="stepz"):
        sweep(CASE.make(), CASE.inputs(4), CELLS[1:2], tmp_path, options={"fcpts": {"stepz": 1}})


def test_a_cell_that_cannot_be_met_is_a_row_and_not_the_end(tmp_path: Path):
    cells = cells_of(("erk",), ("sparsity=0.5", "bytes=10"), 1)
    table = sweep(CASE.make(), CASE.inputs(16), cells, tmp_path, batch_size=8)
    assert "bytes=10 allows 10 bytes" in table["cells"][1]["error"] and table["means"][1]["failed"] == 1
    assert "erk, bytes=10, seed 0: bytes=10 allows 10 bytes" in (tmp_path / "report.html").read_text()
    with pytest.raises(UsageError, match="no cell met its budget"):
        sweep(CASE.make(), CASE.inputs(16), cells[1:], tmp_path / "none", batch_size=8)


def test_a_finished_sweep_asked_otherwise_is_refused(tmp_path: Path):
    sweep(CASE.make(), CASE.inputs(16), CELLS[:1], tmp_path, batch_size=8)
    with pytest.raises(UsageError, match="belongs to another configuration"):
        sweep(CASE.make(), CASE.inputs(16), CELLS[:1], tmp_path, batch_size=4)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["sparsity=0.5,0.8"], ["sparsity=0.5", "sparsity=0.8"]),
        (["macs=50%", "sparsity=0.9,0.9"], ["macs=50%", "sparsity=0.9"]),
        (["sparsity=0.9,0.90,90%", "sparsity=0.5"], ["sparsity=0.9", "sparsity=0.5"]),
        (["macs=50% and bytes=3MB", "bytes=3000kB and macs=0.5e2%"], ["macs=50% and bytes=3MB"]),
        (["macs=50% and bytes=3MB,bytes=1MB"], ["macs=50% and bytes=3MB", "bytes=1MB"]),
    ],
)
def test_limits_are_read_as_several_budgets(texts: list[str], wanted: list[str]):
    assert budgets_of(texts) == wanted


def test_a_limit_that_is_none_is_refused_before_anything_runs():
    with pytest.raises(BudgetError):
        budgets_of(["sparsity=0.5,1.5"])


def test_a_cell_that_is_asked_for_twice_is_one_cell(tmp_path: Path):
    cells = cells_of(("erk", "erk"), ("sparsity=0.9", "sparsity=90%"), 2)
    assert cells == [Cell("erk", "sparsity=0.9", 0), Cell("erk", "sparsity=0.9", 1)]
    table = sweep(CASE.make(), None, [*cells, Cell("erk", "sparsity=0.90", 0)], tmp_path, repair="none")
    assert [mean["seeds"] for mean in table["means"]] == [2] and len(table["cells"]) == 2


def test_a_score_that_is_no_number_is_in_no_mean():
    rows = [{"budget": "b", "method": "m", "score": score} for score in (0.5, float("nan"), 0.7)]
    (mean,) = sweeping._means(rows)
    assert mean["score"] == pytest.approx(0.6) and mean["spread"] == pytest.approx(0.02**0.5)


def test_every_cell_has_a_directory_of_its_own():
    cells = cells_of(("erk", "pot"), ("macs=50% and bytes=3MB", "macs=50%"), 3)
    assert len({cell.directory(Path("x")) for cell in cells}) == len(cells) == 12
    assert Cell("erk", "macs=50%", 0).directory(Path("x")) == Path("x/erk/macs=50%/seed-0")


def test_the_package_names_it():
    assert allot.sweep is sweep


@pytest.mark.slow
def test_a_sweep_of_a_zoo_net_killed_twice_equals_one_that_was_not(tmp_path: Path):
    cells = cells_of(("erk", "fcpts", "pot"), ("sparsity=0.5", "sparsity=0.8", "sparsity=0.9", "sparsity=0.95"), 2)
    assert len(cells) == 24
    name = "digits-resnet20"
    data, test = zoo.data(name, "calibration"), zoo.data(name, "test")
    short = {"fcpts": {"steps": 4}, "layerwise": {"steps": 2}}

    def swept(out: Path, **more: Any) -> dict[str, Any]:
        known = {"samples": 64, "batch_size": 32, "options": short, "test": test}
        return sweep(zoo.model(name), data, cells, out, **known, **more)

    for stop in (70, 300):
        calls = iter(range(10**6))
        with pytest.raises(Stopped):
            swept(tmp_path / "part", should_stop=lambda calls=calls, stop=stop: next(calls) >= stop)
    again, whole = swept(tmp_path / "part"), swept(tmp_path / "whole")
    assert steady(again) == steady(whole)
    for cell in cells:
        left, right = (cell.directory(tmp_path / which) / "model.safetensors" for which in ("whole", "part"))
        assert left.read_bytes() == right.read_bytes()


def test_a_control_is_the_same_chain_with_uniform_densities(tmp_path: Path):
    cells = with_controls(cells_of(("erk", "fcpts", "lamp"), ("sparsity=0.5",), 1))
    assert [cell.name for cell in cells] == ["erk", "uniform+erk", "fcpts", "uniform+fcpts", "lamp"]
    assert with_controls(cells) == cells  # a control has no control of its own
    assert [cell.name for cell in with_controls(cells_of(("erk", "uniform"), ("sparsity=0.5",), 1))] == [
        "erk", "uniform",
    ]  # fmt: skip
    assert len(with_controls(cells_of(("erk", "fcpts"), ("sparsity=0.5",), 1), repair="none")) == 3
    assert len(with_controls(cells_of(("erk",), ("sparsity=0.5",), 1), allocate="uniform")) == 1
    told: list[str] = []
    settings = {"batch_size": 8, "options": SHORT, "batch_norm": "batch"}
    table = sweep(
        CASE.make(), CASE.inputs(16), cells[:4], tmp_path, on_cell=lambda number, of, cell: told.append(str(cell)),
        **settings,
    )  # fmt: skip
    assert told == [f"{cell.name}, sparsity=0.5, seed 0" for cell in cells[:4]]
    for row, cell in zip(table["cells"], cells[:4], strict=True):
        report = json.loads((tmp_path / row["run"] / "report.json").read_text())
        assert row["method"] == cell.name and report["allocate"] == (cell.allocate or cell.method)
        assert report["repair"] == list(RECIPES[cell.method].repair)


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        (SearchSettings, {"test", "max_drop"}),
        (SweepSettings, {"method", "seed"}),
    ],
)
def test_settings_are_the_other_arguments_of_prune(settings: type, own: set[str]):
    of_prune = inspect.signature(prune).parameters
    named = {name: p.annotation for name, p in of_prune.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    handed_on = named.keys() - own - {"save_to", "dense_score"}
    hints, of_all = get_type_hints(settings), get_type_hints(prune)
    assert hints == {name: of_all[name] for name in handed_on}


def test_a_misspelt_setting_is_an_error_with_the_nearest_name(tmp_path: Path):
    with pytest.raises(UsageError, match=r"unknown setting 'sampels': did you mean 'samples'"):
        sweep(CASE.make(), CASE.inputs(16), CELLS, tmp_path / "sweep", sampels=8)  # type: ignore[call-arg]
