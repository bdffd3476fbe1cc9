"""Pictures of a terminal: `python -m benchmarks.picture` runs the demo's commands and draws what they print.

The output is caught as the terminal would get it and drawn by rich as one SVG without outside fonts.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COMMANDS = (
    "allot prune zoo:digits-resnet20 --data zoo:digits-resnet20 --budget sparsity=0.9 --out runs/demo",
    "allot verify runs/demo",
)
WIDTH = 116


def captured(command: str, directory: str | Path, width: int = WIDTH) -> Text:
    """What a command prints, colours included.

    Raises:
        CalledProcessError: it did not end with 0.
    """
    terminal = {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "TERM": "xterm-256color", "COLUMNS": str(width)}
    program = [sys.executable, "-m", *command.split()]
    done = subprocess.run(
        program,
        cwd=directory,
        env={**os.environ, **terminal},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return Text.from_ansi(done.stdout.rstrip())


def drawn(commands: Sequence[str], directory: str | Path, title: str, width: int = WIDTH) -> str:
    """An SVG of a terminal of `width` columns in which these commands were run, one after the other."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        for command in commands:
            console.print(Text("$ ", style="bold green") + Text(command, style="bold"), soft_wrap=width == WIDTH)
            console.print(captured(command, directory, width))
        drawing = console.export_svg(title=title, theme=MONOKAI)
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)  # they point to the network
    return drawing.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


def main() -> None:
    """Run the commands and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/demo.svg"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory:
        out.write_text(drawn(COMMANDS, directory, "make demo"))


if __name__ == "__main__":
    main()
