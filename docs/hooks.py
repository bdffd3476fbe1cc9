"""What `mkdocs.yml` cannot say: Markdown that reads well on a code host becomes pages whose links work on the site.

Pages of the root, like the changelog, and source files that a page links to are made part of the site; every relative
link is rewritten to where its target went. Names after the language of a fence ("```yaml half.yaml") become titles.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from allot.methods import METHODS
from allot.run.problem import Rule

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?P<start>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(?P<start> *```\w+)(?P<marks>(?: +[\w.-]+)+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/, and what their links need beside them."""
    decisions = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    headings = [(file.name, re.sub(r"^# (\d+)\. ", r"\1. ", _first_line(file))) for file in decisions]
    index = "\n".join(f"- [{heading}]({name})" for name, heading in headings)
    files.append(File.generated(config, "decisions/index.md", content=f"# Decisions\n\n{index}\n"))
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for page in files.documentation_pages():
        for match in LINK.finditer(page.content_string):
            path = _in_repository(page.src_uri, match["target"])
            if (ROOT / path).is_file() and (uri := _on_site(path)).startswith("source/") and uri not in files.src_uris:
                code = (ROOT / path).read_text(encoding="utf-8")
                text = f"# {posixpath.basename(path)}\n\n```{_language(path)} title={path!r}\n{code}```\n"
                files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with links that work on the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        page.meta["hide"] = ["navigation", "toc"]
        return markdown
    if uri == "index.md":
        page.meta["hide"] = ["navigation"]  # it would be a list of one

    def moved(match: re.Match[str]) -> str:
        target = _on_site(_in_repository(uri, match["target"]))
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{match['anchor'] or ''})"

    def titled(match: re.Match[str]) -> str:
        file = next((mark for mark in match["marks"].split() if "." in mark), None)
        return match["start"] + (f' title="{file}"' if file else "")

    markdown = re.sub(r"^<!-- methods: (\w+) -->$", lambda match: _entries(match[1]), markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!--.*-->$", "\n", markdown, flags=re.MULTILINE)  # a table starts after an empty line
    return FENCE.sub(titled, LINK.sub(moved, markdown))


class Sections(griffe.Extension):
    """Docstrings whose sections follow each other without empty lines, as they do here, are read all the same."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Sets an empty line before every section."""
        if obj.docstring:
            sections = r"(?<=[^\n])\n(?=(?:Args|Attributes|Returns|Yields|Raises):\n)"
            obj.docstring.value = re.sub(sections, "\n\n", obj.docstring.value)


def _entries(role: str) -> str:
    """An entry for the code of every method of this role: a new line in `METHODS` is on the page by itself."""
    places = dict.fromkeys(
        f"{code.__module__}.{code.__qualname__}"
        for method in METHODS.values()
        if method.role == role
        for code in [method.densities if isinstance(method, Rule) else type(method)]
    )
    return "\n\n".join(f"::: {place}\n    options: {{members: false, heading_level: 3}}" for place in places)


def _in_repository(uri: str, target: str) -> str:
    """The path below the root of what a page links to."""
    page = {page: name for name, page in PAGES.items()}.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _on_site(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        path = path.removeprefix("docs/")
        return path if posixpath.splitext(path)[1] else f"{path}/index.md"
    return f"source/{path}.md"


def _language(path: str) -> str:
    return {".py": "python", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml"}.get(posixpath.splitext(path)[1], "text")


def _first_line(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0]
