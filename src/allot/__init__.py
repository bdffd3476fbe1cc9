"""Budgeted sparsification for PyTorch: a trained model and a budget in, a sparse model that meets it exactly out."""

from allot.allocation import Allocation
from allot.budget import Budget
from allot.calibration import Calibration
from allot.compute import Compute
from allot.errors import AllotError, BudgetError, Lost, PatternError, Stopped, UsageError, VerificationError
from allot.evaluate import evaluate
from allot.layers import Layer, Rules, Scope
from allot.masks import attach, fold
from allot.methods import METHODS, RECIPES
from allot.patterns import NM, Channels, Unstructured
from allot.prune import prune
from allot.reading import Readable
from allot.realise.certificate import verify
from allot.realise.export import export
from allot.realise.files import load
from allot.realise.slim import load_slim
from allot.realise.sparse import load_csr
from allot.result import Result
from allot.scores import SCORES
from allot.shares import sharing
from allot.sweep import sweep

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
    "Layer",
    "Lost",
    "PatternError",
    "Readable",
    "Result",
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
    "sharing",
    "sweep",
    "verify",
]
