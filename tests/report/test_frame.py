"""What all pages share: colours that can be read by day and by night, text that is not small, and order on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from allot.report import frame
from allot.report.page import run_page
from report.pages import SCORES, browsed, in_a_browser, report

STYLE = Path(frame.__file__).with_name("frame.html").read_text()


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("light", [True, False], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(light: bool):
    first, second = (dict(re.findall(r"--([\w-]+): (#\w{3,6});", block)) for block in STYLE.split(":root {")[1:3])
    colours = first if light else second
    for ground in ("paper", "card"):
        for text in ("ink", "soft", "good", "warn", "bad", "accent"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for tone in ("good", "warn", "bad"):
        assert contrast(colours[tone], colours[f"{tone}-card"]) >= 4.5, tone
    for series in range(8):  # points and lines
        assert contrast(colours[f"s{series}"], colours["paper"]) >= 3, series


ROOM = """
  const box = name => [...document.querySelectorAll(name)].map(each => each.getBoundingClientRect());
  const first = [...document.querySelectorAll(".first .tile b")].map(each => getComputedStyle(each).fontSize);
  const tiny = each => parseFloat(getComputedStyle(each).fontSize) < 12;
  const small = [...document.querySelectorAll("main *")].filter(tiny).length;
  return {first, small, bars: box(".bars > div").length, headline: box("h1")[0].bottom, tiles: box(".first")[0].top,
          chart: box(".bars")[0].top, details: box("details.more:not([open])").length};"""


@in_a_browser
@pytest.mark.parametrize("width", [375, 1440])
def test_score_and_fidelity_are_as_large_as_the_budget_and_all_details_are_folded(
    runs: dict[str, Path], width: int, tmp_path: Path
):
    told = {**report(runs["erk"]), "scores": {**SCORES, "sparse": 0.895}}
    found, said = browsed(run_page(told, {"rows": [], "passed": True}, "", []), tmp_path, width=width, probe=ROOM)
    assert len(found["first"]) == 3 and len(set(found["first"])) == 1  # budget, score, fidelity
    assert found["headline"] < found["tiles"] < found["chart"] and found["bars"] == len(told["layers"])
    assert found["small"] == 0 and found["details"] >= 5 and "CONSOLE" not in said
