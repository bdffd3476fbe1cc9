"""Pictures of all pages and of the terminal: `python -m benchmarks.screens` (ten minutes on two cores, and Chromium).

A run of the default, a sweep of three budgets and two methods with one seed and their controls, and what advise
measures, as wide as a telephone, a tablet and a desk, by day and by night; the terminal with 80 and 120 columns; a
notebook of the docs with what it showed when it ran. The runs stay in runs/: an interrupted command resumes, and
finished runs are pictured again without being made again.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from benchmarks.picture import drawn

NET = "zoo:digits-resnet20"
COMMANDS = (
    f"prune {NET} --data {NET} --budget sparsity=0.9 --out runs/best",
    "report runs/best",  # the page anew, also of a run that was there
    f"sweep {NET} --data {NET} --budget sparsity=0.8,0.9,0.95 --method erk,fcpts --seeds 1 --out runs/sweep",
    f"advise {NET} --out runs/advice.html",
)
PAGES = {
    "run": Path("runs/best/report.html"),
    "runs": Path("runs/sweep/report.html"),
    "advice": Path("runs/advice.html"),
}
SIZES = {375: 1500, 1024: 1250, 1440: 1250}  # width -> height, in pixels
COLUMNS = (80, 120)
NOTEBOOK = Path("docs/notebooks/vision.ipynb")
PAPER = """<!doctype html><meta charset="utf-8"><style>
body { font: 15px/1.5 sans-serif; margin: 24px; background: #fff; color: #222; }
pre { font: 13px/1.4 monospace; margin: 8px 0; overflow: auto; }
.code { background: #f4f4f4; border: 1px solid #ddd; padding: 8px; } img { max-width: 100%; }
</style>"""
MARGIN = 24  # pixels below the last thing on a page
NARROWEST = 500  # pixels: no window is narrower, a page inside of a frame is


def screenshot(page: Path, width: int, height: int, *, dark: bool = False) -> Image.Image:
    """A picture of a page as a browser shows it to those who prefer light, or dark.

    Raises:
        CalledProcessError: the browser failed.
    """
    browser = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as folder:
        frame, picture = Path(folder) / "frame.html", Path(folder) / "picture.png"
        style = f"border: 0; width: {width}px; height: {height}px"
        frame.write_text(f'<body style="margin: 0"><iframe style="{style}" src="{page.resolve().as_uri()}"></iframe>')
        subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--user-data-dir={folder}/profile",
                f"--window-size={max(width, NARROWEST)},{height}",
                f"--screenshot={picture}",
                frame.as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        whole = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB").crop((0, 0, width, height))
    empty = Image.new("RGB", whole.size, whole.getpixel((0, height - 1)))
    *_, bottom = ImageChops.difference(whole, empty).getbbox() or (0, 0, 0, height)
    return whole.crop((0, 0, width, min(height, bottom + MARGIN)))


def save(picture: Image.Image, place: Path) -> None:
    """In few colours, which make small files; those that are rare, like a dot's, are kept."""
    picture.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(place, optimize=True)


def page_of(notebook: Path) -> str:
    """A notebook as a page: its text, its code, and below each cell what it showed."""
    parts = [PAPER]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = html.escape("".join(cell["source"]))
        if cell["cell_type"] != "code":
            title, _, rest = source.partition("\n\n")
            parts.append(f"<h3>{title.lstrip('# ')}</h3><p>{rest}</p>")
            continue
        parts.append(f'<pre class="code">{source}</pre>')
        for output in cell["outputs"]:
            shown = output.get("data", {"text/plain": output.get("text", "")})
            kinds = {kind: "".join(content) for kind, content in shown.items()}
            if "text/html" in kinds:
                parts.append(kinds["text/html"])
            elif "image/png" in kinds:
                parts.append(f'<img src="data:image/png;base64,{kinds["image/png"]}">')
            else:
                parts.append(f"<pre>{html.escape(kinds['text/plain'])}</pre>")
    return "\n".join(parts)


def main() -> None:
    """Make what is missing of the runs, take the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screens", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(), help="the directory that holds runs/")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    for command in COMMANDS:
        subprocess.run([sys.executable, "-m", "allot", *command.split()], cwd=options.work, check=True)
    for name, page in PAGES.items():
        for width, height in SIZES.items():
            for dark in (False, True):
                picture = screenshot(options.work / page, width, height, dark=dark)
                place = options.out / f"report-{name}-{width}{'-dark' if dark else ''}.png"
                save(picture, place)
    for columns in COLUMNS:
        drawing = drawn(["allot report runs/best"], options.work, f"{columns} columns", columns)
        (options.out / f"terminal-{columns}.svg").write_text(drawing)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "notebook.html"
        page.write_text(page_of(NOTEBOOK), encoding="utf-8")
        save(screenshot(page, 1024, 2400), options.out / "notebook.png")


if __name__ == "__main__":
    main()
