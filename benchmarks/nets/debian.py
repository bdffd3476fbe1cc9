"""Photographs and prose from Debian packages, without installing them: `python -m benchmarks.nets.debian prose DIR`."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.nets import photographs, prose

WANTED = {"photographs": photographs.DEBIAN, "prose": prose.DEBIAN}
log = logging.getLogger("allot")


def fetch(packages: Mapping[str, Sequence[str]], folder: Path) -> list[str]:
    """Unpacks what matches a package's patterns into FOLDER/PACKAGE, where that is not there; the packages missing.

    A package is missing where apt-get does not know it or is not there itself, or no file matches.
    """
    missing = [package for package in packages if not (folder / package).exists()]
    if not missing or not shutil.which("apt-get"):
        return missing
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
    for package in list(missing):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            log.info("%s: downloading", package)
            ran = subprocess.run(["apt-get", "download", "-qq", package], cwd=scratch, capture_output=True, text=True)
            if ran.returncode:
                log.warning("%s: %s", package, ran.stderr.strip().rpartition("\n")[2])
                continue
            (archive,) = Path(scratch).glob("*.deb")
            unpack(archive, packages[package], unpacked := Path(scratch) / "unpacked")
            if not any(unpacked.iterdir()):
                log.warning("%s: this release of it has no file like %s", package, " ".join(packages[package]))
                continue
            unpacked.rename(folder / package)
            missing.remove(package)
    return missing


def unpack(package: Path, patterns: Sequence[str], folder: Path) -> None:
    """Unpacks the files of a .deb whose path matches a pattern."""
    folder.mkdir()
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as dpkg,
        tarfile.open(fileobj=dpkg.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = member.name.removeprefix("./")
            if member.isfile() and any(fnmatchcase(path, pattern) for pattern in patterns):
                archive.extract(member, folder, filter="data")


def main() -> int:
    """Fetch one kind of files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nets.debian", description=__doc__)
    parser.add_argument("kind", choices=WANTED)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if missing := fetch(WANTED[options.kind], options.folder):
        log.warning("missing: %s", ", ".join(missing))
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
