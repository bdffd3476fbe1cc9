"""Lets torchvision and timm be imported beside a torch that torchvision was not compiled for, in tests only.

A torchvision wheel built for CUDA cannot load its compiled operators beside a CPU build of torch, and then stops at
its own import: it describes operators that nothing has declared. Declaring them is enough for everything that is
plain Python: `torchvision.models` for classification, `torchvision.transforms`, `torchvision.datasets` and `timm`.
Detection models still need the compiled operators. `conftest.py` calls `declare_operators_when_needed()`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


def declare_operators_when_needed() -> None:
    """Declares the operators at the first import of torchvision, by whomever; costs nothing where there is none."""
    sys.meta_path.insert(0, _AtFirstImport())


def declare_operators() -> tuple[str, ...]:
    """Names of the torchvision operators that had to be declared; empty when torchvision works or is absent.

    The declarations live as long as the process.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent
    if _compiled_operators_load(folder):
        return ()
    source = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    names = tuple(sorted(set(re.findall(r'register_fake\("torchvision::(\w+)"\)', source))))
    library = torch.library.Library("torchvision", "DEF")
    for name in names:
        library.define(f"{name}(Tensor input) -> Tensor")  # the name is all that the import asks for
    _kept_alive.append(library)
    return names


class _AtFirstImport(MetaPathFinder):
    """Finds nothing; is asked before anyone who does."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()


_kept_alive: list[Any] = []  # a Library takes its declarations along when it is collected


def _compiled_operators_load(folder: Path) -> bool:
    import torch

    for file in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(file))
        except OSError:
            continue
        return True
    return False
