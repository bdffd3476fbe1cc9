"""What compressors make of the files of a run: `python -m benchmarks.compression --fill` fills docs/formats.md.

The zoo's nets are pruned by ERK without repair. `zstd` is the command of that name; zlib and lzma come with Python.
*Shuffled*: the first bytes of all values of a tensor stand together, then the second bytes, and so on, before the
compressor sees them. Seconds are those of decompressing, of the processor.
"""

from __future__ import annotations

import argparse
import logging
import lzma
import os
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

import allot
from allot import zoo
from allot.export.files.formats import BITMASK, PLAIN
from benchmarks.runs import fill

PAGE = Path("docs/formats.md")
SPARSITIES = (0.5, 0.9)
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def command(*words: str) -> Callable[[bytes], bytes]:
    """A function that sends bytes through a program."""
    return lambda content: subprocess.run(words, input=content, capture_output=True, check=True).stdout


CODECS: dict[str, Codec] = {
    "zlib": (lambda content: zlib.compress(content, 9), zlib.decompress),
    "lzma": (lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    "zstd -19": (command("zstd", "-19", "-c"), command("zstd", "-d", "-c")),
}


def shuffled(path: Path) -> bytes:
    """The tensors of a file one after the other, each with its bytes ordered by their place in a value."""
    parts = []
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            values = np.ascontiguousarray(file.get_tensor(name)).reshape(-1)
            parts.append(values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes())
    return b"".join(parts)


def rows(name: str, sparsity: float) -> Iterator[str]:
    """The table's rows of one net: sizes as shares of the dense file, seconds to decompress."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        allot.prune(zoo.model(name), None, f"sparsity={sparsity}", method="erk", repair="none", save_to=run)
        plain, bitmask = (run / file for file in (PLAIN, BITMASK))
        dense = plain.stat().st_size
        contents = {
            "plain": plain.read_bytes(),
            "bitmask": bitmask.read_bytes(),
            "bitmask, shuffled": shuffled(bitmask),
        }
        for form, content in contents.items():
            cells = [f"{100 * (len(content) / dense):.1f} %" if "shuffled" not in form else ""]
            for compress, decompress in CODECS.values():
                small = compress(content)
                started = sum(os.times()[:4])
                restored = decompress(small)
                seconds = sum(os.times()[:4]) - started
                assert restored == content
                cells.append(f"{100 * len(small) / dense:.1f} %" + (f", {seconds:.2f} s" if seconds > 0.005 else ""))
            yield f"| {name}, {100 * sparsity:.0f} % | {form} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print and fill docs/formats.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__.splitlines()[0])
    parser.add_argument("--fill", action="store_true", help="put the table into docs/formats.md")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser.parse_args()
    lines = ["| net | file | as it is | " + " | ".join(CODECS) + " |", "|---|---|" + "--:|" * (1 + len(CODECS))]
    for name in zoo.MODELS:
        for sparsity in SPARSITIES:
            lines += rows(name, sparsity)
    if options.fill:
        fill(PAGE, "compression", lines)
    logging.info("%s", "\n".join(lines))


if __name__ == "__main__":
    main()
