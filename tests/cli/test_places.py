"""Places and options are checked before the work: nothing is read, called or written for one that cannot be used."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from torch import nn

import allot
from allot.errors import CannotWrite
from allot.run.places import check_directory_place, check_file_place
from cli.command import MLP, NET, SAMPLES, done, refused, run

NO_MODEL = "cli.factories:never_made"  # takes a minute to make


@pytest.fixture
def finished() -> str:
    done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair none --out RUN")
    return "RUN"


@pytest.mark.parametrize(
    "line",
    [
        "plan {} --budget 0.5 --save '{}'",
        "prune {} --budget 0.5 --repair none --out '{}'",
        "advise {} --input 6 --out '{}'",
        "sweep {} --data zoo:digits --budget 0.5 --out '{}'",
        "search {} --data zoo:digits --test zoo:digits --max-drop 1pt --out '{}'",
    ],
)
@pytest.mark.parametrize("place", ["", " ", "letter.txt/x", "/"])
def test_a_place_that_cannot_be_written_ends_before_the_model_is_made(line: str, place: str):
    Path("letter.txt").write_text("dear")
    if place == "/" and line.startswith(("sweep", "search")):
        return  # a sweep may be written beside other files
    refused(line.format(NO_MODEL, place))
    assert [path.name for path in Path().iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("place", ["/", ".", "..", "", "none/page.html"])
def test_a_page_needs_the_name_of_a_file(finished: str, place: str):
    refused(f"report {finished} --out '{place}'")
    refused(f"plan {MLP} --budget 0.5 --save '{place}'")


@pytest.mark.parametrize(
    ("form", "place"), [("bitmask", "taken"), ("slim", "letter.txt"), ("bitmask", "/"), ("csr", "")]
)
def test_an_export_to_what_exists_ends_before_it_is_made(finished: str, form: str, place: str, monkeypatch):
    Path("taken").mkdir()
    Path("letter.txt").write_text("dear")
    monkeypatch.setattr(
        import_module("allot.export.export"), "_answers", lambda *_: pytest.fail("worked before it looked")
    )
    refused(f"export {finished} --to {form} --data {SAMPLES} --out '{place}'")
    assert not list(Path("taken").iterdir())


def test_places_in_python_are_checked_alike(tmp_path: Path):
    for place in ("/", ".", tmp_path):
        with pytest.raises(allot.UsageError):
            check_file_place(place)
    with pytest.raises(CannotWrite, match="there is no folder"):
        check_file_place(tmp_path / "none" / "x")
    for place in ("", "/"):
        with pytest.raises(allot.UsageError):
            allot.prune(nn.Linear(4, 4), None, 0.5, repair="none", save_to=place)
    (tmp_path / "file").touch()
    with pytest.raises(allot.UsageError, match="is a file"):
        check_directory_place(tmp_path / "file")
    with pytest.raises(CannotWrite):
        check_directory_place(tmp_path / "file" / "x")
    assert check_directory_place(tmp_path / "a" / "b") == tmp_path / "a" / "b"


@pytest.mark.parametrize("key", ["outputs", "options.distill.outputs"])
@pytest.mark.parametrize(
    "place", ["nope", "nowhere:f", "os:system", "builtins:print", "mine.py:none", "mine.py:system"]
)
def test_a_function_that_is_none_is_refused_before_a_run_begins_and_never_called(key: str, place: str):
    Path("mine.py").write_text("from os import system\n")
    line = f"prune {MLP} --data {SAMPLES} --budget 0.5 --repair distill --set {key}={place} --out RUN"
    assert "outputs" in refused(line)
    assert not Path("RUN").exists()


def test_a_model_and_a_metric_of_python_itself_are_not_called():
    assert "part of Python itself" in refused("plan os:abort --budget 0.5")
    assert "part of Python itself" in refused(f"evaluate {NET} --data {NET} --metric os:system")
    assert "part of Python itself" in refused(f"evaluate {NET} --data {NET} --metric subprocess:call")


def test_functions_of_other_packages_and_objects_of_the_user_are_called():
    Path("mine.py").write_text(
        "import functools, operator\nfrom torch.nn import functional\n"
        "first = operator.itemgetter(slice(None))\nof = functools.partial(functional.softmax, dim=-1)\n"
    )
    for place in ("mine.py:first", "mine.py:of", "torch.nn.functional:relu"):
        done(f"prune {MLP} --data {SAMPLES} --budget 0.5 --repair none --outputs {place} --out {place[-3:]}")
    assert run(f"evaluate {MLP} --data cli.factories:samples --metric torch.nn.functional:cross_entropy").code == 0
