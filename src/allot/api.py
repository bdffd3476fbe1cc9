"""The public names, which `import allot` gives."""

from allot.budget.allocation import Allocation
from allot.budget.budget import Budget
from allot.errors import (
    AllotError,
    BudgetError,
    GuaranteeMissed,
    Lost,
    PatternError,
    Stopped,
    UsageError,
    VerificationError,
)
from allot.export.certificate.certificate import verify
from allot.export.export import export
from allot.export.files.formats import load
from allot.export.files.slim import load_slim
from allot.export.runtimes.sparse import load_csr
from allot.methods import METHODS, RECIPES
from allot.network.attach import attach, fold
from allot.network.compute import Compute
from allot.network.layers import Layer, Rules, Scope
from allot.processes import sharing
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.pruning.search import search
from allot.pruning.sweep import sweep
from allot.run.calibration import Calibration
from allot.run.evaluate import evaluate
from allot.run.patterns import NM, Channels, Rows, Unstructured
from allot.run.reading import Readable
from allot.run.scores import SCORES
from allot.sources import zoo

__all__ = [
    "METHODS",
    "NM",
    "RECIPES",
    "SCORES",
    "Allocation",
    "AllotError",
    "Budget",
    "BudgetError",
    "Calibration",
    "Channels",
    "Compute",
    "GuaranteeMissed",
    "Layer",
    "Lost",
    "PatternError",
    "Readable",
    "Result",
    "Rows",
    "Rules",
    "Scope",
    "Stopped",
    "Unstructured",
    "UsageError",
    "VerificationError",
    "attach",
    "evaluate",
    "export",
    "fold",
    "load",
    "load_csr",
    "load_slim",
    "prune",
    "search",
    "sharing",
    "sweep",
    "verify",
    "zoo",
]
