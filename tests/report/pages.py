"""What tests of pages share: a page as a reader sees it, and as a browser does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: report.html is not looked at in a browser"
)
SCORES = {"metric": "top1", "dense": 0.9, "sparse": 0.8, "samples": 10}


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


class Seen(HTMLParser):
    """Texts, tags and whether every one that was opened is closed; rows of tables as the texts of their cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.marked: dict[str, str] = {}  # class -> all text in it
        self.classes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "wbr"):
            self.open.append(tag)
            self.classes.append(dict(attrs).get("class") or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        for name in self.classes.pop().split():
            self.marked[name] = self.marked.get(name, "") + "\n"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] in ("script", "style"):
            return
        self.text += data
        for name in {name for some in self.classes for name in some.split()}:
            self.marked[name] = self.marked.get(name, "") + data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The first row whose first cell says this."""
        return next(row for row in self.rows if row and row[0] == first)

    def table(self, heading: str) -> list[list[str]]:
        """The rows below the first heading row that has this heading, and it."""
        start = next(i for i, row in enumerate(self.rows) if heading in row)
        width = len(self.rows[start])
        end = next((i for i in range(start, len(self.rows)) if len(self.rows[i]) != width), len(self.rows))
        return self.rows[start:end]


def browsed(page: str, tmp_path: Path, *flags: str, width: int = 1440, probe: str = "") -> tuple[Any, str]:
    """What `probe`, JavaScript that gives an object, finds in the page when it has loaded; what the console said."""
    script = f'<script>addEventListener("load", () => document.title = JSON.stringify((() => {{{probe}}})()));</script>'
    path = tmp_path / "page.html"
    # a frame of the wanted width: a window is never narrower than 500 pixels
    path.write_text(page.replace("<body>", f'<body style="width: {width}px">').replace("</body>", script + "</body>"))
    done = _chromium(tmp_path, "--enable-logging=stderr", "--dump-dom", f"--window-size={width},900", *flags, path)
    return json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1]), done.stderr


def sheets(page: str, tmp_path: Path, *flags: str) -> int:
    """How many sheets of paper the page is printed on."""
    path = tmp_path / "page.html"
    path.write_text(page)
    _chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", *flags, path)
    return len(re.findall(rb"/Type /Page\b", (tmp_path / "page.pdf").read_bytes()))


def _chromium(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    *flags, page = arguments
    usual: Sequence[str] = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    )
    command = [CHROMIUM, *usual, *map(str, flags), Path(page).as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
