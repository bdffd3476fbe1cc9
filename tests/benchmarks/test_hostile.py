"""The attacks of `benchmarks.hostile`, few of each: repeatable by their seed, and able to see what is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from allot.budget.budget import Budget
from benchmarks import hostile


def test_budgets_are_those_of_the_seed_and_none_is_wrong():
    first, again, other = hostile.budgets(60, 1), hostile.budgets(60, 1), hostile.budgets(60, 2)
    assert first == again and first.tried != other.tried
    assert sum(first.tried.values()) == 60 and not first.misses and first.tried["met"] and first.tried["refused"]


@pytest.mark.parametrize(
    ("change", "what"), [(1, "costs more than it may|bounds"), (-1, "one more weight fits|bounds")]
)
def test_the_oracle_sees_a_weight_too_many_and_one_too_few(change: int, what: str, monkeypatch: pytest.MonkeyPatch):
    counts = Budget.counts

    def wrong(self: Budget, wished: Any) -> dict[str, int]:
        kept = counts(self, wished)
        largest = max(kept, key=lambda name: kept[name])
        return {**kept, largest: kept[largest] + change}

    monkeypatch.setattr(Budget, "counts", wrong)
    tally = hostile.budgets(30, 1)
    assert len(tally.misses) == tally.tried["wrong"] > 5
    assert all(any(words in miss for words in what.split("|")) for miss in tally.misses)


@pytest.mark.parametrize("how", hostile.MUTATIONS)
def test_a_mutation_changes_a_file(how: str):
    content = bytes(range(1, 200)) + b"\n"
    assert hostile.MUTATIONS[how](content, random.Random(0)) != content


def test_commands_end_with_a_code_and_a_traceback_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert hostile._command(["methods", "erk", "--json"]) == 0
    assert hostile._command(["plan", "zoo:none", "--budget", "sparsity=0.5"]) == 2
    monkeypatch.setattr(hostile.cli, "main", lambda: 1 / 0)
    assert str(hostile._command(["methods"])).startswith("ZeroDivisionError")


def test_a_page_gets_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- hostile budgets -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["hostile", "budgets", "--count", "9", "--fill", str(page)])
    with pytest.raises(SystemExit) as ended:
        hostile.main()
    assert ended.value.code == 0 and "**9 tried, 0 misses** (seed 0" in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("<!-- end -->\nafter\n")
    assert capsys.readouterr().out.startswith("budgets: ")
