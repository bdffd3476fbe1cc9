"""One paper or baseline a file; `METHODS` and `RECIPES` are dicts to read."""

from dataclasses import replace

from allot.methods.admm import Admm
from allot.methods.anew import Anew
from allot.methods.auto import Auto
from allot.methods.batchnorm import BatchNorm
from allot.methods.blocks import Blocks
from allot.methods.channel_baselines import GlobalChannels, Sensitivity
from allot.methods.depth import Depth
from allot.methods.distill import Distill
from allot.methods.dsa import Dsa
from allot.methods.fcpts import Fcpts, FcptsPaper
from allot.methods.knapsack import Knapsack
from allot.methods.layer_errors import LayerErrors
from allot.methods.lstsq import LeastSquares
from allot.methods.moments import OutputMoments
from allot.methods.owl import Owl
from allot.methods.pot import Layerwise, WeightMoments
from allot.methods.rules import erk, global_magnitude, global_normalised, lamp, uniform
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.methods.training.trial import Trial
from allot.methods.training.where_it_helps import Helps
from allot.methods.unipts import Unipts
from allot.methods.unipts_search import EXCESS, Search, equal_counts
from allot.run.problem import Method, Rule
from allot.run.recipes import RECIPES

__all__ = ["ALLOCATORS", "METHODS", "RECIPES", "REPAIRS", "VARIANTS"]

POLISH = Distill(
    Training(steps="auto", first=40, max_steps=320, learning_rate="auto"),
    Schedule(freeze_at=0.0),
    frozen=True,
    mixtures=1,
)

# how much each layer keeps
ALLOCATORS: dict[str, Method] = {
    "uniform": Rule(uniform, ("weights", "channels")),
    "erk": Rule(erk),
    "lamp": Rule(lamp),
    "global": Rule(global_magnitude),
    "global-normalised": Rule(global_normalised),
    "equal-counts": Rule(equal_counts),
    "depth": Depth(),
    "owl": Owl(),
    "knapsack": Knapsack(),
    "layer-errors": LayerErrors(),
    "auto": Auto(
        (("erk", Rule(erk)), ("lamp", Rule(lamp)), ("uniform", Rule(uniform))),
        Trial(Training(steps=40), Schedule(ramp=8.0), (BatchNorm(), OutputMoments(scale=True))),
    ),
    "fcpts": Fcpts(start=Rule(erk)),
    "fcpts-paper": FcptsPaper(start=Rule(erk)),
    "unipts-search": Search(
        (("fcpts", Fcpts(Rule(erk), Training(steps=90))),),
        Trial(Training(steps=16), Schedule(ramp=8.0), (BatchNorm(), OutputMoments(scale=True))),
    ),
    "unipts-paper": Search(
        (("equal-counts", Rule(equal_counts)),),
        Trial(statistics=(BatchNorm(), OutputMoments(scale=True)), one_shot=True),
        excess=EXCESS,
        relative=False,
        generations=25,
        population=25,
        parents=10,
        crossovers=12,
        mutants=12,
        mutation=0.1,
        strength=1.0,
        change="multiply",
        noise=0.01,
    ),
    "dsa": Dsa(),
    "global-channels": GlobalChannels(),
    "sensitivity": Sensitivity(),
}

# adjust the remaining weights
REPAIRS: dict[str, Method] = {
    "admm": Admm(),
    "admm-views": Admm(views=3),
    "anew": Anew(
        Fcpts(start=Rule(erk)),
        then=(BatchNorm(), POLISH),
        mixtures=1,
        helps=Helps(unfitted=1 / 8, far=1 / 8),
    ),
    "bn": BatchNorm(),
    "bias": OutputMoments(scale=False),
    "variance": OutputMoments(scale=True),
    "weight-moments": WeightMoments(),
    "layerwise": Layerwise(),
    "lstsq": LeastSquares(),
    "blocks": Blocks(),
    "distill": Distill(Training(learning_rate="auto")),
    "polish": replace(POLISH, helps=Helps(unfitted=1 / 8)),
    "unipts": Unipts(Training(learning_rate="auto")),
}

METHODS: dict[str, Method] = {**ALLOCATORS, **REPAIRS}

# what sets a method apart from another one of the same class, in the words of `allot methods`
VARIANTS = {
    "bias": "Match the mean of each output channel to that of the dense net.",
    "variance": "Match the mean and the spread of each output channel to those of the dense net.",
    "admm-views": "As admm, with random crops of every picture beside it in the statistics.",
    "polish": "Train the kept weights a little further; masks and batch norms stay. Stops when it no longer pays.",
    "unipts-search": "Learn how much each layer keeps by a short fcpts, where UniPTS's search starts, and stops here.",
    "unipts-paper": "Evolve how much each layer keeps, with the paper's schedule; every individual meets the budget.",
}
