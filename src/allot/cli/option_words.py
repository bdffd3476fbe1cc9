"""Options of methods in a line each: what it is, and when to change it; else what the class says about it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any

WORDS = {
    # training
    "steps": "batches to train for; more where the budget is hard, auto: while the watched inputs say that it pays",
    "learning_rate": "step of the weights, as a share of their size; lower where the loss jumps, auto: by trial",
    "optimizer": "adam or sgd; sgd only to repeat a paper",
    "rounds": "most rounds, each twice as long as the one before; more to search longer",
    "first": "steps of the first round with steps=auto; more where short rounds mislead",
    "max_steps": "most steps of all rounds with steps=auto; lower to be done sooner",
    "mixtures": "mixtures of two inputs beside each one; 0 where a mixture of inputs means nothing",
    "frozen": "batch norms keep their statistics; true where batches are small or unlike the training data",
    "unfitted": "least distance on fitted inputs, over that on held-out ones, to train at all; 0 to train in any case",
    "far": "least distance from the dense net to run at all; 0 to run in any case",
    # comparison with the dense net
    "temperature": "softens the classes that are compared; 1 for many or unsure classes, more for few and sure ones",
    "student_temperature": "the same for the sparse net; only to repeat a paper",
    "loss": "kl for classes, mse for values; where outputs are taken for the wrong kind",
    "outputs": "which tensors of the output are compared; where the model returns more than what counts",
    "blocks": "modules inside the model that are compared too; for deep nets that the outputs alone teach slowly",
    "block_weight": "weight of these modules in the loss; lower where they outweigh the outputs",
    # masks while weights train
    "every": "steps from one choice of masks to the next; more where choosing takes long",
    "freeze_at": "share of the steps after which masks stay; lower to leave more steps to the final masks",
    "ramp": "how many times the budget is used at first, less in short trainings; 1 for none",
    "ramp_until": "share of the steps until the budget is reached; lower to train longer at the budget",
    "one_shot": "judges without training; true where a trial takes too long",
    # allocation
    "slope": "how much denser the first blocks are than the last; negative to keep the last ones",
    "multiple": "how far above the mean an outlier is; only to repeat the paper",
    "spread": "how far densities may be from the mean; 0 is uniform",
    "densities": "densities at which each layer is tried; more of them to measure finer, and longer",
    "weighting": "relative, log or outputs: how errors of layers are added; outputs where a few layers matter most",
    "memory": "bytes of matrices at once; lower where memory is short, more passes follow",
    "among": "the allocations to choose from; leave out those that never win",
    "start": "allocation to start from; another one where erk is a poor start",
    "learn_from": "share of the steps before densities move; more where the first steps are unsteady",
    "distance": "how far densities may move; 0 keeps those of the start",
    "window": "how many weights near the threshold are looked at; more where densities jump",
    "absolute": "factor on the steps of densities; lower where they swing",
    "momentum": "of the optimiser; only to repeat the paper",
    "penalty": "weight of the budget in the loss; more where the budget is missed on the way",
    "starts": "allocations to start from; more to search wider",
    "excess": "share of the weights that may move from layer to layer; more to search wider",
    "relative": "whether `excess` is of the kept weights, not of all; false only to repeat the paper",
    "generations": "rounds of the search; more to search longer",
    "population": "allocations in the first round; more to search wider",
    "parents": "best ones that the next round comes from; only to repeat the paper",
    "crossovers": "mixtures of two parents in each round; more to search wider",
    "mutants": "changed parents in each round; more to search wider",
    "mutation": "chance that a layer of a mutant changes; lower to search nearby",
    "strength": "size of such a change; lower to search nearby",
    "change": "add or multiply; multiply only to repeat the paper",
    "noise": "added to inputs while allocations are judged; only to repeat the paper",
    "rate": "step at which densities of channels move; lower where they swing",
    "steepness": "how sharp the soft masks are, at first and at the end; only where densities do not settle",
    "hold": "implicit, lagrangian or admm: how the budget is held; the others only to compare",
    "space": "rank or log of the importance; log where a few channels stand far out",
    "sampled": "draws channels at random while it learns; true only to repeat the paper",
    "least": "share of its channels that each group keeps at least; more where a layer is emptied",
    "allocate": "the allocator that trains; another one to compare",
    # repairs of layers
    "iterations": "rounds of the solver in each layer; fewer to be done sooner, more at high sparsity",
    "refinement": "last steps on the final masks; more where the error of a layer stays high",
    "damping": "guards against few inputs; more of it where there are few, left out it is measured",
    "inputs": "sparse or dense: whose inputs a layer is fitted to; dense where errors pile up from layer to layer",
    "targets": "dense or sparse: what a layer should give; sparse where errors of earlier layers cannot be mended",
    "views": "random crops beside each picture in the statistics; 0 where a crop shows something else",
    "scale": "corrects the spread beside the mean; false where the mean alone is off",
    "limit": "largest correction of a row; lower where single channels explode",
    "batches": "batches that each layer is fitted to; more where the fit does not carry over",
    "passes": "passes over the inputs for each block; fewer to be done sooner",
    "moving": "masks are chosen again while blocks train; true where there is time for it",
    "base_decay": "how the base of the loss falls; below 1 only to repeat the paper",
    "decay": "how fast removed weights shrink; more to make masks settle",
    "growth": "score, gradient or saliency: what brings a weight back; gradient to search wider",
    "exchange": "share of the weights that may change places; lower where the loss jumps",
}


def words_of(method: Any, option: str) -> str:
    """An option in a line: from `WORDS`, else the first sentence about it in the docstring of the class that has it."""
    if option in WORDS:
        return WORDS[option]
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name == option:
            found = re.search(rf"^ +{option}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(type(method)) or "", re.MULTILINE)
            return " ".join(found[1].split()).partition(". ")[0].rstrip(".") if found else "see --paper"
        if is_dataclass(value) and not hasattr(value, "role") and option in {inner.name for inner in fields(value)}:
            return words_of(value, option)
    return "see --paper"
