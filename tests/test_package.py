"""What is handed out: the sdist and the wheel hold all of the package and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = {
    file.relative_to(ROOT / "src").as_posix()
    for file in (ROOT / "src" / "allot").rglob("*")
    if file.is_file() and "__pycache__" not in file.parts
}
BUILD = """
from setuptools import build_meta
build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build backend makes of a clean checkout in which a run has left its files."""
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, checkout)
    (checkout / "runs" / "first").mkdir(parents=True)
    (checkout / "runs" / "first" / "model.safetensors").touch()
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert "Deprecat" not in built.stderr
    return checkout / "dist"


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = {PurePosixPath(name).name: name for name in names if ".dist-info/" in name}
        metadata = archive.read(about["METADATA"]).decode()
        entry_points = archive.read(about["entry_points.txt"]).decode()
    assert {name for name in names if ".dist-info/" not in name} == PACKAGE
    assert {"allot/py.typed", "allot/sources/zoo/weights/glyph-vit.safetensors", "allot/report/run.html"} <= PACKAGE
    assert "LICENSE" in about
    assert "allot = allot.cli.main:main" in entry_points
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"^Provides-Extra: (\S+)$", metadata, flags=re.MULTILINE)) == set(extras)


def test_the_sdist_holds_the_package_and_no_tests_benchmarks_or_runs(dist: Path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {PurePosixPath(*PurePosixPath(member.name).parts[1:]) for member in archive if member.isfile()}
    assert {PurePosixPath("src") / name for name in PACKAGE} <= names
    assert {name.parts[0] for name in names if len(name.parts) > 1} == {"src"}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= {str(name) for name in names}


def test_one_oldest_python_is_named_everywhere_and_no_untested_one():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = pyproject["project"]["requires-python"].removeprefix(">=")
    declared = [c.rpartition(" ")[2] for c in pyproject["project"]["classifiers"] if ":: Python :: 3." in c]
    assert declared == [oldest]  # one that was tested besides is added here, and in the classifiers
    assert pyproject["tool"]["mypy"]["python_version"] == oldest
    assert pyproject["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_the_changelog_keeps_its_form_and_begins_with_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - (unreleased|\d{4}-\d\d-\d\d)", release) for release in releases)
    assert releases[0].startswith(f"[{version}]")
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for release in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        sections = re.findall(r"^### (.*)$", release, flags=re.MULTILINE)
        assert sections == [kind for kind in kinds if kind in sections] != []
        listed = re.findall(r"^(.*)$", release.partition("### ")[2], flags=re.MULTILINE)
        assert all(line == "" or line.startswith(("- ", "  ", "### ")) or line in kinds for line in listed)


def test_torch_has_no_upper_end_and_the_version_tested_is_in_the_constraints():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (torch,) = [line for line in dependencies if re.match(r"torch\b(?!-)", line)]
    least = torch.removeprefix("torch>=")
    tested = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    assert "<" not in torch and tested.startswith(f"{least}.")
