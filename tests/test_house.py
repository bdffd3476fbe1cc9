"""The house rules that no tool checks: dependencies are justified, data is shipped, documentation runs."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import allot
from cli import command

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "allot"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = [
    file.relative_to(ROOT)
    for file in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    if re.search(r"^ *```(python|bash|console)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
]

GUIDE = ROOT / "docs" / "howto" / "method.md"

# Written so that it does not match itself.
REGISTRY_HOST = re.compile(
    rb"py(?:pi|thonhosted)\.org|npmjs\.(?:com|org)|anaconda\.(?:com|org)|download\.pytorch\.org|crates\.io",
    re.IGNORECASE,
)


# Dependencies and files


def test_every_dependency_is_justified_and_every_justification_has_its_dependency():
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {re.match(r"[\w.-]+", requirement)[0] for group in groups for requirement in group} - {"allot"}
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^- `([^`]+)`: \S", page, flags=re.MULTILINE)) == wanted


def test_no_file_names_the_host_of_a_package_registry():
    listing = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not list the files here: {error}")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert files
    assert [str(file) for file in files if REGISTRY_HOST.search(file.read_bytes())] == []


def test_every_data_file_of_the_package_is_shipped():
    patterns = [pattern.removeprefix("**/") for pattern in PYPROJECT["tool"]["setuptools"]["package-data"]["*"]]
    data = [file for file in SOURCE.rglob("*") if file.is_file() and file.suffix not in {".py", ".pyc"}]
    assert [str(file) for file in data if not any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)] == []


def test_no_source_file_is_longer_than_400_lines():
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


# Documentation


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory that the reader works in; modules written there can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_the_code_of_a_document_runs(document: Path, reader: Path, monkeypatch: pytest.MonkeyPatch):
    """On few inputs and with few steps; as it is written below."""
    monkeypatch.setattr(allot, "prune", on_little(allot.prune))
    assert run_document(ROOT / document) > 0


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_all_code_of_a_document_runs_as_it_is_written(document: Path, reader: Path):
    assert run_document(ROOT / document, slow=True) > 0


@pytest.mark.slow
def test_the_method_of_the_guide_passes_its_test_and_the_contract(reader: Path):
    files = {mark: b.text for b in blocks_of(GUIDE.read_text()) for mark in b.marks if mark.endswith("energy.py")}
    assert set(files) == {"energy.py", "test_energy.py"}
    adding = "def pytest_collection():\n from allot.methods import METHODS\n from energy import Energy\n"
    files["adding.py"] = adding + ' METHODS["energy"] = Energy()\n'  # the one line
    for name, text in files.items():
        Path(name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "adding", "-k", "energy"]
    ran = subprocess.run(
        [*command, "tests/contract", str(reader / "test_energy.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(reader)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 40  # the contract found it


def test_a_document_runs_in_order_and_shares_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    document = tmp_path / "guide.md"
    document.write_text(
        "```python\nx = 1\n```\n"
        "```python no-run\nraise SystemExit\n```\n"
        "```python slow\nraise SystemExit\n```\n"
        "```yaml recipe.yaml\nmethod: erk\n```\n"
        "1. Nested:\n   ```python\n   from pathlib import Path\n   found = x, Path('recipe.yaml').read_text()\n   ```\n"
        "```python\nassert found == (1, 'method: erk\\n')\n```\n"
        "```text\nnot code\n```\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run_document(document) == 4
    document.write_text("words\n\n```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as failure:
        run_document(document)
    assert failure.traceback[-1].lineno + 1 == 4  # the line of the document, not of the block


def test_a_document_is_run_on_little():
    asked = "--samples 64 --set options.fcpts.steps=20 --set options.polish.steps=auto --max-steps 9"
    little = f"--samples {INPUTS} --set options.fcpts.steps={STEPS} --set options.polish.steps=auto --max-steps {STEPS}"
    assert with_little(["prune", "a", *asked.split()]) == ["prune", "a", *little.split()]
    assert with_little(["sweep", "a", "--data", "b"]) == ["sweep", "a", "--data", "b", "--samples", str(INPUTS)]
    assert with_little(["prune", "a", "--samples", "3"]) == ["prune", "a", "--samples", "3"]
    assert with_little(["plan", "a", "--budget", "macs=50%"]) == ["plan", "a", "--budget", "macs=50%"]
    called = on_little(lambda *given, **named: (given, named))
    options = {"dsa": {"steps": 90, "space": "log"}, "polish": {"steps": "auto"}}
    assert called(1, options=options, samples=64) == (
        (1,),
        {
            "samples": INPUTS,
            "options": {"dsa": {"steps": STEPS, "space": "log"}, "polish": {"steps": "auto"}},
        },
    )


def test_only_lines_of_allot_are_commands():
    text = "make install\nallot plan a \\\n  --b 'c d'  # why\n$ allot verify runs/x\nallotment\nok\n"
    block = Block("console", frozenset(), 1, text)
    assert list(commands_of(block)) == [["plan", "a", "--b", "c d"], ["verify", "runs/x"]]


@dataclass(frozen=True)
class Block:
    language: str
    marks: frozenset[str]
    line: int
    text: str


def run_document(document: Path, *, slow: bool = False) -> int:
    """How many blocks of the document were run, in the current directory; CONTRIBUTING.md tells the conventions.

    Args:
        slow: the blocks marked slow too, every command as it is written, and in the README a process for each verb.
    """
    names: dict[str, object] = {"__name__": "document"}
    verbs: set[str] = set()  # that had a process of their own
    done = 0
    for block in blocks_of(document.read_text(encoding="utf-8")):
        commands = list(commands_of(block))
        if "no-run" in block.marks or ("slow" in block.marks and not slow):
            continue
        if file := next((mark for mark in block.marks if "." in mark), None):
            Path(file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, document, "exec"), names)
        elif commands:
            for arguments in commands:
                alone = document.name == "README.md" and arguments[0] not in verbs and (slow or not verbs)
                verbs.add(arguments[0])
                run = run_allot if alone else run_here
                run(arguments if slow else with_little(arguments), f"{document.name}:{block.line}")
        else:
            continue
        done += 1
    return done


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text, without the indentation of their fences."""
    fence = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]+)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(text):
        language, *marks = match["info"].split()
        line = text.count("\n", 0, match.start()) + 1
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        yield Block(language, frozenset(marks), line, body)


def commands_of(block: Block) -> Iterator[list[str]]:
    """The arguments of every line of a shell block that calls allot."""
    if block.language not in {"bash", "console"} or "no-run" in block.marks:
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ")
        if command.startswith("allot "):
            _, *arguments = shlex.split(command, comments=True)
            if shell := {"|", "||", "&", "&&", ";", "<", ">", ">>"} & set(arguments):
                raise ValueError(
                    f"{command!r} uses {sorted(shell)}: only plain commands are run. Mark the block no-run."
                )
            yield arguments


INPUTS, STEPS = 24, 3


def with_little(arguments: list[str]) -> list[str]:
    """A command that runs methods, on `INPUTS` inputs at most and with at most `STEPS` steps of training."""
    if arguments[0] not in {"prune", "sweep"}:
        return arguments
    less = [*arguments]
    for at, (option, value) in enumerate(itertools.pairwise(arguments), start=1):
        if option in {"--samples", "--max-steps"}:
            less[at] = str(min(int(value), INPUTS if option == "--samples" else STEPS))
        elif counted := re.fullmatch(r"(options\.[\w-]+\.steps=)(\d+)", value):
            less[at] = counted[1] + str(min(int(counted[2]), STEPS))
    return less if "--samples" in less or "--data" not in less else [*less, "--samples", str(INPUTS)]


def on_little(prune: Callable[..., Any]) -> Callable[..., Any]:
    """`allot.prune` with at most `INPUTS` samples and `STEPS` steps where a call says how many."""

    def pruned(*given: Any, samples: int | None = None, options: Any = None, **named: Any) -> Any:
        less = {
            method: {**some, **({"steps": min(some["steps"], STEPS)} if isinstance(some.get("steps"), int) else {})}
            for method, some in (options or {}).items()
        }
        return prune(*given, samples=samples and min(samples, INPUTS), options=less or None, **named)

    return pruned


def run_here(arguments: list[str], where: str) -> None:
    # no process of its own: starting one takes longer than most of these commands; one, the README's first, will do
    ended = command.run(shlex.join(arguments))
    assert ended.code == 0, f"{where}: allot {shlex.join(arguments)} exited {ended.code}\n{ended.err}{ended.out}"


def run_allot(arguments: list[str], where: str) -> None:
    # `python -m allot`, after what conftest.py does for torchvision and for scores
    start = """
import runpy, vision
vision.declare_operators_when_needed()
import pictures
pictures.score_on_few()
runpy.run_module("allot", run_name="__main__", alter_sys=True)
"""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    ran = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, (
        f"{where}: allot {shlex.join(arguments)} exited {ran.returncode}\n{ran.stderr}{ran.stdout}"
    )
