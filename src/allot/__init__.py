"""Budgeted sparsification for PyTorch: a trained model and a budget in, a sparse model that meets it exactly out."""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING

from allot.lazy import lazily

if TYPE_CHECKING:
    from allot.api import *  # noqa: F403
    from allot.api import __all__ as __all__

lazily(__name__, over=("export",))

__version__ = _metadata.version("allot")
