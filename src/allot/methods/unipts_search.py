"""UniPTS, the search: densities by reducing and regrowing (Xie et al., CVPR 2024). The training is beside it.

    l        layer; n_l weights, k_l of them kept;  u_l weights that a uniform density keeps
    x_l, a_l genome, and a = softmax(x): fractions of what is grown again;  e excess

An individual is decoded by reducing and regrowing:

    reduce    r_l = (1 - e) u_l        every layer down to one density, which is a floor: a fraction e is free
              r_l = u_l - e n_l        the paper's form, e = 0.05, where `relative` is off
    regrow    k_l = min(r_l + c a_l, most that l may keep),  c the largest number that the budget allows

so that weights that do not fit into a full layer go to the others (water-filling), then to whole numbers
(`Budget.counts`). Individuals are encoded the other way round, a_l ~ k_l - r_l, so that any allocation can start the
search.

    fitness   minus the loss of `allot.methods.training.trial` on held-out calibration samples, the same samples,
              batches and draws for all; kept by counts, so that nothing is tried twice
    generation g: parents are the best of all that were tried (the best is never lost);
              crossover takes each gene from one of two of them; mutation changes genes with probability `mutation`

`unipts-search` has one start, the densities that a short FCPTS learns, and stops there: one individual needs no trial,
and trials of 16 steps chose worse (docs/methods/unipts.md). `unipts-paper` has the paper's schedule.

Differences from the authors' code:
    - the fitness is the KL to the dense net on held-out samples; there, top-1 on those that are trained on later;
    - clipped fractions go to other layers; there, they are lost and the net is sparser than the budget. Where the
      pruned fraction plus e exceeds 1, layers are reduced to their floor; there, they are emptied;
    - the best is never lost, and chosen by its fitness; there, the last children are drawn and judged once more;
    - statistics by exact pooling, as in `bn`; there, by momentum, over the last batches. Without batch norm, mean and
      spread of outputs are corrected in its place;
    - input noise is a fraction of each sample's deviation; there, 1e-6 in absolute units, which float32 swallows;
    - weights are sorted once; there, in every forward pass of every individual, on a copy of the net.
The paper's search costs 12.8 million images forward on ImageNet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from allot.budget.bisection import bracket
from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError, check_flag, check_number, unknown
from allot.methods.training.selection import CollectedEvidence, allocated, scored
from allot.methods.training.trial import Trial, halves
from allot.network.draws import generator, numbered
from allot.run.calibration import Noisy
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State

EXCESS = 0.05  # the paper's, of all weights
MUTATIONS = ("add", "multiply")


@dataclass(frozen=True)
class Search:
    """Evolve how much each layer keeps; every individual meets the budget.

    Args:
        starts: (name, allocator) pairs; where individuals are tried, starts run on the training half of the samples.
        trial: the fitness.
        excess: e, above 0, at most 1.
        relative: whether e is a fraction of the weights kept or, as in the paper, of all weights.
        generations: after the first population, 0 or more.
        population: individuals of the first population: the starts, filled up with genomes at random.
        parents, crossovers, mutants: of each generation.
        mutation: probability that a gene of a mutant changes.
        strength: standard deviation of a change.
        change: "add" it to the gene, or "multiply" the gene by 1 + it.
        noise: of inputs while individuals are judged, as a fraction of a sample's standard deviation.
    Raises:
        UsageError: a value out of its range.
    State:
        starts: {"name", "kept": layer -> weights} of the starts that are done.
        inner: state of the start that runs now.
        each: steps of one trial; 0 where nothing is tried.
        pool: {"name", "x": genome, "kept", "generation", "losses": [that of its trial]} of every individual so far.
        queue: places in the pool of the individuals that wait for their trial.
        generation: that of the queue.
        best: lowest loss after each generation.
        order: layer -> flat indices of its weights, best-scored first, `[n_l]`; where the trial is one-shot.
        trial: as in `Trial`, of the individual that is tried now.
        answers: batch of the judging half -> the dense net's outputs on it; None where inputs do not repeat.
    """

    starts: tuple[tuple[str, Method], ...]
    trial: Trial
    excess: float = 0.9
    relative: bool = True
    generations: int = 0
    population: int = 1
    parents: int = 4
    crossovers: int = 3
    mutants: int = 3
    mutation: float = 0.3
    strength: float = 0.5
    change: str = "add"
    noise: float = 0.0

    role = "allocate"
    needs_data = True
    parallel = True

    def __post_init__(self) -> None:
        check_number("excess", self.excess, 1e-6, 1)
        check_flag("relative", self.relative)
        for name in ("generations", "crossovers", "mutants"):
            check_number(name, getattr(self, name), 0, whole=True)
        for name in ("population", "parents"):
            check_number(name, getattr(self, name), 1, whole=True)
        check_number("mutation", self.mutation, 0, 1)
        for name in ("strength", "noise"):
            check_number(name, getattr(self, name), 0)
        if self.change not in MUTATIONS:
            raise unknown("change", str(self.change), MUTATIONS)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        train = self._problem_of_starts(problem)
        allocating = sum(method.init(train, candidate)["steps"] for _, method in self.starts)
        individuals = max(self.population, len(self.starts)) + (self.crossovers + self.mutants) * self.generations
        each = self.trial.steps(problem, candidate) if self.tries else 0
        return {
            "step": 0,
            "steps": int(allocating + each * individuals),
            "each": each,
            "starts": [],
            "pool": [],
            "queue": [],
            "generation": 0,
            "best": [],
            "answers": {} if problem.inputs().repeats() else None,
        }

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of a start, or one calibration batch of a trial, or whole trials (`Trial.try_first`)."""
        if len(state["starts"]) < len(self.starts):
            state["step"] += 1
            return self._step_of_start(problem, candidate, state)
        if not state["pool"]:
            self._populate(problem, state)
        forward = self._rank_weights(problem, candidate, state) if self.trial.one_shot and "order" not in state else 0
        queued = [state["pool"][i]["kept"] for i in state["queue"]]
        waiting = [partial(self._individual, problem, candidate, state, kept) for kept in queued]
        metrics, losses = self.trial.try_first(self._with_noise(problem), state, waiting, state["answers"])
        generation = state["generation"]
        for loss in losses:
            state["pool"][state["queue"].pop(0)]["losses"].append(loss)
        if losses:
            self._fill_queue(problem, state)
        return metrics | {"forward": metrics["forward"] + forward, "generation": generation}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the best allocation of all, not with the tensors of its trial."""
        if not self.tries:
            state["pool"] = [row | {"generation": 0, "losses": []} for row in state["starts"]]
        best = self._ranked(state)[0] if self.tries else state["pool"][0]
        report = {
            "chosen": best["name"],
            "best": state["best"],
            "tried": [{key: row[key] for key in ("name", "generation", "losses", "kept")} for row in state["pool"]],
        }
        return allocated(candidate, best["kept"], {"search": report})

    @property
    def tries(self) -> bool:
        """Whether there is anything to choose from."""
        return len(self.starts) > 1 or self.population > 1 or self.generations > 0

    def _problem_of_starts(self, problem: Problem) -> Problem:
        return halves(problem)[0] if self.tries else problem

    def _step_of_start(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        name, method = self.starts[len(state["starts"])]
        train = self._problem_of_starts(problem)
        try:
            if "inner" not in state:
                state["inner"] = method.init(train, candidate)
            metrics = method.step(train, candidate, state["inner"])
        except UsageError as error:  # the options that are missing are those of the start
            raise UsageError(f"{name}: {error}") from error
        if finished(state["inner"]):
            kept = method.finish(train, candidate, state.pop("inner")).allocation.kept
            state["starts"].append({"name": name, "kept": kept})
        return {key: metrics[key] for key in ("forward", "backward")}

    def _populate(self, problem: Problem, state: State) -> None:
        """The first population: the starts as they are, then genomes at random."""
        base = self._base(problem.budget)
        for row in state["starts"]:
            self._add(state, row["name"], encoded(problem.budget, base, row["kept"]), row["kept"])
        draw = generator(problem.seed)
        for i in range(self.population - len(state["starts"])):
            x = torch.rand(len(base), generator=draw, dtype=torch.float64).tolist()
            self._add(state, f"random {i + 1}", x, decoded(problem.budget, base, x))
        self._fill_queue(problem, state)

    def _add(self, state: State, name: str, x: list[float], kept: dict[str, int]) -> None:
        """An individual, to be tried unless its counts were already."""
        if any(row["kept"] == kept for row in state["pool"]):
            state["steps"] -= state["each"]
            return
        state["queue"].append(len(state["pool"]))
        state["pool"].append({"name": name, "x": x, "kept": kept, "generation": state["generation"], "losses": []})

    def _fill_queue(self, problem: Problem, state: State) -> None:
        """Go to the next generation that has anything to try; after the last one the search ends."""
        while not state["queue"]:
            state["best"].append(self._ranked(state)[0]["losses"][0])
            if state["generation"] == self.generations:
                state["steps"] = state["step"]
                return
            state["generation"] += 1
            self._breed(problem, state)

    def _breed(self, problem: Problem, state: State) -> None:
        """The children of the best individuals, drawn by seed and generation."""
        base, g = self._base(problem.budget), state["generation"]
        draw = generator(numbered(problem.seed, g))
        parents = [torch.tensor(row["x"], dtype=torch.float64) for row in self._ranked(state)[: self.parents]]

        def drawn_parent() -> Tensor:
            return parents[int(torch.randint(len(parents), (), generator=draw))]

        for i in range(self.crossovers + self.mutants):
            if i < self.crossovers:
                one, other = drawn_parent(), drawn_parent()
                x = torch.where(torch.rand(len(one), generator=draw) < 0.5, one, other)
            else:
                one = drawn_parent()
                change = self.strength * torch.randn(len(one), generator=draw, dtype=torch.float64)
                change = change.where(torch.rand(len(one), generator=draw) < self.mutation, 0.0)
                x = one + change if self.change == "add" else one * (1 + change)
            self._add(state, f"child {g}.{i + 1}", x.tolist(), decoded(problem.budget, base, x.tolist()))

    def _ranked(self, state: State) -> list[dict[str, Any]]:
        """All that were tried, best first; equal losses go to the earlier one."""
        return sorted((row for row in state["pool"] if row["losses"]), key=lambda row: row["losses"][0])

    def _rank_weights(self, problem: Problem, candidate: Candidate, state: State) -> int:
        """Rank the weights of every layer, once for all trials; returns the samples that the score pushed."""
        evidence = CollectedEvidence(problem, candidate, {})
        state["order"] = {
            layer.name: problem.pattern.order(layer, scored(problem, layer, problem.dense[layer.name], evidence))
            for layer in problem.scope
        }
        return evidence.forward

    def _individual(self, problem: Problem, candidate: Candidate, state: State, kept: Mapping[str, int]) -> Candidate:
        """The candidate with these counts, with masks where the trial is one-shot."""
        if not self.trial.one_shot:
            return allocated(candidate, kept)
        masks = {}
        for layer in problem.scope:
            order = state["order"][layer.name]
            mask = torch.zeros(layer.total, dtype=torch.bool, device=order.device)
            masks[layer.name] = mask.index_fill(0, order[: kept[layer.name]], True).view(layer.shape)
        return replace(allocated(candidate, kept), masks=masks)

    def _base(self, budget: ModelBudget) -> dict[str, float]:
        return reduced(budget, self.excess, relative=self.relative)

    def _with_noise(self, problem: Problem) -> Problem:
        if not self.noise:
            return problem
        noisy = Noisy(problem.inputs().source, self.noise, problem.seed)
        return replace(problem, calibration=replace(problem.inputs(), source=noisy))


def reduced(budget: ModelBudget, excess: float, *, relative: bool) -> dict[str, float]:
    """r_l of every layer, in weights."""
    uniform = budget.project({term.name: 1.0 for term in budget.terms})
    densities = {
        term: uniform[term.name] * (1 - excess) if relative else uniform[term.name] - excess for term in budget.terms
    }
    return {term.name: max(density * term.total, float(term.lower)) for term, density in densities.items()}


def decoded(budget: ModelBudget, base: Mapping[str, float], x: list[float]) -> dict[str, int]:
    """Counts k_l of a genome: the base, grown in proportion to softmax(x) until the budget is used up.

    Args:
        base: r_l by layer; x has the order of the budget's terms.
    """
    top = max(x)
    weights = [math.exp(value - top) for value in x]
    a = {term.name: weight / math.fsum(weights) for term, weight in zip(budget.terms, weights, strict=True)}

    def grown(c: float) -> dict[str, float]:
        return {t.name: max(min(base[t.name] + c * a[t.name], t.upper), t.lower) for t in budget.terms}

    low, high = 0.0, 1.0
    while budget.fits_real(grown(high)) and any(grown(high)[t.name] < t.upper for t in budget.terms) and high < 1e300:
        low, high = high, 2 * high
    low, _ = bracket(lambda c: budget.fits_real(grown(c)), low, high, rounds=60)
    return budget.counts({t.name: grown(low)[t.name] / t.total for t in budget.terms})


def equal_counts(problem: Problem) -> dict[str, float]:
    """The paper's start, a constant genome: every layer grows by the same number of weights."""
    budget = problem.budget
    kept = decoded(budget, reduced(budget, EXCESS, relative=False), [0.0] * len(budget.terms))
    return {term.name: kept[term.name] / term.total for term in budget.terms}


def encoded(budget: ModelBudget, base: Mapping[str, float], kept: Mapping[str, int]) -> list[float]:
    """The genome whose counts are `kept`, or the nearest one where a layer keeps less than its base."""
    above = [max(kept[term.name] - base[term.name], 0.0) for term in budget.terms]
    least = max(math.fsum(above) * 1e-6, 1e-9)
    return [math.log(max(grown, least)) for grown in above]
