"""The blocks of the guides that need a package which is not part of allot: they run where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from test_house import DOCUMENTS, ROOT, Block, blocks_of

PAGES = sorted({ROOT / "docs/howto/trackers.md", *(ROOT / document for document in DOCUMENTS)})
FOUND = [
    (mark.removeprefix("needs-"), page, block)
    for page in PAGES
    for block in blocks_of(page.read_text(encoding="utf-8"))
    for mark in sorted(block.marks)
    if mark.startswith("needs-")
]


def test_every_tracker_and_trainer_of_the_guides_is_found():
    assert sorted(name for name, _, _ in FOUND) == ["accelerate", "lightning", "mlflow", "tensorboard", "wandb"]


@pytest.mark.filterwarnings("ignore")  # of these packages, about this machine and themselves
@pytest.mark.parametrize(("name", "page", "block"), FOUND, ids=[f"{page.stem}-{name}" for name, page, _ in FOUND])
def test_a_block_runs_where_its_package_is_installed(
    name: str, page: Path, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * block.line + block.text, page, "exec"), {"__name__": "document"})
    assert any(tmp_path.iterdir()) or name == "lightning"
