"""Masks and diagnostics leave a streamed block under the model's names; some repairs go block by block unasked."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot import METHODS, Budget, Calibration, Unstructured, UsageError, prune
from allot.errors import BudgetError, Stopped
from allot.methods.layerwise.streamed import Streamed, by_blocks
from allot.methods.training.selection import Selection
from allot.network.call import call
from allot.network.products import Product, watched_products
from allot.pruning.setup import make_problem
from allot.run.driver import drive
from allot.run.patterns import select
from allot.run.problem import Candidate, Metrics, Problem, finished
from allot.run.store import Log, State
from contract.cases import same
from methods.layerwise.nets import NETS, Case, Encoder, words

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Move:
    """A layer a step, as the model runs them: its mask follows |w| times the norm of its inputs in the sparse net.

    Kept weights are halved; `more` weights are kept beyond the allocation.
    """

    by_blocks: Any = True
    more: int = 0

    role = "repair"
    needs_data = True
    streams = "result"

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": len(problem.scope), "masks": {}, "tensors": {}, "norms": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        layer = problem.scope.layers[state["step"]]
        masks, tensors = {**candidate.masks, **state["masks"]}, {**candidate.tensors, **state["tensors"]}
        current = replace(candidate, masks=masks, tensors=tensors)
        squares: list[Tensor] = []

        def visit(product: Product) -> None:
            squares.extend(part.double().square().sum((0, 1)).sum() for part in product.columns())

        with watched_products(problem.model, [layer], visit):
            for k in range(problem.inputs().batches):
                call(problem.model, current.effective(problem), problem.inputs().batch(k)[0])
        norm = float(torch.stack(squares).sum().sqrt())
        weight = current.tensor(problem, layer.name)
        # which weights: those nearest to a value that depends on all layers before
        score = -(weight - 0.01 * norm).abs()
        state["masks"][layer.name] = select(score, candidate.allocation.kept[layer.name] + self.more)
        state["tensors"][layer.name] = weight / 2
        state["norms"][layer.name] = norm
        state["step"] += 1
        return {"forward": len(problem.inputs()), "backward": 2 * len(problem.inputs())}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        masks, tensors = {**candidate.masks, **state["masks"]}, {**candidate.tensors, **state["tensors"]}
        names = list(state["norms"])
        report = {"move": {"norms": dict(state["norms"]), "order": names, "last": names[-1] if names else ""}}
        return replace(candidate, masks=masks, tensors=tensors, diagnostics={**candidate.diagnostics, **report})


def posed(case: Case) -> tuple[Problem, Candidate]:
    inputs = Calibration.of(case.inputs(), batch_size=4)
    problem = make_problem(case.model(), Budget(sparsity=0.5), Unstructured(), calibration=inputs)
    candidate = drive(Selection(), problem, drive(METHODS["uniform"], problem, Candidate.dense(problem)))
    return problem, replace(candidate, diagnostics={"before": {"kept": 1}})


def reloaded(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize("net", NETS)
def test_moved_masks_tensors_and_diagnostics_are_those_of_the_whole_net(net: str):
    problem, candidate = posed(NETS[net])
    whole, streamed = drive(Move(), problem, candidate), drive(Streamed(Move(), CPU), problem, candidate)
    assert whole.masks.keys() == streamed.masks.keys() and whole.tensors.keys() == streamed.tensors.keys()
    for name, mask in whole.masks.items():
        assert torch.equal(mask, streamed.masks[name]), name
        assert torch.equal(whole.tensors[name], streamed.tensors[name])
    assert any(not torch.equal(mask, candidate.masks[name]) for name, mask in whole.masks.items())
    assert streamed.allocation.kept == whole.allocation.kept == candidate.allocation.kept
    found, wanted = streamed.diagnostics, whole.diagnostics
    assert found.keys() == wanted.keys() == {"before", "move"}
    assert found["move"]["norms"] == pytest.approx(wanted["move"]["norms"], rel=1e-5)
    assert (found["move"]["order"], found["move"]["last"]) == (wanted["move"]["order"], wanted["move"]["last"])


def test_a_part_has_the_allocation_of_its_layers_alone():
    problem, candidate = posed(NETS["encoder"])
    seen: list[dict[str, int]] = []

    class Look(Move):
        def init(self, problem: Problem, candidate: Candidate) -> State:
            assert candidate.allocation.keys() == {layer.name for layer in problem.scope}
            seen.append(candidate.allocation.kept)
            return super().init(problem, candidate)

    drive(Streamed(Look(), CPU), problem, candidate)
    assert sum(map(len, seen)) == 2 * len(problem.scope)  # to count the steps, and to take them


def test_a_state_with_moved_masks_goes_on_to_the_same_bits():
    problem, candidate = posed(NETS["stages"])
    method = Streamed(Move(), CPU)
    state = method.init(problem, candidate)
    for stop in (1, 3, 6):
        while state["step"] < stop:
            method.step(problem, candidate, state)
        method, state = Streamed(Move(), CPU), reloaded(state)
    while not finished(state):
        method.step(problem, candidate, state)
    assert same(method.finish(problem, candidate, state), drive(Streamed(Move(), CPU), problem, candidate))


def test_a_repair_that_keeps_another_number_of_weights_is_an_error_with_the_layer():
    problem, candidate = posed(NETS["row"])
    with pytest.raises(BudgetError, match=r"^0.weight: Move keeps 82 weights of 81 that are allocated"):
        drive(Streamed(Move(more=1), CPU), problem, candidate)


def test_samples_pushed_through_parts_count_as_much_of_the_model_as_the_part_holds():
    problem, candidate = posed(NETS["encoder"])
    log = Log()
    drive(Streamed(Move(), CPU), problem, candidate, log=log)
    sizes = {part: sum(t.nbytes for n, t in problem.dense.items() if n.startswith(part)) for part in ("", "layers.0")}
    outside = 1 - 2 * sizes["layers.0"] / sizes[""]
    layers = 4 * 2 * sizes["layers.0"] / sizes[""] + 2 * outside  # four in each of two blocks, two outside
    assert log.backward == pytest.approx(2 * layers * len(problem.inputs()), abs=1)
    assert log.forward > layers * len(problem.inputs())


# without a request


class Counted(Encoder):
    """Counts passes through its first layer."""

    passes = 0

    def forward(self, words: Tensor) -> Tensor:
        type(self).passes += 1
        return super().forward(words)


def test_a_repair_that_goes_by_blocks_does_so_unasked_where_the_model_has_blocks(tmp_path: Path):
    case = NETS["encoder"]
    asked: dict[str, Any] = {"budget": "sparsity=0.5", "method": "uniform", "batch_size": 4}
    steps: list[str] = []
    alone = prune(case.model(), case.inputs(), repair=[Move(by_blocks=False)], **asked)
    result = prune(
        case.model(), case.inputs(), repair=[Move()], **asked, on_step=lambda progress: steps.append(progress.stage)
    )
    assert same(
        replace(result.candidate, diagnostics={}, tensors={}), replace(alone.candidate, diagnostics={}, tensors={})
    )
    assert result.candidate.diagnostics["move"]["norms"].keys() == alone.candidate.diagnostics["move"]["norms"].keys()
    assert result.report()["repair"] == alone.report()["repair"] == ["Move"]
    assert steps.count("repair-1-Move") == len(result.problem.scope)
    Counted.passes = 0
    counted = Case(Counted, words)
    prune(counted.model(), counted.inputs(), repair=[Move()], **asked)
    by_block = Counted.passes
    Counted.passes = 0
    prune(counted.model(), counted.inputs(), repair=[Move(by_blocks=False)], **asked)
    assert by_block < Counted.passes

    calls = iter(range(10**6))
    with pytest.raises(Stopped):
        prune(
            case.model(),
            case.inputs(),
            repair=[Move()],
            **asked,
            save_to=tmp_path / "run",
            should_stop=lambda: next(calls) > len(steps) - 4,
        )
    assert [path.name for path in (tmp_path / "run").glob("state-*")] == ["state-repair-1-Move.pt"]
    again = prune(case.model(), case.inputs(), repair=[Move()], **asked, save_to=tmp_path / "run")
    assert same(again.candidate, result.candidate)


class Varying(Encoder):
    """The mask comes with some samples only."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.into(self.words(words))
        mask = None if bool((words[:, 0] < 15).all()) else torch.zeros(words.shape[1], words.shape[1]).bool()
        for layer in self.layers:
            x = layer(x, mask, factor=torch.ones(()))[0]
        return self.head(self.norm(x))


class OneByOne(nn.Module):
    """Takes single samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(1, 4))


def varying_words() -> Tensor:
    found = words()
    found[:, 0] = 0
    found[[3, 7], 0] = 19  # one of them may be watched
    return found


WITHOUT_BLOCKS = {
    "a single layer": Case(lambda: nn.Sequential(nn.Linear(3, 3)), lambda: torch.randn(4, 3)),
    "other arguments for some samples": Case(Varying, varying_words),
    "one sample at a time": Case(OneByOne, lambda: torch.randn(4, 4)),
}


@pytest.mark.parametrize("case", WITHOUT_BLOCKS)
def test_where_there_are_no_blocks_the_whole_net_runs_or_there_is_an_error(case: str):
    model, inputs = WITHOUT_BLOCKS[case].model(), WITHOUT_BLOCKS[case].inputs()
    asked: dict[str, Any] = {"budget": "sparsity=0.5", "batch_size": 1}
    assert prune(model, inputs, repair=[Move()], **asked).candidate.diagnostics["move"]["norms"]
    with pytest.raises(UsageError, match=r"^Move repairs a model block by block: ") as raised:
        prune(model, inputs, repair=[Move(by_blocks="needed")], **asked)
    if case == "a single layer":
        assert "Sequential has no blocks that run one after another" in str(raised.value)
    assert "stream out" not in str(raised.value)


def test_a_model_of_which_a_row_of_modules_is_too_little_names_the_row():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.layers = nn.Linear(4, 400), nn.Sequential(nn.Linear(400, 1), nn.Linear(1, 400))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(self.into(x)) + self.into(-x) + self.into(2 * x)

    class Tall(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(400, 400)

        def forward(self, x: Tensor) -> Tensor:
            return self.more(super().forward(x))

    with pytest.raises(UsageError, match=r"Tall has no blocks .*; the best row, layers.0 to layers.1, holds 1%"):
        prune(Tall(), torch.randn(4, 4), "sparsity=0.5", repair=[Move(by_blocks="needed")])


def test_a_method_that_does_not_ask_is_left_as_it_is():
    problem, _ = posed(NETS["row"])
    assert by_blocks(METHODS["lstsq"], problem) is METHODS["lstsq"]
    assert by_blocks(Move(), problem) == Streamed(Move(), CPU)


def test_on_request_the_device_counts():
    case = NETS["row"]
    result = prune(case.model(), case.inputs(), "sparsity=0.5", repair=[Move()], stream="cpu")
    alone = prune(case.model(), case.inputs(), "sparsity=0.5", repair=[Move(by_blocks=False)])
    assert all(torch.equal(mask, alone.candidate.masks[name]) for name, mask in result.candidate.masks.items())
    assert isinstance(result, allot.Result)
