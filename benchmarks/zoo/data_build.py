"""Rebuild the arrays that the package ships: `python -m benchmarks.zoo.data_build [--out DIR]`.

Needs scikit-learn, matplotlib and Pillow. The shipped arrays are the reference: another version of FreeType or of
torch may round a pixel differently.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from benchmarks.zoo.drawing import SHIPPED, SOURCES, draw

DRAWS = {  # data set -> split -> (split of the bases, how many draws, going round the bases)
    "digits": {"calibration": ("train", 1000), "validation": ("validation", 4 * 200), "test": ("test", 4 * 797)},
    "glyph": {"calibration": ("train", 1000), "validation": ("validation", 8 * 124), "test": ("test", 10 * 310)},
}

log = logging.getLogger("allot")


def build(name: str, seed: int = 20) -> dict[str, np.ndarray]:
    """The arrays of one data set, three a split: images `[N, 16, 16]` uint8, labels `[N]` uint8, ids `[N]` uint16.

    Args:
        name: "digits" or "glyph".
        seed: of all draws; the training command uses other seeds.
    Returns:
        `{"calibration_images": ..., "calibration_labels": ..., "calibration_ids": ..., "validation_images": ...}`; an
        id names the base picture.
    Raises:
        KeyError: any other name.
    """
    source = SOURCES[name]
    bases = source.bases()
    arrays = {}
    for number, (split, (origin, draws)) in enumerate(DRAWS[name].items()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        chosen = bases[origin].at(torch.arange(draws) % len(bases[origin].labels))
        arrays[f"{split}_images"] = draw(chosen, source.jitter, generator).squeeze(1).numpy()
        arrays[f"{split}_labels"] = chosen.labels.numpy().astype(np.uint8)
        arrays[f"{split}_ids"] = chosen.ids.numpy().astype(np.uint16)
    return arrays


def main() -> None:
    """Write every data set and log sizes, means and standard deviations."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.data_build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED / "data", help="folder for the .npz files")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in SOURCES:
        arrays = build(name)
        np.savez_compressed(out / f"{name}.npz", **arrays)  # type: ignore[arg-type]  # an array is no `allow_pickle`
        pixels = arrays["calibration_images"] / 255
        log.info("%s: mean %.3f, standard deviation %.3f", name, pixels.mean(), pixels.std())
        log.info("  %s", {key: array.shape for key, array in arrays.items()})


if __name__ == "__main__":
    main()
