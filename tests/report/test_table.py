"""Reports as tables: everything that was decided can be read, at any width."""

import copy
import io
import json

import pytest
from rich.console import Console
from torch import nn

import allot
from allot.report import table
from allot.report.folding import folded


def printed(renderable, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def report():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    return allot.prune(net, None, "sparsity=0.75", method="erk", repair="none").report()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_layer_stands_on_a_line_of_its_own_with_what_it_keeps(report, width):
    lines = printed(table.run_table(report), width).splitlines()
    for layer in report["layers"]:
        line = next(line for line in lines if layer["name"] in line)
        assert f"{layer['kept']:,}" in line and f"{layer['density']:.3f}" in line


def row(name: str, kept: int = 5, total: int = 9, macs: int | None = 18) -> dict[str, object]:
    return {"name": name, "kept": kept, "total": total, "density": kept / total, "macs": macs}


def names(layers):
    return [(name, len(alike)) for name, alike in folded(layers)]


def test_layers_alike_but_for_a_number_share_a_row_from_three_on():
    two = [row("h.0.up"), row("h.1.up")]
    assert names(two) == [("h.0.up", 1), ("h.1.up", 1)]
    assert names([*two, row("h.2.up", kept=6)]) == [("h.*.up", 3)]  # whole numbers part by one
    assert names([*two, row("h.2.up", kept=7)]) == [("h.0.up", 1), ("h.1.up", 1), ("h.2.up", 1)]
    assert names([*two, row("h.2.up", total=12)]) == [("h.0.up", 1), ("h.1.up", 1), ("h.2.up", 1)]
    assert names([*two, row("h.2.up", macs=36)]) == [("h.0.up", 1), ("h.1.up", 1), ("h.2.up", 1)]


def test_a_row_names_the_blocks_that_it_holds_and_stands_where_the_first_did():
    layers = [row(f"h.{i}.{part}", kept=9 if i == 3 else 5) for i in range(6) for part in ("up", "down")]
    assert names(layers) == [("h.0-2,4-5.up", 5), ("h.0-2,4-5.down", 5), ("h.3.up", 1), ("h.3.down", 1)]


def test_experts_fold_within_their_blocks():
    layers = [row(f"h.{i}.experts.{j}.up") for i in range(4) for j in range(8)]
    assert names(layers) == [("h.*.experts.*.up", 32)]
    odd = [row(f"h.{i}.experts.{j}.up", kept=9 if (i, j) == (1, 3) else 5) for i in range(3) for j in range(4)]
    assert names(odd) == [("h.0-2.experts.0-2.up", 9), *((f"h.{i}.experts.3.up", 1) for i in range(3))]


def test_the_figures_of_a_row_are_sums():
    layers = [row(f"h.{i}.up", kept=5000 + (i == 1), total=9000, macs=18000) for i in range(3)]
    line = next(line for line in printed(table.layer_table(layers), 100).splitlines() if "h.*.up x3" in line)
    assert "15,001" in line and "27,000" in line and "0.556" in line and "30,002" in line
    unknown = [row(f"h.{i}.up", macs=None) for i in range(3)]
    assert "not counted" in printed(table.layer_table(unknown), 100)


def test_the_budget_row_says_met_or_missed(report):
    assert "met" in printed(table.run_table(report))
    missed = copy.deepcopy(report)
    missed["budget"][0]["met"] = False
    assert "MISSED" in printed(table.run_table(missed))


def test_what_stays_dense_is_counted_by_reason(report):
    text = printed(table.run_table(report))
    assert "3 x bias" in text and "normalisation (LayerNorm)" in text


def test_macs_that_were_not_counted_are_called_so(report):
    assert report["macs"] is None
    assert "not counted" in printed(table.run_table(report))


def test_brackets_in_layer_names_are_not_taken_for_markup(report):
    odd = copy.deepcopy(report)
    odd["layers"][0]["name"] = "blocks[red].weight"
    assert "blocks[red].weight" in printed(table.run_table(odd))


def test_brackets_anywhere_are_not_taken_for_markup(report):
    odd = "x[/red][bold]y[/]"
    told = {**report, "model": odd, "method": odd, "repair": [odd], "pattern": odd, "score": odd, "skipped": {"a": odd}}
    told["budget"] = [{**report["budget"][0], "kind": odd, "asked": odd}]
    told["scores"] = {"metric": odd, "dense": 0.9, "sparse": 0.8}
    export = {"bytes": 1, "dense_bytes": 2, "with_ideal_mask": 1, "milliseconds": {"sparse": 1.0, "dense": 1.0}}
    told["exports"] = [{**export, "form": odd, "verdict": "faster", "faster": 1.5, "spread": (1.0, 2.0)}]
    measured = {"dense_ms": 2.0, "sparse_ms": 1.0, "limit_ms": 1.0, "batch": 1, "runtime": odd}
    assert printed(table.run_table({**told, "latency": measured}), 300).count(odd) == 11
    assert printed(table.comparison_table([(odd, told)]), 300).count(odd) == 4
    means = {"means": [{"budget": odd, "method": odd, "score": 0.5, "spread": None, "failed": 0}]}
    assert printed(table.sweep_table(means), 300).count(odd) == 2
    row = {"file": odd, "check": odd, "promised": odd, "found": odd, "passed": True}
    assert printed(table.certificate_table([row]), 300).count(odd) == 4


def test_a_form_that_computes_as_dense_has_its_size_and_no_times(report):
    row = {
        "form": "bitmask", "file": "small", "bytes": 123, "dense_bytes": 456, "with_ideal_mask": 100, "error": 0.0,
        "params": 7, "dense_params": 7, "macs": 9, "dense_macs": 9, "milliseconds": None, "faster": None,
        "spread": None,
        "verdict": "computes as dense", "note": "",
    }  # fmt: skip
    told = {**report, "exports": [row]}
    for drawn in (table.export_table(row), table.run_table(told), table.comparison_table([("a", told)])):
        text = printed(drawn, 200)
        assert "as dense" in text and "here" not in text and "None" not in text
    assert "123" in printed(table.export_table(row)) and "456" in printed(table.run_table(told))


def test_runs_side_by_side_show_what_sets_them_apart(report):
    other = copy.deepcopy(report)
    other.update(method="lamp", scores={"metric": "top1", "dense": 0.9, "sparse": 0.8})
    text = printed(table.comparison_table([("a", report), ("b", other)]), 120)
    assert "erk" in text and "lamp" in text and "not scored" in text and "0.8000" in text


def test_runs_side_by_side_fit_80_columns_and_say_once_what_they_have_in_common(report):
    other = {**copy.deepcopy(report), "method": "lamp", "repair": ["bn"]}
    text = printed(table.comparison_table([("runs/six/erk/a", report), ("runs/six/lamp/b", other)]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and f"runs of {report['model']}, in runs/six" in text
    assert text.count(report["model"]) == 1 and any(line.split()[:2] == ["lamp/b", "lamp"] for line in lines), text
    assert "not measured" in text  # the last column is whole
    other["repair"] = ["bn", "distill"]
    assert "lamp + bn" in printed(table.comparison_table([("a", report), ("b", other)]), 120)


def test_a_failed_check_stands_out():
    rows = [{"file": "f", "check": "sha256", "promised": "a" * 64, "found": "b" * 64, "passed": False}]
    text = printed(table.certificate_table(rows))
    assert "FAIL" in text and "aaaaaaaaaaaa…" in text


def test_checks_are_counted_by_file_and_those_that_failed_stand_in_full():
    def row(file: str, check: str, *, passed: bool = True):
        return {"file": file, "check": check, "promised": "wanted", "found": "seen", "passed": passed}

    rows = [row("a", "sha256"), row("a.probe.safetensors", "of this run"), row("b", "sha256"), row("a", "sha256")]
    lines = printed(table.verified_table(rows)).splitlines()
    assert any(line.split() == ["a", "sha256,", "of", "this", "run", "3", "of", "3"] for line in lines), lines
    assert any(line.split() == ["b", "sha256", "1", "of", "1"] for line in lines) and "wanted" not in "".join(lines)
    text = printed(table.verified_table([*rows, row("b", "zeros", passed=False)]))
    assert "1 of 2" in text and text.count("FAIL") == text.count("wanted") == 1


def test_a_report_is_json(report):
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (True, "True"),
        ("f" * 64, "ffffffffffff…"),
        (["weights", "zeros"], "weights, zeros"),
        ([], "none"),
        ({"dense": 1107816, "file": 91581}, "dense 1,107,816, file 91,581"),
    ],
)
def test_what_a_check_found_is_read_without_brackets(value: object, text: str):
    assert table.check_text(value) == text
