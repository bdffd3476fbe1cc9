"""English prose from documents, as blocks of tokens: calibration and held-out blocks come from different documents."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allot.errors import UsageError

WORDS = 12  # of a paragraph at least: shorter ones are headings, entries of lists and menus
OUTSIDE = {"script", "style", "pre", "table", "nav", "head"}  # elements whose text is no prose
DEBIAN = {  # package with long English prose -> patterns of its files
    "debian-handbook": ("usr/share/doc/debian-handbook/html/en-US/*.html",),
    "debian-policy": ("usr/share/doc/debian-policy/policy.html/*.html",),
    "debian-reference-en": ("usr/share/debian-reference/*.en.html",),
    "developers-reference": ("usr/share/developers-reference/*.html",),
    "gnucash-docs": ("usr/share/doc/gnucash-docs/gnucash-guide-en/*.html",),
    "installation-guide-amd64": ("usr/share/doc/installation-guide-amd64/en/*.html",),
    "maint-guide": ("usr/share/doc/maint-guide/html/*.en.html",),
}
PACKAGES = f"""Text: a file, or a folder whose entries (files, or folders of files) are documents; .html, .txt and .md,
also with .gz. Of HTML the paragraphs are read, of all text those of 12 words or more. Every third document in the order
of names is held out; of a single document, the last third of its paragraphs. Debian packages with long English prose:
{", ".join(DEBIAN)};
`python -m benchmarks.nets.debian prose FOLDER` downloads them by apt-get."""


def documents(path: Path) -> dict[str, list[str]]:
    """Document -> its paragraphs, in the order of names; paragraphs that came before are left out.

    Raises:
        UsageError: no such path, or no prose below it.
    """
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder.")
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for entry in entries:
        files = sorted(file for file in entry.rglob("*") if file.is_file()) if entry.is_dir() else [entry]
        paragraphs = [paragraph for file in files for paragraph in paragraphs_of(file)]
        new = list(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph not in seen))
        seen.update(new)
        if new:
            found[entry.name] = new
    if not found:
        raise UsageError(f"{path}: no paragraph of {WORDS} words or more in .html, .txt or .md files.")
    return found


def split(text: Path, held_out: Path | None) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(documents to calibrate with, documents that are held out)."""
    found = documents(text)
    if held_out is not None:
        return found, documents(held_out)
    if len(found) == 1:
        ((name, paragraphs),) = found.items()
        cut = 2 * len(paragraphs) // 3
        return {name: paragraphs[:cut]}, {name: paragraphs[cut:]}
    kept = {name: paragraphs for i, (name, paragraphs) in enumerate(found.items()) if i % 3 != 2}
    return kept, {name: paragraphs for name, paragraphs in found.items() if name not in kept}


def blocks(texts: dict[str, list[str]], tokenizer: Any, count: int, length: int, *, seed: int | None) -> Tensor:
    """`count` blocks of `length` tokens, `[count, length]`, none over the border of a document.

    With a seed the blocks are drawn; without, they are spread evenly over all blocks, and over the documents with them.

    Raises:
        UsageError: the documents are too short.
    """
    every = []
    for paragraphs in texts.values():
        ids = torch.tensor(tokenizer("\n\n".join(paragraphs))["input_ids"])
        every += list(ids[: len(ids) // length * length].view(-1, length))
    if len(every) < count:
        raise UsageError(f"{count} blocks of {length} tokens are needed, {', '.join(texts)} give {len(every)}.")
    if seed is None:
        chosen = [i * len(every) // count for i in range(count)]
    else:
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return torch.stack([every[i] for i in chosen])


def paragraphs_of(file: Path) -> Iterator[str]:
    """Paragraphs of prose in a file, white space made single; nothing where it is no text."""
    name = file.name.removesuffix(".gz")
    if Path(name).suffix.lower() not in {".html", ".htm", ".txt", ".md"}:
        return
    content = gzip.decompress(file.read_bytes()) if name != file.name else file.read_bytes()
    text = content.decode("utf-8", errors="replace")
    if Path(name).suffix.lower() in {".html", ".htm"}:
        reader = _Paragraphs()
        reader.feed(text)
        reader.close()
        found = reader.found
    else:
        found = re.split(r"\n\s*\n", text)
    for paragraph in found:
        words = paragraph.split()
        if len(words) >= WORDS:
            yield " ".join(words)


class _Paragraphs(HTMLParser):
    """The text of every <p> and <div class="para">, without that of the elements `OUTSIDE`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.outside = 0
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.outside += tag in OUTSIDE
        if tag == "p" or (tag == "div" and ("class", "para") in attrs):
            self.found.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.outside = max(0, self.outside - (tag in OUTSIDE))
        if tag in {"p", "div", "body"}:
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside and not self.outside:
            self.found[-1] += data
