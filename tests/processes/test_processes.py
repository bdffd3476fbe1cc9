"""Several processes give what one gives: counts, weights, scores, errors; and go on with what another number saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import allot
from allot.errors import Stopped, UsageError
from allot.methods.rules import uniform
from allot.processes import all_reduce, on_first_process, one_per_process, rank, world_size
from allot.run.evaluate import evaluate
from allot.run.problem import Candidate, Problem, Rule
from processes.together import together

DRAW = torch.Generator().manual_seed(3)
INPUTS, LABELS = torch.randn(52, 3, 8, 8, generator=DRAW), torch.randint(6, (52,), generator=DRAW)
TEST = TensorDataset(INPUTS, LABELS)


class Small(nn.Module):
    """A residual block between two convolutions, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(12, 20, 3, stride=2, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.head = nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(x + self.body(x))
        return self.head(x.mean((2, 3)))


MODEL = Small().eval()

SHORT: dict[str, dict[str, Any]] = {
    "erk + bn": {"method": "erk", "repair": "bn"},
    "fcpts": {"method": "fcpts", "options": {"fcpts": {"steps": 12, "every": 2}}},
    "unipts": {
        "method": "unipts",
        "options": {
            "unipts": {"steps": 8, "every": 2},
            "unipts-search": {"starts": ["erk", "uniform"], "population": 4, "generations": 1, "steps": 2},
        },
    },
    "dsa": {
        "method": "dsa",
        "budget": "macs=60%",
        "options": {"dsa": {"steps": 6}, "lstsq": {"iterations": 3}, "distill": {"steps": 6}},
    },
    "pot": {"method": "pot", "options": {"layerwise": {"steps": 6}}},
    "pot, streamed": {"method": "pot", "stream": "cpu", "options": {"layerwise": {"steps": 6}}},
    "knapsack": {"allocate": "knapsack", "score": "wanda", "repair": "variance", "method": "erk"},
    "auto": {"allocate": "auto", "repair": "none", "method": "erk", "options": {"auto": {"steps": 2}}},
    "sensitivity": {
        "allocate": "sensitivity", "score": "taylor", "pattern": "channels", "repair": "bn", "method": "erk",
        "budget": "macs=70%", "options": {"sensitivity": {"rounds": 2}},
    },
    "fcpts-paper": {"method": "fcpts-paper", "options": {"fcpts-paper": {"steps": 6, "learning_rate": 0.001}}},
}  # fmt: skip


def pruned(chain: str, **more: Any) -> dict[str, Any]:
    result = allot.prune(MODEL, INPUTS, **({"budget": "sparsity=0.8"} | SHORT[chain] | {"batch_size": 13} | more))
    return {
        "kept": dict(result.allocation.kept),
        "state": {name: value.double().numpy() for name, value in result.state_dict().items()},
        "scores": result.scores,
        "processes": world_size(),
        "log": (result.log.forward, result.log.backward, list(result.log.seconds)),
    }


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest distance of two tensors of a name, as a share of their length."""
    pairs = [(one["state"][name], other["state"][name]) for name in one["state"]]
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12)) for a, b in pairs)


@cache
def run_by(count: int, chain: str) -> list[dict[str, Any]]:
    """What each of so many processes has of a chain."""
    run = partial(pruned, chain, test=TEST)
    return together(count, run) if count > 1 else [run()]


BY_FOUR = ("erk + bn", "fcpts", "pot, streamed")  # statistics, gradients, and layers one by one; the others are slow


@pytest.mark.parametrize(
    ("chain", "count"),
    [
        *((chain, 2) for chain in SHORT),
        *(pytest.param(chain, 4, marks=() if chain in BY_FOUR else pytest.mark.slow) for chain in SHORT),
    ],
)
def test_the_result_does_not_depend_on_the_number_of_processes(chain: str, count: int):
    [one], several = run_by(1, chain), run_by(count, chain)
    assert [run["processes"] for run in several] == [count] * count
    for run in several:
        assert run["kept"] == one["kept"]
        assert apart(run, several[0]) == 0  # what the first one saves is what all of them have
        assert run["log"] == several[0]["log"]
        assert apart(run, one) < 1e-4
        assert run["scores"]["sparse"] == one["scores"]["sparse"]
        assert run["scores"]["nll"]["sparse"] == pytest.approx(one["scores"]["nll"]["sparse"], rel=1e-4)


def test_weights_move_in_these_runs():
    """Otherwise the comparison above would say nothing."""
    for chain in ("fcpts", "unipts", "dsa", "pot", "fcpts-paper"):
        state = run_by(1, chain)[0]["state"]
        moved = [
            name
            for name in state
            if not np.isin(state[name], [*MODEL.state_dict()[name].double().numpy().flat, 0]).all()
        ]
        assert len(moved) > 4, chain


# scoring


@pytest.mark.parametrize("data", ["dataset", "few", "loader", "iterable", "sampler"])
def test_scoring_is_shared_out_and_adds_up(data: str):
    def scored() -> Any:
        given: Any = {
            "dataset": TEST,
            "few": TensorDataset(INPUTS[:1], LABELS[:1]),
            "loader": DataLoader(TEST, batch_size=5),
            "iterable": (sample for sample in TEST),
            "sampler": DataLoader(TEST, batch_size=8, sampler=range(51)),
        }[data]
        seen: list[int] = []

        class Watched(Small):  # what a hook notes is put back as it was
            def forward(self, x: Tensor) -> Tensor:
                seen.append(len(x))
                return super().forward(x)

        return evaluate(Watched().eval(), given, batch_size=4), sum(seen)

    one, pushed = scored()
    found = together(2, scored)
    for score, _ in found:
        assert (score.metric, score.score, score.samples) == (one.metric, one.score, one.samples)
        assert score.nll == pytest.approx(one.nll, rel=1e-6)
    assert sum(some for _, some in found) == pushed and (data == "few" or max(some for _, some in found) < pushed)


# methods that say nothing about sums


@dataclass(frozen=True)
class Mean:
    """A repair of somebody else: the bias of the head becomes the mean input of its own process."""

    role = "repair"
    needs_data = True

    def init(self, problem: Problem, candidate: Candidate) -> dict[str, Any]:
        return {"step": 0, "steps": 1, "mean": torch.zeros(())}

    def step(self, problem: Problem, candidate: Candidate, state: dict[str, Any]) -> dict[str, Any]:
        inputs, samples = problem.inputs().batch(0)
        state |= {"step": 1, "mean": inputs.mean() + rank()}
        return {"forward": samples, "backward": 0}

    def done(self, state: dict[str, Any]) -> bool:
        return state["step"] == 1

    def finish(self, problem: Problem, candidate: Candidate, state: dict[str, Any]) -> Candidate:
        bias = torch.full_like(problem.dense["head.bias"], float(state["mean"]))
        return replace(candidate, tensors={**candidate.tensors, "head.bias": bias})


def test_a_method_that_knows_nothing_of_processes_runs_in_one_of_them_on_whole_batches():
    def run() -> Tensor:
        result = allot.prune(
            MODEL, INPUTS, "sparsity=0.5", allocate=Rule(uniform), repair=[Mean()], batch_size=13, seed=1
        )
        return result.state_dict()["head.bias"].numpy()

    one, *others = run(), *together(2, run)
    assert all((bias == one).all() for bias in others)


# errors, and stopping


class Experts(nn.Module):
    """Each sample goes through one of the two: only the second one sees the first samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        mine = x[:, 0] > x[:, 0].max() - 1e-6 if len(x) % 2 else torch.zeros(len(x), dtype=torch.bool)
        out = self.two(x)
        return torch.where(mine[:, None], self.one(x), out) if bool(mine.any()) else out


def test_what_goes_wrong_goes_wrong_in_all_of_them():
    small = together(2, lambda: pruned("erk + bn", batch_size=1))
    assert all(isinstance(error, UsageError) and "over 2 processes" in str(error) for error in small)
    other = together(2, lambda: allot.prune(MODEL, INPUTS + rank(), "sparsity=0.5", batch_size=13))
    assert all(isinstance(error, UsageError) and "differ in the calibration" in str(error) for error in other)

    rows = torch.cat([INPUTS, INPUTS[:3]])[:, 0, 0]  # three are watched
    mixed = together(2, lambda: allot.prune(Experts().eval(), rows, "sparsity=0.5", batch_size=13))
    assert all(isinstance(error, UsageError) and "mixture of experts" in str(error) for error in mixed)

    def fails() -> int:
        return on_first_process(lambda: 1 // 0)

    assert all(isinstance(error, ZeroDivisionError) for error in together(2, fails))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(before: int, after: int, tmp_path: Path):
    out = tmp_path / "run"

    def stopped() -> Any:
        steps: list[int] = []

        def asked() -> bool:  # only one of them is asked to stop
            return rank() == world_size() - 1 and len(steps) > 6

        return pruned("fcpts", save_to=out, on_step=lambda progress: steps.append(1), should_stop=asked)

    def goes_on() -> Any:
        return pruned("fcpts", save_to=out)

    if before > 1:
        assert all(isinstance(error, Stopped) for error in together(before, stopped))
    else:
        with pytest.raises(Stopped):
            stopped()
    assert list(out.glob("state-*.pt")), "nothing was saved"
    found = together(after, goes_on) if after > 1 else [goes_on()]
    whole = pruned("fcpts")
    for run in found:
        assert run["kept"] == whole["kept"] and apart(run, whole) < 1e-4
    assert allot.verify(out)["passed"]
    assert pruned("fcpts", save_to=out)["kept"] == whole["kept"]  # a finished run is opened


# what processes tell each other


def test_sums_items_and_the_first_one():
    def told() -> Any:
        one, two = all_reduce([torch.full((2, 2), float(rank() + 1)), torch.tensor([rank()])])
        return (
            one.tolist(),
            two.tolist(),
            one_per_process("abcd", lambda item: item.upper() + str(world_size())),
            on_first_process(rank),
        )

    assert together(3, told) == [([[6.0, 6.0], [6.0, 6.0]], [3], ["A1", "B1", "C1"], 0)] * 3
    assert told() == ([[1.0, 1.0], [1.0, 1.0]], [0], ["A1"], 0)
