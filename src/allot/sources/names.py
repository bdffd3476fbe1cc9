"""The forms of MODEL and DATA, and what can be checked in them before torch is imported."""

from __future__ import annotations

from pathlib import Path

from allot.errors import UsageError, unknown

MODEL_FORMS = (
    "zoo:NAME, torchvision:NAME, timm:NAME, hf:NAME_OR_DIR, hf:DIR/FILE.gguf, package.module:factory or file.py:factory"
)
DATA_FORMS = "zoo:NAME, folder:DIR, npz:FILE, text:FILE, synthetic[:C,H,W], package.module:factory or file.py:factory"
REMOTE = ("torchvision", "timm", "hf")  # origins that fetch trained weights
NO_FILE = ("default", "random")  # weights by name
_ZOO = Path(__file__).parent / "zoo"


def check_model(spec: str, weights: str | None = None) -> None:
    """Raises:
    UsageError: another form, an unknown net of the zoo, or a file of code or of weights that does not exist.
    """
    origin, _, name = spec.partition(":")
    if not name:
        raise UsageError(f"MODEL {spec!r}: {MODEL_FORMS} is accepted.")
    if weights == "random" and origin not in REMOTE:
        raise UsageError(f"--weights random is for {', '.join(f'{o}:' for o in REMOTE)} models; {spec} has its own.")
    if origin == "zoo":
        _check_zoo("model", name, zoo_models())
    _check_code(spec)
    if weights is not None and weights not in NO_FILE and not Path(weights).exists():
        raise UsageError(f"{weights}: no such file or directory.")


def check_data(spec: str) -> None:
    """Raises:
    UsageError: another form, an unknown data set of the zoo, or a file or folder that does not exist.
    """
    origin, _, name = spec.partition(":")
    if origin == "synthetic":
        return
    if not name:
        raise UsageError(f"DATA {spec!r}: {DATA_FORMS} is accepted.")
    if origin == "zoo":
        _check_zoo("data set", name, (*(file.stem for file in _ZOO.glob("data/*.npz")), *zoo_models()))
    if origin in ("npz", "folder", "text") and not Path(name).exists():
        raise UsageError(f"{name}: no such {'folder' if origin == 'folder' else 'file or directory'}.")
    _check_code(spec)


def zoo_models() -> list[str]:
    """Names of the nets of the zoo.

    >>> zoo_models()
    ['digits-resnet20', 'glyph-mobilenetv2', 'glyph-resnet20', 'glyph-vit']
    """
    return sorted(file.stem for file in _ZOO.glob("weights/*.safetensors"))


def _check_zoo(kind: str, name: str, accepted: list[str] | tuple[str, ...]) -> None:
    if name not in accepted:
        raise unknown(f"zoo {kind}", name, accepted)


def _check_code(spec: str) -> None:
    where = spec.rpartition(":")[0]
    if where.endswith(".py") and not Path(where).exists():
        raise UsageError(f"cannot import {where!r} of {spec!r}: No such file.")
