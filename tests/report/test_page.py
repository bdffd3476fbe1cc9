"""report.html stands alone: it says what report.json says, at any width, with no network and no script needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import allot
from allot.report.charts import Line, Mark, histogram, lines, marks
from allot.report.page import comparison_page, run_page
from contract.cases import CASES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: report.html is not looked at in a browser"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run on single weights that learned its densities, and one on channels."""
    where = tmp_path_factory.mktemp("runs")
    case = CASES["with batch norm"]
    short = {"fcpts": {"steps": 8}, "dsa": {"steps": 6}, "distill": {"steps": 4}}
    for name, budget in (("fcpts", "sparsity=0.7"), ("dsa", "macs=50%"), ("erk", "sparsity=0.7")):
        known = {key: value for key, value in short.items() if key == name or (name == "dsa" and key == "distill")}
        allot.prune(
            case.make(), case.inputs(16), budget, method=name, options=known, label=f"<{name}> & co",
            save_to=where / name, batch_size=8,
        )  # fmt: skip
    return {name: where / name for name in ("fcpts", "dsa", "erk")}


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


class Seen(HTMLParser):
    """Texts, tags and whether every one that was opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


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


def test_several_runs_come_with_means_and_spreads(runs: dict[str, Path]):
    told = {**report(runs["erk"]), "scores": {"metric": "top1", "dense": 0.9, "sparse": 0.8, "samples": 10}}
    scored = [
        (f"run {seed}", {**told, "seed": seed, "scores": {**told["scores"], "sparse": 0.8 + 0.01 * seed}})
        for seed in range(3)
    ]
    other = {**scored[0][1], "sparsity": 0.5, "budget": [{**told["budget"][0], "asked": "0.5"}]}
    page = comparison_page([*scored, ("other", other)])
    assert "0.8100 ± 0.0100, 3 seeds" in page and page.count("<circle") == 2 * 3  # three charts
    seen = Seen(page)
    assert not seen.open and "run 2" in seen.text and "-8.00" in seen.text


EXPORT = {"form": "onnx", "bytes": 10, "dense_bytes": 20, "limit": 8, "error": 0.0, "note": ""}
FAST = {"milliseconds": {"dense": 3.0, "sparse": 2.0}, "faster": 1.5, "spread": [1.4, 1.6], "verdict": "faster"}
SAME = {"milliseconds": {"dense": 2.5, "sparse": 2.5}, "faster": 1.0, "spread": [0.9, 1.1], "verdict": "no faster"}
SLOW = EXPORT | {"form": "program"} | SAME


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
    ],
)
def test_a_page_says_first_what_it_came_to(runs: dict[str, Path], exports: Any, sentence: str, cell: str):
    told = {**report(runs["erk"]), "exports": exports}
    told["scores"] = {"metric": "top1", "dense": 0.9, "sparse": 0.85, "samples": 10}
    lead = Seen(run_page(told, {"rows": [], "passed": True}, "", [])).text
    share = 100 * told["bytes"]["file"] / told["bytes"]["dense"]
    assert f"{100 * told['kept'] / told['total']:.1f} % of the weights are left" in lead
    assert f"the file takes {share:.1f} % of the dense one's bytes" in lead
    assert "top1 went from 90.0 % to 85.0 %" in lead and sentence in lead
    assert cell in comparison_page([("a", told), ("b", told)])
    assert all(f">{row['bytes'] / row['limit']:.2f}x<" in run_page(told, {}, "", []) for row in exports)


def test_the_dense_score_is_a_level_where_all_runs_have_it(runs: dict[str, Path]):
    told = {**report(runs["erk"]), "scores": {"metric": "top1", "dense": 0.9, "sparse": 0.8, "samples": 10}}
    other = {**told, "scores": {**told["scores"], "dense": 0.7}, "method": "other"}
    assert comparison_page([("a", told), ("b", {**told, "method": "other"})]).count('class="limit"') == 3
    assert 'class="limit"' not in comparison_page([("a", told), ("b", other)])


def test_a_page_of_a_report_with_nothing_to_show_is_a_page(runs: dict[str, Path]):
    told = {**report(runs["erk"]), "macs": None, "scores": None, "histograms": {}, "skipped": {}}
    seen = Seen(
        run_page({**told, "bytes": {"dense": None, "file": None, "limit": None}}, {"rows": [], "passed": True}, "", [])
    )
    assert not seen.open and "give --test DATA" in seen.text
    assert not Seen(comparison_page([("a", told), ("b", told)])).open


def test_charts_put_points_where_their_values_are():
    drawn = lines([Line("up", [(0, 0.0), (10, 1.0)])], "x", "y")
    (a, b), (c, d) = (map(float, p.split(",")) for p in re.search(r'points="([^"]+)"', drawn)[1].split())
    assert a < c and b > d  # more is to the right and higher
    assert lines([], "x", "y") == lines([Line("none", [(0, float("nan"))])], "x", "y") == marks([], "x", "y") == ""
    bars = histogram([0.0, 1.0, 2.0], [4, 2], [0, 2], "w")
    tall = [float(height) for height in re.findall(r'class="before"[^>]+height="([\d.]+)"', bars)]
    assert len(tall) == 2 and tall[0] == pytest.approx(2 * tall[1], abs=0.2) and bars.count('class="after"') == 1
    error = marks([Mark("m", 1.0, 0.5, 0.1, 0), Mark("n", 2.0, 0.7, 0.0, 0)], "x", "y")
    assert error.count("<circle") == 2 and error.count('class="spread"') == 1


PROBE = """<script>addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth, table = document.querySelector("table.sortable");
  const kept = () => [...table.tBodies[0].rows].map(row => Number(row.cells[1].dataset.value));
  const before = kept(); table.querySelectorAll("th")[1].click(); const sorted = kept();
  document.title = JSON.stringify({wide, before, sorted});
});</script></body>"""


@in_a_browser
@pytest.mark.parametrize("width", [375, 1440])
def test_a_browser_lays_the_page_out_sorts_it_and_complains_about_nothing(
    runs: dict[str, Path], width: int, tmp_path: Path
):
    page = tmp_path / "page.html"
    # a frame of the wanted width: a window is never narrower than 500 pixels
    page.write_text((runs["fcpts"] / "report.html").read_text().replace("</body>", PROBE))
    page.write_text(page.read_text().replace("<body>", f'<body style="width: {width}px">'))
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert found["wide"] <= max(width, 500)
    assert found["sorted"] == sorted(found["before"], reverse=True) != found["before"]
    assert "CONSOLE" not in done.stderr
