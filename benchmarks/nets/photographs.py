"""Crops of photographs from a folder, split by photograph between calibration and held-out data.

Debian's packages of wallpapers hold photographs under free licences, beside drawings, which are left out.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from allot.errors import UsageError

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
SIZE = re.compile(r"\d+x\d+")  # the name of a file that is one of several sizes of a photograph
_PLASMA = "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path Volna"
_LXQT = "Valendas after-the-rain appleflower beam butterfly cloud drop flowers fog this-is-not-windows"
_LOMIRI = "Bridge Dragonfly Picture Wine aitzgorri free friends greentock life picosdeeuropa seeding sunset"
DEBIAN = {  # package -> patterns of the files in it that are photographs
    "mate-backgrounds": ("usr/share/backgrounds/mate/nature/*",),
    "lomiri-wallpapers-16.04": tuple(f"usr/share/backgrounds/{name}_*" for name in _LOMIRI.split()),
    "lomiri-wallpapers-20.04": ("usr/share/backgrounds/Kleiber_*",),
    "lxqt-themes": tuple(f"usr/share/lxqt/wallpapers/{name}.*" for name in _LXQT.split()),
    "plasma-workspace-wallpapers": tuple(
        f"usr/share/wallpapers/{name}/contents/images/*" for name in (*_PLASMA.split(), "summer_1am")
    ),
}
PACKAGES = f"""Photographs: a folder of images, at best 40 or more, without drawings. Files that are called WIDTHxHEIGHT
in one folder are sizes of one photograph, of which the largest is used. Half of the photographs, by the digest of their
content, are held out. Debian packages that hold some: {", ".join(DEBIAN)};
`python -m benchmarks.nets.debian photographs FOLDER` downloads them by apt-get and leaves the drawings out."""


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """(photographs to calibrate with, photographs that are held out): halves of those below `folder`, by digest.

    Raises:
        UsageError: no folder, or fewer than four photographs in it.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    photographs: dict[Path, Path] = {}  # sizes of one photograph count once: the largest file
    for file in files:
        key = file.parent if SIZE.fullmatch(file.stem) else file
        if key not in photographs or file.stat().st_size > photographs[key].stat().st_size:
            photographs[key] = file
    by_digest = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in photographs.values()}
    if len(by_digest) < 4:
        raise UsageError(f"--photos {folder}: {len(by_digest)} images found, at least 4 photographs are needed.")
    ordered = [by_digest[digest] for digest in sorted(by_digest)]
    return ordered[::2], ordered[1::2]


def crops(files: list[Path], count: int, side: int, *, seed: int, flip: bool = False) -> Tensor:
    """`count` square crops of the photographs in turns, uint8 `[count, 3, side, side]`.

    A crop has 35 to 100 % of the shorter side, at a random place; with `flip` half of the crops are mirrored.
    """
    draw = torch.Generator().manual_seed(seed)
    found: list[Tensor] = [torch.empty(0)] * count
    for first, file in enumerate(files[:count]):
        with Image.open(file) as opened:
            opened.draft("RGB", (4 * side, 4 * side))
            image = opened.convert("RGB")
        image = image.reduce(max(1, min(image.size) // (4 * side)))
        shorter = min(image.size)
        for place in range(first, count, len(files)):
            share, left, top, turn = torch.rand(4, generator=draw).tolist()
            length = max(1, round(shorter * (0.35 + 0.65 * share)))
            x, y = (round(at * (size - length)) for at, size in zip((left, top), image.size, strict=True))
            part = image.resize((side, side), Image.Resampling.BICUBIC, (x, y, x + length, y + length))
            pixels = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
            found[place] = pixels.flip(2) if flip and turn < 0.5 else pixels
    return torch.stack(found)
