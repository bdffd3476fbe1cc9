"""Base pictures of the data sets, the split they belong to, and random draws from them.

Only the two commands of the zoo (`data_build` and `train`) come here: reading digits needs scikit-learn, rendering
glyphs needs matplotlib (for its fonts) and Pillow. Everybody else reads the arrays that the package ships.

A *base* is a picture before augmentation: one handwritten digit, or one character in one font face. Every base
belongs to one of `train`, `validation`, `test`; a *draw* is a base turned, sheared, scaled, shifted, with noise.
"""

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16  # pixels, side of a drawn picture
SHIPPED = Path(str(resources.files("allot.sources.zoo")))  # where the package keeps weights and arrays

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
TRAIN_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("cmr10", "cmb10", "cmti10", "cmtt10"),
)
TEST_FACES = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmss10")


@dataclass(frozen=True)
class Bases:
    """Base pictures.

    images: `[N, 1, H, W]` float32 in 0..1, bright on black. labels, ids: `[N]` int64; an id names one base for good.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def at(self, index: Tensor) -> "Bases":
        """The bases at `index`, `[M]` int64, in that order; repeats allowed."""
        return Bases(self.images[index], self.labels[index], self.ids[index])


@dataclass(frozen=True)
class Jitter:
    """How far a draw may lie from its base; each value is uniform in its range, noise is normal.

    degrees: rotation within +-degrees. shear: x moves by +-shear * y. scale: factor. shift: +-pixels of the drawn
    picture. gain: factor on brightness. noise: standard deviation, where 1 is full brightness.
    """

    degrees: float
    shear: float
    scale: tuple[float, float]
    shift: float
    gain: tuple[float, float]
    noise: float


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: its bases by split, and the jitter of its draws."""

    bases: Callable[[], dict[str, Bases]]
    jitter: Jitter


def draw(bases: Bases, jitter: Jitter, generator: torch.Generator) -> Tensor:
    """One random draw of every base: `[N, 1, 16, 16]` uint8."""
    count = len(bases.labels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle = uniform(-jitter.degrees, jitter.degrees) * (math.pi / 180)
    shear = uniform(-jitter.shear, jitter.shear)
    scale = uniform(*jitter.scale)
    # 16 pixels are the interval -1..1, so that one pixel is 2 / 16
    dx, dy = (uniform(-jitter.shift, jitter.shift) * (2 / SIZE) for _ in range(2))
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = (torch.stack([cos, shear * cos - sin, dx], 1), torch.stack([sin, shear * sin + cos, dy], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, 2 * SIZE, 2 * SIZE], align_corners=False)
    images = F.avg_pool2d(F.grid_sample(bases.images, grid, align_corners=False), 2)  # [N, 1, 16, 16]
    images = images * uniform(*jitter.gain).view(-1, 1, 1, 1)
    images = images + jitter.noise * torch.randn(images.shape, generator=generator)
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def digits_bases() -> dict[str, Bases]:
    """The 1,797 handwritten 8x8 digits of scikit-learn, by split: 800 train, 200 validation, 797 test.

    Source: UCI Optical Recognition of Handwritten Digits, test part (Alpaydin and Kaynak 1998). The id of a base is
    its position in scikit-learn's array. The split is a fixed shuffle; writers are not recorded, so that one
    writer's digits lie in several splits.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)  # [1797, 1, 8, 8]
    everything = Bases(images, torch.from_numpy(bunch.target).long(), torch.arange(len(images)))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))  # a stream numpy keeps for good
    return {
        "train": everything.at(order[:800]),
        "validation": everything.at(order[800:1000]),
        "test": everything.at(order[1000:]),
    }


def glyph_bases() -> dict[str, Bases]:
    """62 characters in the font faces that come with matplotlib, by split: 868 train, 124 validation, 310 test.

    Test holds the faces that training never shows. Of the training faces each character gives two to validation,
    which are then not trained on. The id of a base is `face * 62 + character`, test faces counted after train faces.
    """
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [_render(fonts / f"{face}.ttf") for face in TRAIN_FACES + TEST_FACES]  # each [62, 1, 64, 64]
    characters = len(CHARACTERS)
    ids = torch.arange(len(faces) * characters)
    everything = Bases(torch.cat(faces), ids % characters, ids)
    face, character = ids // characters, ids % characters
    held_out = (face % 8) == (character % 8)  # two of the sixteen faces, others for the next character
    test = face >= len(TRAIN_FACES)
    return {
        "train": everything.at(ids[~test & ~held_out]),
        "validation": everything.at(ids[~test & held_out]),
        "test": everything.at(ids[test]),
    }


SOURCES = {
    "digits": Source(
        digits_bases, Jitter(degrees=35, shear=0.2, scale=(0.6, 1.0), shift=2, gain=(0.6, 1.0), noise=0.22)
    ),
    "glyph": Source(glyph_bases, Jitter(degrees=8, shear=0.1, scale=(0.85, 1.1), shift=1, gain=(0.7, 1.0), noise=0.1)),
}


def _render(path: Path) -> Tensor:
    """All characters in one face, `[62, 1, 64, 64]` in 0..1: one baseline, capitals 36 pixels high."""
    from PIL import Image, ImageDraw, ImageFont

    side, capital, baseline = 64, 36, 47
    layout = ImageFont.Layout.BASIC  # the other engine is not in every build of Pillow
    top = ImageFont.truetype(path, 1000, layout_engine=layout).getbbox("H", anchor="ls")[1]
    font = ImageFont.truetype(path, 1000 * capital / -top, layout_engine=layout)
    pictures = []
    for character in CHARACTERS:
        picture = Image.new("L", (side, side))
        ImageDraw.Draw(picture).text((side / 2, baseline), character, fill=255, font=font, anchor="ms")
        pictures.append(np.asarray(picture, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(pictures)).unsqueeze(1)
