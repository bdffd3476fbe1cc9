"""Screenshots of report.html: `python -m benchmarks.screens` (three minutes on two cores, and Chromium).

One run, and six side by side, as wide as a telephone and a desk, into docs/pictures. The six are a sweep of three
budgets and two methods with one seed, so that there are lines to see; error bars take several seeds. It is kept in
runs/six: an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from allot.pruning.sweep import cells_of, sweep
from allot.sources import zoo

NET = "digits-resnet20"
BUDGETS = ("sparsity=0.8", "sparsity=0.9", "sparsity=0.95")
SIZES = {"375": (375, 1100), "1440": (1440, 1000)}


def screenshot(page: Path, width: int, height: int, out: Path) -> None:
    """A picture of a page.

    Raises:
        CalledProcessError: the browser failed.
    """
    browser = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--screenshot={out}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    """Run the sweep, take the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screens", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/six"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    cells = cells_of(("erk", "fcpts"), BUDGETS, 1)
    data, test = zoo.data(NET, "calibration"), zoo.data(NET, "test")
    sweep(zoo.model(NET), data, cells, options.runs, test=test, label=f"zoo:{NET}")
    pages = {"run": options.runs / "fcpts/sparsity=0.95/seed-0/report.html", "runs": options.runs / "report.html"}
    for name, page in pages.items():
        for size, (width, height) in SIZES.items():
            screenshot(page, width, height, options.out / f"report-{name}-{size}.png")


if __name__ == "__main__":
    main()
