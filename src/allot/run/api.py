"""The names that `allot.run` gives."""

from allot.run.calibration import Calibration
from allot.run.driver import Progress, drive
from allot.run.patterns import NM, Channels, Pattern, Rows, Unstructured
from allot.run.problem import Candidate, Method, Metrics, Problem, Rule
from allot.run.recipes import Recipe
from allot.run.store import State

__all__ = [
    "NM",
    "Calibration",
    "Candidate",
    "Channels",
    "Method",
    "Metrics",
    "Pattern",
    "Problem",
    "Progress",
    "Recipe",
    "Rows",
    "Rule",
    "State",
    "Unstructured",
    "drive",
]
