"""The site misses no page, no public name and no target of a link; `make docs` builds it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import allot
from allot.run.problem import Rule

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MADE = {"readme.md", "changelog.md", "contributing.md", "decisions/index.md"}  # by docs/hooks.py


def test_every_page_is_in_the_navigation():
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    pages = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md") if file.parent.name != "decisions"}
    assert sorted(named) == sorted(pages | MADE)


def test_every_public_name_has_a_place_in_the_api_pages():
    text = "".join(file.read_text(encoding="utf-8") for file in DOCS.glob("api/*.md"))
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: allot\.(\S+)$", text, flags=re.MULTILINE)}
    listed = set(re.findall(r"`(\w+)`", (DOCS / "api" / "index.md").read_text(encoding="utf-8")))
    assert set(allot.__all__) <= described & listed
    code = ast.parse((DOCS / "hooks.py").read_text(encoding="utf-8"))  # what it imports comes with `make docs` only
    (entries,) = [node for node in code.body if isinstance(node, ast.FunctionDef) and node.name == "_entries"]
    names: dict[str, Any] = {"METHODS": allot.METHODS, "Rule": Rule}
    exec(compile(ast.Module([entries], []), "hooks.py", "exec"), names)
    for name, method in allot.METHODS.items():
        assert f"<!-- methods: {method.role} -->" in text
        described = method.densities if isinstance(method, Rule) else type(method)
        assert f"::: {described.__module__}.{described.__name__}\n" in names["_entries"](method.role), name


def test_every_link_between_documents_leads_to_a_file():
    link = re.compile(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)")
    pages = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *DOCS.rglob("*.md")]
    links = [(page, target) for page in pages for target in link.findall(page.read_text(encoding="utf-8"))]
    assert links
    assert [(str(page), target) for page, target in links if not (page.parent / target).exists()] == []


def test_nothing_of_the_site_is_fetched_from_elsewhere():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in config and "iframe-worker.js" in config and "inventories: []" in config
    assert "http" not in config
