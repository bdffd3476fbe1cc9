"""The three nets of a face cascade (MTCNN, Zhang et al. 2016) on 100 faces and 100 other pictures of 25 pixels.

Even pictures calibrate, mirrored ones too; odd ones are held out. P-Net is convolutional and gives a map of answers,
R-Net and O-Net see the pictures at 24 and 48 pixels. A box is four offsets as shares of the picture's side.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nets.net import Net, outputs_of
from benchmarks.nets.packages import execute, folder_of

SIDES = {"pnet": 25, "rnet": 24, "onet": 48}
METRICS = {
    "agreement": "percent of held-out answers, face or not, that are those of the dense net",
    "box error": "mean distance of a box offset from the dense net's",
    "right": "percent of held-out answers that are true",
}


def load(name: str, *, seed: int = 0) -> Net:
    """The net called "pnet", "rnet" or "onet"; nothing is drawn, so that `seed` changes nothing.

    Raises:
        UsageError: facenet-pytorch or scikit-image is not installed.
    """
    folder = folder_of("facenet_pytorch", "facenet-pytorch")
    detect = {"detect_face": None, "extract_face": None}
    stubs = {"facenet_pytorch": {}, "facenet_pytorch.models": {}, "facenet_pytorch.models.utils": {}}
    stubs["facenet_pytorch.models.utils.detect_face"] = detect
    module = execute(folder / "models" / "mtcnn.py", "facenet_pytorch.models.mtcnn", stubs)
    net = getattr(module, {"pnet": "PNet", "rnet": "RNet", "onet": "ONet"}[name])(pretrained=False)
    net.load_state_dict(torch.load(folder / "data" / f"{name}.pt", map_location="cpu", weights_only=True))
    net.eval()
    every, faces = pictures(SIDES[name])
    inputs, truth = every[1::2], faces[1::2]
    dense = outputs_of(net, inputs)

    def measure(model: nn.Module) -> dict[str, float]:
        boxes, *_, chances = outputs_of(model, inputs)
        same = chances.argmax(1) == dense[-1].argmax(1)  # [N], or a map of answers
        found = chances[:, 1].reshape(len(chances), -1).amax(1) > 0.5
        return {
            "agreement": 100 * float(same.double().mean()),
            "box error": float((boxes - dense[0]).abs().mean()),
            "right": 100 * float((found == truth).double().mean()),
        }

    return Net(name, net, torch.cat([every[::2], every[::2].flip(3)]), measure, METRICS)


def pictures(side: int) -> tuple[Tensor, Tensor]:
    """(200 grey pictures as three channels, float32 `[200, 3, side, side]` from -1 to 1, whether each is a face)."""
    grey = torch.from_numpy(np.load(folder_of("skimage", "scikit-image") / "data" / "lfw_subset.npy")).float()
    pixels = F.interpolate(255 * grey[:, None], side, mode="bilinear", antialias=True)
    return (pixels.expand(-1, 3, -1, -1).contiguous() - 127.5) / 128, torch.arange(len(grey)) < 100
