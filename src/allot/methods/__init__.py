"""Every method by name, and the recipes that put them together: literal dicts to read."""

from allot.methods.auto import Auto
from allot.methods.batchnorm import BatchNorm
from allot.methods.distill import Distill
from allot.methods.erk import erk
from allot.methods.fcpts import Fcpts, FcptsPaper
from allot.methods.moments import OutputMoments
from allot.methods.ranking import global_magnitude, global_normalised, lamp
from allot.methods.uniform import uniform
from allot.run import Method, Recipe, Rule

METHODS: dict[str, Method] = {
    # allocate: how much each layer keeps
    "uniform": Rule(uniform),
    "erk": Rule(erk),
    "lamp": Rule(lamp),
    "global": Rule(global_magnitude),
    "global-normalised": Rule(global_normalised),
    "auto": Auto((("erk", Rule(erk)), ("lamp", Rule(lamp)), ("uniform", Rule(uniform)))),
    "fcpts": Fcpts(start=Rule(erk)),
    "fcpts-paper": FcptsPaper(start=Rule(erk)),
    # repair: adjust what is left
    "bn": BatchNorm(),
    "bias": OutputMoments(scale=False),
    "variance": OutputMoments(scale=True),
    "distill": Distill(),
}

RECIPES: dict[str, Recipe] = {
    "fcpts": Recipe("fcpts", repair=("bn",)),
    "fcpts-paper": Recipe("fcpts-paper", repair=("bn",)),
    "uniform": Recipe("uniform", repair=("bn", "variance")),
    "erk": Recipe("erk", repair=("bn", "variance")),
    "lamp": Recipe("lamp", repair=("bn", "variance")),
    "global": Recipe("global", repair=("bn", "variance")),
    "global-normalised": Recipe("global-normalised", repair=("bn", "variance")),
}
