"""Inputs without data: fractal images, with which POT prunes when it has no data.

Image i is the attractor of a random iterated function system (Barnsley 1988): points are sent on by one of a few random
contractions x <- A x + b, over and over, and the logarithm of how many land on a pixel is its brightness; each channel
has another brightness and another background, 1/f noise. Channels have mean 0 and standard deviation 1, as normalised
images have. Every image is a function of (seed, i).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from allot.errors import UsageError
from allot.network.draws import generator, numbered

POINTS, ROUNDS = 1_000, 40


class Fractals(Dataset[tuple[Tensor]]):
    """`count` images `[channels, height, width]`, float32.

    Raises:
        UsageError: the shape is not three whole numbers above 0, or the count is not.
    """

    def __init__(self, shape: tuple[int, ...], count: int = 512, seed: int = 0) -> None:
        whole = all(isinstance(size, int) and size > 0 for size in (*shape, count))
        if len(shape) != 3 or not whole:
            raise UsageError(
                f"synthetic data of shape {list(shape)}: CHANNELS,HEIGHT,WIDTH is accepted, like 3,224,224."
            )
        self.shape, self.count, self.seed = tuple(shape), count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        draw = generator(numbered(self.seed, i))
        channels, height, width = self.shape
        attractor = _attractor(height, width, draw)
        strength = torch.rand(channels, generator=draw)[:, None, None] + 0.25
        sign = torch.where(torch.rand(channels, generator=draw) < 0.5, -1.0, 1.0)[:, None, None]
        image = sign * strength * attractor + 0.5 * torch.stack([_pink(height, width, draw) for _ in range(channels)])
        spread, mean = torch.std_mean(image, dim=(1, 2), correction=0, keepdim=True)
        return ((image - mean) / spread.clamp_min(1e-6),)


def _attractor(height: int, width: int, draw: torch.Generator) -> Float[Tensor, "height width"]:
    """Log density of an attractor, scaled to standard deviation 1."""
    maps = int(torch.randint(2, 5, (), generator=draw))
    A = 2 * torch.rand(maps, 2, 2, generator=draw) - 1
    A = A / torch.linalg.matrix_norm(A, 2)[:, None, None] * (0.4 + 0.5 * torch.rand(maps, 1, 1, generator=draw))
    b = 2 * torch.rand(maps, 2, generator=draw) - 1
    x = torch.zeros(POINTS, 2)
    seen = []
    for k in range(ROUNDS):
        chosen = torch.randint(maps, (POINTS,), generator=draw)
        x = (A[chosen] * x[:, None]).sum(-1) + b[chosen]
        if k >= ROUNDS // 4:
            seen.append(x)
    points = torch.cat(seen)
    low, high = points.amin(0), points.amax(0)
    places = ((points - low) / (high - low).clamp_min(1e-6) * torch.tensor([height - 1, width - 1])).round().long()
    density = torch.bincount(places[:, 0] * width + places[:, 1], minlength=height * width).float().log1p()
    image = density.view(height, width)
    return image / image.std(correction=0).clamp_min(1e-6)


def _pink(height: int, width: int, draw: torch.Generator) -> Float[Tensor, "height width"]:
    """Noise whose amplitude falls with frequency, as that of natural images does; standard deviation 1."""
    spectrum = torch.fft.rfft2(torch.randn(height, width, generator=draw))
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    image = torch.fft.irfft2(spectrum / frequency.clamp_min(1 / max(height, width)), s=(height, width))
    return image / image.std(correction=0).clamp_min(1e-6)
