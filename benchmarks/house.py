"""The folders of src/allot and who imports whom, as a picture: `python -m benchmarks.house` writes it to docs/pictures.

Floors are those of the contract in pyproject.toml; sentences are the first lines of the folders' docstrings; an arrow
is as wide as there are imports.
"""

from __future__ import annotations

import ast
import math
import tomllib
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "allot"
PICTURE = ROOT / "docs" / "pictures" / "house.svg"
WIDTH, FLOOR, HEIGHT, GAP = 960, 96, 56, 24  # pixels: of the picture, from floor to floor, of a box, between boxes
Box = tuple[float, float, float]  # left, top, width


def floors() -> list[list[str]]:
    """The rooms of each floor, highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "floors")
    return [[name.strip(" ()") for name in layer.split("|")] for layer in layers if "__main__" not in layer]


def room_of(name: str) -> str:
    """The folder, or file beside the folders, that holds `allot.name...`."""
    return name.split(".")[1] if "." in name else ""


def imports() -> Counter[tuple[str, str]]:
    """(room that imports, room that is imported) -> how many import lines."""
    found: Counter[tuple[str, str]] = Counter()
    for file in SOURCE.rglob("*.py"):
        here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("allot"):
                there = {room_of(f"{node.module}.{alias.name}") for alias in node.names}
                found.update((here, room) for room in there if room != here)
    return found


def sentence(room: str) -> str:
    """The first line of a room's docstring."""
    file = SOURCE / room / "__init__.py" if (SOURCE / room).is_dir() else SOURCE / f"{room}.py"
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def size(room: str) -> str:
    """Files and lines."""
    files = list((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    return f"{len(files)} files, {lines:,} lines" if len(files) > 1 else f"{lines:,} lines"


def boxes(rows: list[list[str]]) -> dict[str, Box]:
    """Where each room stands."""
    placed: dict[str, Box] = {}
    for level, row in enumerate(rows):
        width = (WIDTH - GAP * (len(row) + 1)) / len(row)
        for i, room in enumerate(row):
            placed[room] = GAP + i * (width + GAP), GAP + level * FLOOR, width
    return placed


def arrow(start: Box, end: Box, count: int, place: int) -> str:
    """From the bottom of a box to the top of another one, further down."""
    x = start[0] + start[2] * (0.15 + 0.7 * (place * 0.381966 % 1))
    y, top = start[1] + HEIGHT, end[1]
    to = min(max(x, end[0] + 12), end[0] + end[2] - 12)
    bend = (top - y) / 2
    path = f"M{x:.1f} {y:.1f} C{x:.1f} {y + bend:.1f} {to:.1f} {top - bend:.1f} {to:.1f} {top:.1f}"
    return f'<path d="{path}" stroke-width="{0.6 + math.sqrt(count) / 2:.1f}" marker-end="url(#tip)"/>'


def wrapped(text: str, width: float) -> list[str]:
    """The text in lines that fit into a box."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width / 6.1:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def drawing() -> str:
    """The whole picture."""
    rows, found = floors(), imports()
    placed = boxes(rows)
    edges = [(a, b) for a, b in sorted(found) if a in placed and b in placed and b != "errors"]
    parts = [arrow(placed[a], placed[b], found[a, b], i) for i, (a, b) in enumerate(edges)]
    shapes = []
    for room, (x, y, width) in placed.items():
        name = f"{room}/" if (SOURCE / room).is_dir() else f"{room}.py"
        shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{HEIGHT}" rx="6"/>')
        shapes.append(f'<text x="{x + 10:.1f}" y="{y + 17}" class="name">{escape(name)}</text>')
        shapes.append(f'<text x="{x + width - 10:.1f}" y="{y + 17}" class="size">{size(room)}</text>')
        for i, line in enumerate(wrapped(sentence(room), width - 20)[:2]):
            shapes.append(f'<text x="{x + 10:.1f}" y="{y + 33 + 14 * i}">{escape(line)}</text>')
    height = GAP + FLOOR * len(rows)
    style = (
        "text{font:11px sans-serif;fill:#333}.name{font-weight:bold;font-size:13px}.size{text-anchor:end;fill:#777}"
        "rect{fill:#f4f8f7;stroke:#0b7a75}path{fill:none;stroke:#0b7a75;opacity:.35}"
    )
    tip = '<marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto" '
    tip += 'markerUnits="userSpaceOnUse"><path d="M0 0L6 3L0 6z" style="fill:#0b7a75;opacity:1"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    title = "<title>The folders of src/allot: each imports only from the floors below</title>"
    ground = f'<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>'
    body = "\n".join([*parts, *shapes])
    return f"{head}{title}<style>{style}</style><defs>{tip}</defs>{ground}\n{body}\n</svg>\n"


if __name__ == "__main__":
    PICTURE.write_text(drawing())
