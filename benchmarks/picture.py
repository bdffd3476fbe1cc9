"""Pictures of a terminal, for `benchmarks.screens`: what commands print, as it would get there.

rich draws it as one SVG without outside fonts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text


def captured(command: str, directory: str | Path, width: int) -> Text:
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


def drawn(commands: Sequence[str], directory: str | Path, title: str, width: int) -> str:
    """An SVG of a terminal of `width` columns in which these commands were run, one after the other."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        for command in commands:
            console.print(Text("$ ", style="bold green") + Text(command, style="bold"))
            console.print(captured(command, directory, width))
        drawing = console.export_svg(title=title, theme=MONOKAI)
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)  # they point to the network
    return drawing.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
