"""report.html stands alone: it says what report.json says, at any width, with no network and no script needed."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import allot
from allot.errors import UsageError
from allot.export.certificate.certificate import verify
from allot.report.comparison import comparison_page
from allot.report.headline import headline
from allot.report.page import run_page, write_run
from contract.cases import CASES
from report.pages import SCORES, Seen, browsed, in_a_browser, report, sheets


@pytest.mark.parametrize("name", ["fcpts", "dsa", "erk"])
def test_a_page_says_what_was_promised_kept_and_how_to_repeat_it(runs: dict[str, Path], name: str):
    told, page = report(runs[name]), (runs[name] / "report.html").read_text()
    seen = Seen(page)
    assert not seen.open and f"<{name}> & co: {name}" in seen.text  # names are text, not tags
    assert f"{told['kept']:,} of {told['total']:,}" in seen.text and f"{told['bytes']['file']:,}" in seen.text
    assert f"promised: {told['budget'][0]['kind']}={told['budget'][0]['asked']}" in seen.text
    for row in told["groups"] or told["layers"]:
        assert row["name"] in seen.text and f"{row['density']:.3f}" in seen.text
    assert "checks of the re-opened files passed" in seen.text and "not measured" in seen.text
    assert ("recipe.yaml" in seen.text) and f"seed: {told['seed']}" in seen.text
    charts = page.count("<svg")
    assert charts >= 2 if name == "erk" else charts >= 4  # histograms; densities, budget and losses as well


@pytest.mark.parametrize("name", ["fcpts", "dsa"])
def test_a_page_needs_no_network(runs: dict[str, Path], name: str):
    page = (runs[name] / "report.html").read_text()
    pages = [page, comparison_page([(key, report(run)) for key, run in runs.items()])]
    for text in pages:
        assert not re.search(r"(https?:)?//[\w-]+\.\w", re.sub(r"\s//.*", "", text))
        assert not {"img", "iframe", "object", "video"} & set(Seen(text).tags)
        assert "default-src 'none'" in text and not re.search(r"<script[^>]+src|@import|url\(", text)


EXPORT = {"form": "onnx", "bytes": 10, "dense_bytes": 20, "with_ideal_mask": 8, "error": 0.0, "note": ""}
FAST = {"milliseconds": {"dense": 3.0, "sparse": 2.0}, "faster": 1.5, "spread": [1.4, 1.6], "verdict": "faster"}
SAME = {"milliseconds": {"dense": 2.5, "sparse": 2.5}, "faster": 1.0, "spread": [0.9, 1.1], "verdict": "no faster"}
SLOW = EXPORT | {"form": "program"} | SAME
AS_DENSE = {"milliseconds": None, "faster": None, "spread": None, "verdict": "computes as dense"}
FILE = EXPORT | {"form": "bitmask"} | AS_DENSE


@pytest.mark.parametrize(
    ("exports", "sentence", "cell"),
    [
        ([], "it was not timed: a smaller file is no faster by itself.", ""),
        ([EXPORT | FAST], "measured to be faster here: 1.50x (onnx).", "1.50x (onnx)"),
        ([SLOW], "measured to be no faster here: 1.00x (program).", "1.00x (program)"),
        (
            [SLOW, EXPORT | FAST],
            "measured to be faster here: 1.25x (onnx; dense as program).",
            "1.25x (onnx; dense as program)",
        ),
        ([FILE], "it computes as dense: a smaller file is no faster by itself.", "computes as dense"),
        ([FILE, EXPORT | FAST], "measured to be faster here: 1.50x (onnx).", "1.50x (onnx)"),
    ],
)
def test_a_page_says_first_what_it_came_to(runs: dict[str, Path], exports: Any, sentence: str, cell: str):
    told = {**report(runs["erk"]), "exports": exports}
    told["scores"] = {"metric": "top1", "dense": 0.9, "sparse": 0.85, "samples": 10}
    lead = Seen(run_page(told, {"rows": [], "passed": True}, "", [])).text
    share = 100 * told["bytes"]["file"] / told["bytes"]["dense"]
    assert headline(told).replace("->", "\u2192") in lead and sentence in lead
    assert f"{100 * (1 - told['kept'] / told['total']):.1f} %" in lead and f"{share:.1f} % of dense" in lead
    assert "90.0 \u2192 85.0 on held-out data, 5.0 points lost" in lead
    assert cell in comparison_page([("a", told), ("b", told)])
    assert all(f">{row['bytes'] / row['with_ideal_mask']:.2f}x<" in run_page(told, {}, "", []) for row in exports)


@pytest.mark.parametrize(
    ("exports", "lead", "word"),
    [
        ([], "none was timed", "not measured"),
        ([FILE], "computes as dense: a smaller file is no faster by itself", "computes as dense"),
        ([SLOW], "as measured here, none is faster than the dense model", "no faster"),
        ([EXPORT | FAST], "the fastest as measured is erk", "faster"),
    ],
)
def test_nothing_is_called_fastest_that_is_no_faster(runs: dict[str, Path], exports: Any, lead: str, word: str):
    told = {**report(runs["erk"]), "exports": exports}
    seen = Seen(comparison_page([("a", told), ("b", {**told, "seed": 1})]))
    assert lead in seen.text and word in seen.text


def test_a_page_of_a_report_with_nothing_to_show_is_a_page(runs: dict[str, Path]):
    told = {**report(runs["erk"]), "macs": None, "scores": None, "histograms": {}, "skipped": {}}
    seen = Seen(
        run_page(
            {**told, "bytes": {"dense": None, "file": None, "with_ideal_mask": None}},
            {"rows": [], "passed": True},
            "",
            [],
        )
    )
    assert not seen.open and "give --test DATA" in seen.text
    assert not Seen(comparison_page([("a", told), ("b", told)])).open


DENSE = {"rows": [], "passed": True}


@pytest.mark.parametrize("name", ["fcpts", "dsa", "erk"])
def test_a_page_names_the_layers_that_keep_most_and_least(runs: dict[str, Path], name: str):
    told = report(runs[name])
    rows = told["groups"] or told["layers"]
    kept = {row["name"]: row["density"] for row in rows}
    seen = Seen((runs[name] / "report.html").read_text())
    what = "group" if told["groups"] else "layer"
    for word, of in (("most", max), ("least", min)):
        found = re.search(rf"{what} that keeps {word}: (.*?), ([\d.]+) %\n", seen.marked["glance"])
        assert kept[found[1]] == of(kept.values()) and found[2] == f"{100 * of(kept.values()):.1f}"


def test_a_page_says_what_one_more_costs_and_in_what(runs: dict[str, Path], tmp_path: Path):
    seen = Seen((runs["erk"] / "report.html").read_text())
    assert "One weight more would cost the same everywhere (1 weight)" in seen.text
    assert "for one weight more" not in seen.text
    case = CASES["with batch norm"]
    allot.prune(case.make(), case.inputs(4), "macs=50%", method="erk", repair="none", save_to=tmp_path / "run")
    told, seen = report(tmp_path / "run"), Seen((tmp_path / "run/report.html").read_text())
    heads, *rows = seen.table("MACs for one weight more")
    at, left = heads.index("MACs for one weight more"), heads.index("MACs left")
    assert told["priced"] == "macs" and len(rows) == len(told["layers"])
    for row, layer in zip(rows, told["layers"], strict=True):
        assert float(row[at].replace(",", "")) == pytest.approx(layer["macs"] / layer["total"], rel=0.01)
        assert row[left] == f"{round(layer['macs'] * layer['kept'] / layer['total']):,}"
    cheap, dear = (of(told["layers"], key=lambda row: (row["price"], row["name"])) for of in (min, max))
    assert re.search(
        f"MACs? in {cheap['name']}, the cheapest, and [\\d,.]+ MACs in {dear['name']}, the dearest", seen.text
    )


def test_what_is_priced_is_the_limit_that_is_nearest_to_being_used_up(tmp_path: Path):
    case = CASES["with batch norm"]
    result = allot.prune(case.make(), case.inputs(4), "params=90%,macs=30%", method="erk", repair="none")
    assert result.report()["priced"] == "macs"
    assert allot.prune(case.make(), None, "bytes=90%", method="erk", repair="none").report()["priced"] == "bytes"


def test_gains_are_shares_of_the_largest(runs: dict[str, Path]):
    told, seen = report(runs["fcpts"]), Seen((runs["fcpts"] / "report.html").read_text())
    heads, *rows = seen.table("gain, 1: largest")
    for heading, key, scale in (
        ("gain, 1: largest", "gain", lambda values: max(map(abs, values))),
        ("sensitivity, 1: middle", "sensitivity", lambda values: sorted(values)[len(values) // 2]),
    ):
        values = told["diagnostics"]["fcpts"][key]
        assert len(values) % 2  # the middle one is there
        for row in rows:
            shown = float(row[heads.index(heading)])
            assert shown == pytest.approx(values[row[0]] / scale(list(values.values())), rel=0.06, abs=1e-9)
    assert "Learn how much each layer keeps while the weights are distilled" in seen.text
    assert "gain" not in Seen((runs["erk"] / "report.html").read_text()).text.lower()


def test_how_an_allocator_decides_is_said_by_itself(runs: dict[str, Path]):
    assert report(runs["erk"])["how"].startswith("Density in proportion to sum(shape)")
    assert report(runs["dsa"])["how"].startswith("Learn how many channels each group keeps")
    case = CASES["with batch norm"]
    given = {layer.name: 0.5 for layer in allot.Scope.of(case.make())}
    own = allot.prune(case.make(), None, "sparsity=0.5", allocate=given, repair="none").report()
    assert own["how"] == "" and not Seen(run_page(own, DENSE, "", [])).open


def test_a_channel_page_lists_layers_as_well(runs: dict[str, Path]):
    told, seen = report(runs["dsa"]), Seen((runs["dsa"] / "report.html").read_text())
    rows = {row[0]: row for row in seen.table("weights kept")[1:]}
    for layer in told["layers"]:
        left = f"{round(layer['macs'] * layer['kept'] / layer['total']):,}"
        assert rows[layer["name"]][3:] == [f"{layer['kept']:,}", f"{layer['total']:,}", left]


@pytest.mark.parametrize("name", ["fcpts", "dsa"])
def test_a_page_shows_the_checks_that_verify_makes(runs: dict[str, Path], name: str):
    seen = Seen((runs[name] / "report.html").read_text())
    rows = verify(runs[name])["rows"]
    shown = seen.table("promised")[1:]
    assert f"{len(shown)} checks of the re-opened files passed" in seen.marked["good"] and len(shown) > 10
    assert [row[:2] for row in shown] == [[row["file"], row["check"]] for row in rows]


def test_an_export_adds_its_checks_to_those_of_the_page(tmp_path: Path):
    case = CASES["with batch norm"]
    result = allot.prune(case.make(), case.inputs(8), "sparsity=0.5", method="erk", save_to=tmp_path / "run")
    for to in ("bitmask", "program"):
        result.export(to=to)
        rows, seen = verify(tmp_path / "run")["rows"], Seen((tmp_path / "run/report.html").read_text())
        assert f"{len(rows)} checks of the re-opened files passed" in seen.text
        assert [row[:2] for row in seen.table("promised")[1:]] == [[row["file"], row["check"]] for row in rows]
    (tmp_path / "run/model.pt2").write_bytes(b"other")
    assert "did not all pass" in Seen(write_run(tmp_path / "run", report(tmp_path / "run")).read_text()).marked["bad"]


@pytest.mark.parametrize(
    ("changes", "tone", "words"),
    [
        ({"scores": {**SCORES, "sparse": 0.895}}, "good", "Budget met; the score is close to the dense model's"),
        ({"scores": {**SCORES, "sparse": 0.86}}, "warn", "Budget met; the score is below the dense model's"),
        ({"scores": {**SCORES, "sparse": 0.4}}, "bad", "far below the dense model's (-50.00 points)"),
        ({"untrained": ["its weights are random"]}, "bad", "looks untrained"),
        ({"scores": None}, "lead", "Budget met; not scored on labelled data."),
        ({"budget": [{"kind": "macs", "asked": "5%", "limit": 9, "achieved": 10, "met": False}]}, "bad", "Missed: m"),
        ({"fidelity": [{"stage": "select", "step": 1, "kl": None, "agreement": 0.1}]}, "bad", "outputs are not finite"),
    ],
)  # fmt: skip
def test_the_verdict_comes_first_in_the_colour_of_what_happened(
    runs: dict[str, Path], changes: Any, tone: str, words: str
):
    told = {**report(runs["erk"]), **changes}
    page = run_page(told, DENSE, "", [])
    assert words in Seen(page).marked[tone] and words in Seen(page).marked["lead"]
    assert page.index("<h1>") < page.index("lead verdict") < page.index('class="tiles first"')
    assert 'class="lead verdict bad"' in run_page(told, {"rows": [], "passed": False}, "", [])


def test_a_certificate_that_failed_or_was_touched_is_red(runs: dict[str, Path], tmp_path: Path):
    row = {"file": "f", "check": "c", "promised": 1, "found": 2}
    told = report(runs["erk"])
    for passed, word in ((True, "good"), (False, "bad")):
        seen = Seen(run_page(told, {"rows": [{**row, "passed": passed}], "passed": passed}, "", []))
        assert "1 checks of the re-opened files" in seen.marked[word]
        assert ("did not all pass" in seen.text) is not passed and ("FAIL" in seen.text) is not passed
    certificate = (runs["erk"] / "certificate.json").read_text()
    (tmp_path / "certificate.json").write_text(certificate.replace('"passed": true', '"passed": true '))
    assert "did not all pass" in Seen(write_run(tmp_path, told).read_text()).marked["bad"]


@pytest.mark.parametrize(
    ("sparse", "tone"),
    [(0.9, "good"), (0.885, "good"), (0.87, "warn"), (0.82, "warn"), (0.8, "bad"), (float("nan"), "bad")],
)
def test_a_score_that_fell_is_amber_or_red_and_said(runs: dict[str, Path], sparse: float, tone: str):
    told = {**report(runs["erk"]), "scores": {**SCORES, "sparse": sparse}}
    seen, page = Seen(run_page(told, DENSE, "", [])), Seen(comparison_page([("a", told)]))
    assert ("far below the dense model" in seen.marked["lead"]) is (tone == "bad")
    assert ("score is below the dense model's" in seen.marked["lead"]) is (tone == "warn")
    for word in ("warn", "bad"):
        assert (f"{100 * sparse:.1f} %" in seen.marked.get(word, "")) is (tone == word)
        assert (f"{100 * sparse:.1f} %" in page.marked.get(word, "")) is (tone == word)


def test_a_page_says_how_a_run_was_computed_where_that_is_not_usual(runs: dict[str, Path], tmp_path: Path):
    case = CASES["with batch norm"]
    chosen = {"micro_batch": 3, "amp": "bf16", "channels_last": True, "cached": 12_345}
    result = allot.prune(
        case.make(), case.inputs(8), "sparsity=0.5", method="fcpts", options={"fcpts": {"steps": 2}}, compute=chosen,
        save_to=tmp_path / "run", batch_size=8,
    )  # fmt: skip
    assert result.report()["compute"] == report(tmp_path / "run")["compute"] == chosen
    seen = Seen((tmp_path / "run/report.html").read_text())
    assert all(name in seen.text for name in ("of 3 samples at a time", "bf16 (amp)", "12,345 bytes", *chosen))
    assert report(runs["fcpts"])["compute"] == {}
    assert "otherwise than usual" not in (runs["fcpts"] / "report.html").read_text()


def copied(run: Path, to: Path, **files: bytes) -> Path:
    """A run's directory, some of its files replaced."""
    to.mkdir()
    for name in ("report.json", "certificate.json", "recipe.yaml", "steps.jsonl"):
        (to / name).write_bytes(files.get(name.partition(".")[0], (run / name).read_bytes()))
    return to


HUGE = b'{"stage": "allocate", "step": ' + b"9" * 400 + b', "loss": 1e308}\n'


@pytest.mark.parametrize(
    "steps", [b"\xff\n", b"5\n[]\n{}\n", b'{"stage": 1, "step": "x"}\n', b"[" * 9999, b'{"sta', HUGE]
)
def test_steps_that_are_none_are_left_out(runs: dict[str, Path], steps: bytes, tmp_path: Path):
    whole = (runs["fcpts"] / "steps.jsonl").read_bytes()
    odd = b'{"stage": "allocate", "step": 1, "loss": "x", "limit.sparsity": null, "cost.sparsity": 1, "spent": NaN}\n'
    run = copied(runs["fcpts"], tmp_path / "run", steps=odd + steps + b"\n" + whole)
    page = write_run(run, report(run), tmp_path / "page.html")
    (run / "steps.jsonl").write_bytes(whole)
    assert page.read_text() == write_run(run, report(run), tmp_path / "whole.html").read_text()


@pytest.mark.parametrize("text", [b"5", b"[]", b"{}", b"\xff", b"", b'{"rows": [1]}', b"[" * 99999])
def test_a_certificate_that_is_none_is_named(runs: dict[str, Path], text: bytes, tmp_path: Path):
    run = copied(runs["erk"], tmp_path / "run", certificate=text, recipe=b"\xff")
    with pytest.raises(UsageError, match=r"certificate\.json cannot be read"):
        write_run(run, report(run))


def test_a_report_that_lacks_something_is_named_in_one_line(runs: dict[str, Path], tmp_path: Path):
    told = {**report(runs["dsa"]), "scores": SCORES, "exports": [EXPORT | FAST]}
    for key in told:
        for broken in ({k: v for k, v in told.items() if k != key}, {**told, key: 5}):
            for make in (
                lambda broken=broken: write_run(runs["dsa"], broken, tmp_path / "page.html"),
                lambda broken=broken: comparison_page([("RUN", broken), ("b", told)]),
            ):
                with suppress(UsageError):  # any other error is one too many
                    make()
    for broken in ({}, []):
        with pytest.raises(
            UsageError, match=r"report\.json of RUN does not hold what a report needs \((Key|Type)Error"
        ):
            comparison_page([("RUN", broken), ("b", told)])
        with pytest.raises(UsageError, match="does not hold what a report needs"):
            write_run(runs["dsa"], broken, tmp_path / "page.html")


SORTED = """
  const table = document.querySelector("table.sortable"), wide = document.documentElement.scrollWidth;
  const kept = () => [...table.tBodies[0].rows].map(row => Number(row.cells[3].dataset.value));
  const before = kept(); table.querySelectorAll("th")[3].click(); const sorted = kept();
  return {wide, before, sorted};"""


@in_a_browser
@pytest.mark.parametrize("width", [375, 1440])
def test_a_browser_lays_the_page_out_sorts_it_and_complains_about_nothing(
    runs: dict[str, Path], width: int, tmp_path: Path
):
    page = (runs["fcpts"] / "report.html").read_text()
    found, said = browsed(page, tmp_path, width=width, probe=SORTED)
    assert found["wide"] <= max(width, 500)
    assert found["sorted"] == sorted(found["before"], reverse=True) != found["before"]
    assert "CONSOLE" not in said


NOTES = """
  const table = document.querySelectorAll("table.sortable")[1], heads = [...table.querySelectorAll("th")];
  const cells = () => [...table.tBodies[0].rows].map(row => [row.cells[0].textContent, row.cells[1].textContent]);
  const found = {}; for (const i of [0, 1, 3]) { heads[i].click(); found[i] = cells(); }
  heads[3].click(); found.up = cells();
  const clipped = [...document.querySelectorAll(".wide")].filter(box => box.scrollWidth > box.clientWidth + 1).length;
  return {found, clipped};"""


@in_a_browser
def test_notes_stay_with_the_exports_that_they_are_about(runs: dict[str, Path], tmp_path: Path):
    rows = [
        EXPORT | FAST | {"form": "b", "bytes": 9, "note": "says b"},
        EXPORT | SAME | {"form": "a", "bytes": 1000},
        EXPORT | SAME | {"form": "c", "bytes": 50, "with_ideal_mask": None, "note": "says c"},
    ]
    page = run_page({**report(runs["erk"]), "exports": rows}, DENSE, "", [])
    found, said = browsed(page, tmp_path, probe=NOTES)
    size, name = {"a": "1,000", "b": "9", "c": "50"}, {"a": "a", "b": "bsays b", "c": "csays c"}
    for column, order in ((0, "cba"), (1, "acb"), (3, "abc"), ("up", "bac")):  # what has no such size comes last
        assert found["found"][str(column)] == [[name[one], size[one]] for one in order]
    assert "CONSOLE" not in said and found["clipped"] == 0


@in_a_browser
@pytest.mark.parametrize("without", ["nothing", "<script>.*?</script>", r"details::details-content \{.*?\}"])
def test_what_is_folded_away_is_printed(runs: dict[str, Path], without: str, tmp_path: Path):
    row = {"file": "f", "check": "c", "promised": 1, "found": 1, "passed": True}
    pages = [run_page(report(runs["erk"]), {"rows": [row] * n, "passed": True}, "", []) for n in (1, 200)]
    few, many = (sheets(re.sub(without, "", page, flags=re.DOTALL), tmp_path) for page in pages)
    assert many >= few + 3


CLIPPED = """
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const wide = [...document.querySelectorAll("table")].filter(table => table.getBoundingClientRect().right > 720);
  return wide.map(table => table.rows[0].textContent);"""


@in_a_browser
@pytest.mark.parametrize("kind", ["fcpts", "dsa", "several"])
def test_no_table_is_wider_than_paper(runs: dict[str, Path], kind: str, tmp_path: Path):
    """An A4 sheet with the browser's margins is 720 pixels wide."""
    told = {**report(runs["dsa" if kind == "dsa" else "fcpts"]), "scores": SCORES, "exports": [EXPORT | FAST]}
    text = json.dumps(told)
    for row in told["layers"] if kind != "dsa" else []:
        text = text.replace(f'"{row["name"]}"', f'"blocks.3.attention.{row["name"]}"')
    told = json.loads(text)
    several = [(f"runs/sweep/fcpts/sparsity=0.95/seed-{i}", {**told, "seed": i}) for i in range(2)]
    page = comparison_page(several) if kind == "several" else run_page(told, DENSE, "", [])
    found, _ = browsed(page.replace("@media print", "@media all"), tmp_path, width=720, probe=CLIPPED)
    assert found == []
