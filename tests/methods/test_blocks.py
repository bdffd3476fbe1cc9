"""Blocks: each is trained to the output of its dense counterpart, and none ends worse than it began."""

from __future__ import annotations

import inspect
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot import Budget, Calibration, Channels, Rules, Unstructured, UsageError, prune
from allot.errors import AllotError
from allot.methods import METHODS
from allot.methods.blocks import Blocks
from allot.methods.layerwise.streamed import Streamed
from allot.methods.layerwise.streamed_block import BlockPart, ModelPart
from allot.methods.training.selection import Selection
from allot.network.call import call
from allot.network.compute import Compute
from allot.network.layers import is_batch_norm
from allot.pruning.setup import make_problem
from allot.run.driver import Progress, drive
from allot.run.patterns import NM, Pattern
from allot.run.problem import Candidate, Method, Problem, finished
from allot.sources import zoo
from contract.cases import same
from methods.layerwise.nets import NETS, TRANSFORMERS, Case, pictures

CPU = torch.device("cpu")


def problem_of(
    model: nn.Module, inputs: Any, *, pattern: Pattern | None = None, sparsity: float = 0.5, **more: Any
) -> tuple[Problem, Candidate]:
    """A problem and its uniform candidate."""
    calibration = Calibration.of(inputs, batch_size=more.pop("batch_size", 4), dtype=more.pop("dtype", None))
    budget, rules = Budget(sparsity=sparsity), Rules(**more.pop("rules", {}))
    problem = make_problem(model, budget, pattern or Unstructured(), calibration=calibration, rules=rules)
    problem = replace(problem, **more)
    return problem, drive(Selection(), problem, drive(METHODS["uniform"], problem, Candidate.dense(problem)))


def of_case(case: Case, **more: Any) -> tuple[Problem, Candidate]:
    return problem_of(case.model(), case.inputs(), **more)


def streamed(problem: Problem, candidate: Candidate, **options: Any) -> Candidate:
    return drive(Streamed(Blocks(**options), CPU), problem, candidate)


def output_error(problem: Problem, candidate: Candidate) -> float:
    inputs = problem.inputs().pick(range(len(problem.inputs())))
    with torch.no_grad():
        dense, sparse = (call(problem.model, tensors, inputs) for tensors in ({}, candidate.effective(problem)))
    dense, sparse = (getattr(output, "logits", output).float() for output in (dense, sparse))
    return float((sparse - dense).square().sum() / dense.square().sum())


def on_block(
    problem: Problem, candidate: Candidate, method: Method, *, steps: int = 10**6
) -> tuple[Problem, Candidate, dict[str, Any]]:
    """(problem and candidate of the first block, the method's state after some of its steps there)."""
    seen: list[Any] = []

    class Watched(Blocks):
        def step(self, problem: Problem, candidate: Candidate, state: dict[str, Any]) -> Any:
            if not isinstance(problem.model, BlockPart) or problem.model.calls != calls:
                return super().step(problem, candidate, state)
            seen[:] = [problem, candidate, state]
            while state["step"] < steps and not finished(state):
                super().step(problem, candidate, state)
            raise InterruptedError

    wrapped = Streamed(Watched(**{name: getattr(method, name) for name in method.__dataclass_fields__}), CPU)
    state = wrapped.init(problem, candidate)
    calls = wrapped._live["run"].sequence.blocks[0]
    with pytest.raises(InterruptedError):
        wrapped.step(problem, candidate, state)
    return seen[0], seen[1], seen[2]


# the oracle


def repeated_inputs() -> Tensor:
    """Eight samples, each eight times in a row: one of each is held out."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, generator=draw, dtype=torch.float64).repeat_interleave(8, 0)


def test_a_block_that_is_one_linear_layer_tends_to_masked_least_squares():
    torch.manual_seed(1)
    model, inputs = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double().eval(), repeated_inputs()
    problem, candidate = problem_of(model, inputs, batch_size=64)
    found = streamed(problem, candidate, passes=120)
    dense = sparse = inputs[::8]
    for layer in range(2):
        with torch.no_grad():
            dense = model[layer](dense)  # targets of the dense net, inputs of the finished block
        weight, bias = (found.effective(problem)[f"{layer}.{name}"] for name in ("weight", "bias"))
        excess = 0.0
        for row, mask in enumerate(candidate.masks[f"{layer}.weight"]):
            columns = torch.cat([sparse[:, mask], torch.ones(8, 1, dtype=torch.float64)], 1)
            best = torch.linalg.lstsq(columns, dense[:, row]).solution
            ours = torch.cat([weight[row][mask], bias[row : row + 1]])
            error, least = (float((columns @ w - dense[:, row]).square().sum()) for w in (ours, best))
            excess += error - least
            if not layer:
                torch.testing.assert_close(ours, best, atol=0.02, rtol=0)
        assert excess < (1e-4 if not layer else 1e-2) * float(dense.square().sum())
        sparse = sparse @ weight.T + bias


# every kind of net


def many_pictures() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Patches(nn.Module):
    """A small vision transformer: patches, three blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(*(Attending() for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


VISION = Case(Patches, many_pictures)
STAGES, ROW = (Case(NETS[net].make, many_pictures) for net in ("stages", "row"))
ENCODER = NETS["encoder"]
CASES = {"encoder": ENCODER, "stages": STAGES, "row": ROW, "vision": VISION}


@pytest.mark.parametrize("net", CASES)
def test_errors_of_blocks_fall_and_the_net_comes_nearer_to_the_dense_one(net: str):
    problem, candidate = of_case(CASES[net])
    found = streamed(problem, candidate, passes=12)
    rows = found.diagnostics["blocks"]
    assert len(rows) == len(problem_blocks(problem, candidate))
    assert all(row["after"] <= row["before"] for row in rows.values())
    assert sum(row["after"] for row in rows.values()) < 0.9 * sum(row["before"] for row in rows.values())
    assert output_error(problem, found) < 0.9 * output_error(problem, candidate)
    assert found.masks is candidate.masks
    assert not [name for name in found.tensors if name not in problem.dense]


def problem_blocks(problem: Problem, candidate: Candidate) -> tuple[Any, ...]:
    wrapped = Streamed(Blocks(), CPU)
    wrapped.init(problem, candidate)
    return wrapped._live["run"].sequence.blocks


def test_a_small_residual_net_of_the_zoo_is_repaired():
    model, data = zoo.model("digits-resnet20"), zoo.data("digits", "calibration")
    problem, candidate = problem_of(model, data, sparsity=0.7, batch_size=16)
    problem = replace(problem, calibration=replace(problem.inputs(), indices=problem.inputs().indices[:32]))
    found = streamed(problem, candidate, passes=3)
    rows = found.diagnostics["blocks"]
    assert list(rows) == [f"blocks.{number}" for number in range(9)]
    assert all(row["after"] < row["before"] for row in rows.values())
    assert output_error(problem, found) < 0.8 * output_error(problem, candidate)


@pytest.mark.parametrize("net", ["llama", "gpt-2"])
def test_a_small_language_model_is_repaired(net: str):
    problem, candidate = of_case(TRANSFORMERS[net], rules={"exclude": ("lm_head",)})
    found = streamed(problem, candidate, passes=8)
    assert len(found.diagnostics["blocks"]) == 3
    assert all(row["after"] < row["before"] for row in found.diagnostics["blocks"].values())
    assert output_error(problem, found) < output_error(problem, candidate)


OUTSIDE: dict[str, Any] = {"exclude": ("patches", "head")}


@pytest.mark.parametrize("pattern", [NM(2, 4), Channels()])
def test_masks_of_every_pattern_are_kept(pattern: Pattern):
    is_channels = pattern == Channels()
    case, rules = (STAGES, {}) if is_channels else (VISION, OUTSIDE)
    problem, candidate = of_case(case, pattern=pattern, rules=rules)
    found = streamed(problem, candidate, passes=6, moving=is_channels)
    assert all(torch.equal(mask, candidate.masks[name]) for name, mask in found.masks.items())
    assert output_error(problem, found) < output_error(problem, candidate)
    for name, mask in candidate.masks.items():  # pruned weights are stored as they were
        assert torch.equal(found.tensor(problem, name)[~mask], problem.dense[name][~mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision_are_repaired_in_their_dtype(dtype: torch.dtype):
    problem, candidate = problem_of(VISION.model().to(dtype), pictures(), dtype=dtype)
    found = streamed(problem, candidate, passes=8)
    assert all(row["after"] < row["before"] for row in found.diagnostics["blocks"].values())
    assert all(value.dtype == dtype for value in found.tensors.values())
    _, _, state = on_block(problem, candidate, Blocks(passes=1), steps=1)
    assert state["training"]["tensors"]["steps.0.mlp.0.weight"].dtype == torch.float32
    assert state["factor"] == (1.0 if dtype == torch.bfloat16 else 2.0 ** round(math.log2(3 * 4 * 8)))


def test_a_factor_that_overflows_half_precision_is_halved():
    problem, candidate = problem_of(VISION.model().half(), pictures(), dtype=torch.float16)
    part, inside, state = on_block(problem, candidate, Blocks(passes=1), steps=1)
    state["factor"] = 2.0**40
    before = {name: value.clone() for name, value in state["training"]["tensors"].items()}
    Blocks(passes=1).step(part, inside, state)
    assert 1 < state["factor"] < 2.0**30
    changed = state["training"]["tensors"]
    assert any(not torch.equal(value, before[name]) for name, value in changed.items())
    assert all(bool(value.isfinite().all()) for value in changed.values())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_a_tied_weight_learns_from_both_its_uses():
    torch.manual_seed(0)
    model = nn.Sequential(Tied(), Tied()).eval()
    problem, candidate = problem_of(model, torch.randn(20, 6))
    found = streamed(problem, candidate, passes=8)
    assert {"0.up.weight", "0.up.bias", "0.down.bias"} <= found.tensors.keys()
    assert "0.down.weight" not in found.tensors
    assert output_error(problem, found) < output_error(problem, candidate)


# the guard


def test_a_step_far_too_long_leaves_every_block_as_it_was():
    problem, candidate = of_case(STAGES)
    found = streamed(problem, candidate, passes=2, learning_rate=1e4)
    assert same(found, candidate)
    rows = found.diagnostics["blocks"].values()
    assert all(row["after"] == row["before"] and row["best_step"] == 0 for row in rows)


def test_a_block_that_diverges_goes_back_and_takes_shorter_steps():
    problem, candidate = of_case(ROW)
    steps: list[Progress] = []
    found = drive(Streamed(Blocks(passes=3, learning_rate=1e30), CPU), problem, candidate, on_step=steps.append)
    assert same(found, candidate)
    assert all(math.isfinite(value) for step in steps for value in step.metrics.values())
    found = streamed(problem, candidate, passes=12, learning_rate=10.0)
    rows = found.diagnostics["blocks"].values()
    assert any(row["after"] < row["before"] and row["best_step"] > 9 for row in rows)


def test_a_block_that_is_as_good_as_can_be_takes_no_training():
    problem, candidate = of_case(STAGES, rules={"min_density": {"stage1.*": 1.0}, "exclude": ("stem",)})
    rows = streamed(problem, candidate, passes=2).diagnostics["blocks"]
    assert rows["stage1.0"] == {"before": 0.0, "after": 0.0, "best_step": 0, "steps": 1}
    assert rows["stage2.0"]["steps"] == 14 and rows["stage2.0"]["before"] > 0


@pytest.mark.parametrize(("samples", "held_out"), [(1, [0]), (2, [1]), (3, [1]), (15, [7]), (16, [4, 12])])
def test_an_eighth_of_the_samples_trains_nothing(samples: int, held_out: list[int], monkeypatch: pytest.MonkeyPatch):
    problem, candidate = problem_of(STAGES.model(), torch.randn(samples, 3, 8, 8))
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    run = ModelPart.forward

    def look(self: ModelPart, numbers: Tensor) -> Any:
        if isinstance(self, BlockPart) and not self._recorded and self.count == samples and self.inputs:
            seen[torch.is_grad_enabled()].update(numbers.tolist())
        return run(self, numbers)

    monkeypatch.setattr(ModelPart, "forward", look)
    streamed(problem, candidate, passes=2)
    train = set(range(samples)) - set(held_out) or {0}
    assert seen[True] == train
    assert seen[False] == train | set(held_out)


def test_inputs_that_are_not_finite_in_the_sparse_net_are_an_error():
    model = ROW.model()
    problem, candidate = problem_of(model, pictures())
    candidate = replace(candidate, tensors={"0.weight": torch.full_like(problem.dense["0.weight"], math.inf)})
    with pytest.raises(AllotError, match="the output of 0 to 2 is not finite"):
        streamed(problem, candidate)


# what learns, and how fast


def test_steps_are_a_share_of_the_dense_tensor_whatever_came_before():
    problem, candidate = of_case(STAGES)
    name = "stage1.0.conv1.weight"
    inflated = replace(candidate, tensors={name: 1000 * problem.dense[name]})
    _, _, state = on_block(problem, inflated, Blocks(learning_rate=0.01), steps=1)
    moved = state["training"]["tensors"]["steps.0.conv1.weight"] - inflated.tensors[name]
    rms = float(problem.dense[name].square().mean().sqrt())
    assert float(moved.abs().max()) == pytest.approx(0.01 * rms, rel=0.2)  # Adam's first step has the size of the share


def test_everything_learns_but_statistics_of_batch_norms():
    problem, candidate = of_case(STAGES)
    found = streamed(problem, candidate, passes=2)
    inside = {name for name, _ in problem.model.named_parameters() if name.startswith("stage")}
    assert found.tensors.keys() == inside
    norms = [name for name, module in problem.model.named_modules() if is_batch_norm(module)]
    assert len(norms) == 9 and not [n for n in found.tensors if n.endswith(("running_mean", "running_var"))]


def test_blocks_without_a_layer_in_scope_and_modules_outside_stay():
    problem, candidate = of_case(ENCODER, rules={"exclude": ("layers.0.*",)})
    found = streamed(problem, candidate, passes=2)
    assert found.tensors and all(name.startswith("layers.1.") for name in found.tensors)
    assert list(found.diagnostics["blocks"]) == ["layers.1"]


def test_small_batches_give_the_gradients_of_the_whole_batch():
    problem, candidate = of_case(ENCODER)
    found = streamed(problem, candidate, passes=1)
    pieces = streamed(replace(problem, compute=Compute(micro_batch=1)), candidate, passes=1)
    checkpointed = streamed(replace(problem, compute=Compute(checkpoint=True)), candidate, passes=1)
    for name, value in found.tensors.items():
        torch.testing.assert_close(pieces.tensors[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(checkpointed.tensors[name], value, rtol=1e-4, atol=1e-5)


# masks that move


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_masks_that_move_keep_their_counts(pattern: Pattern):
    problem, candidate = of_case(VISION, pattern=pattern, batch_size=8, rules=OUTSIDE)
    method = Blocks(passes=8, moving=True, every=3)
    part, inside, state = on_block(problem, candidate, method)
    better = method.finish(part, inside, state)
    moved = [name for name, mask in inside.masks.items() if not torch.equal(mask, better.masks[name])]
    assert moved
    for layer in part.scope:
        mask = better.masks[layer.name]
        assert int(mask.sum()) == int(inside.masks[layer.name].sum())
        assert torch.equal(pattern.mask(layer, mask.float(), int(mask.sum())), mask)  # it is of the pattern
    assert state["best"] < state["before"]


def test_masks_move_only_after_weights_did():
    problem, candidate = of_case(ENCODER)
    _, _, state = on_block(problem, candidate, Blocks(passes=8, moving=True, every=3), steps=3)
    assert not state["masks"]
    _, _, state = on_block(problem, candidate, Blocks(passes=8, moving=True, every=3), steps=4)
    assert state["masks"]


# steps, stopping, reports


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("moving", [False, True])
def test_a_state_that_is_loaded_goes_on_to_the_same_bits(moving: bool):
    problem, candidate = of_case(ENCODER)
    make: Callable[[], Method] = lambda: Streamed(Blocks(passes=3, moving=moving, every=2), CPU)  # noqa: E731
    method = make()
    state = method.init(problem, candidate)
    for stop in (1, 4, 8, 11):
        while state["step"] < stop and not finished(state):
            method.step(problem, candidate, state)
        method, state = make(), reloaded(state)
    while not finished(state):
        method.step(problem, candidate, state)
    assert same(method.finish(problem, candidate, state), drive(make(), problem, candidate))


def test_its_state_holds_what_the_docstring_names():
    problem, candidate = of_case(ENCODER)
    section = re.search(r"^State:\n((?:    .*\n?)+)", inspect.cleandoc(Blocks.__doc__ or ""), flags=re.MULTILINE)
    named = {
        key for keys in re.findall(r"^    (\w+(?:, \w+)*): ", section[1], re.MULTILINE) for key in keys.split(", ")
    }
    _, _, state = on_block(problem, candidate, Blocks(passes=8, moving=True, every=2))
    assert state.keys() == named | {"step", "steps"}


def test_a_run_reports_every_block_and_what_it_cost():
    case = NETS["stages"]
    seen: list[Progress] = []
    options = {"blocks": {"passes": 2}}
    parts: dict[str, Any] = {"repair": "blocks", "options": options, "stream": "cpu", "batch_size": 3}
    result = prune(case.model(), case.inputs(), "sparsity=0.5", on_step=seen.append, **parts)
    rows = result.report()["diagnostics"]["blocks"]
    assert list(rows) == ["stage1.0", "stage1.1", "stage2.0", "stage2.1"]
    steps = [step.metrics for step in seen if step.stage.endswith("blocks")]
    assert len(steps) == 4 * 2 * 3  # nine samples of ten train, in batches of three
    for number, row in enumerate(rows.values()):
        of_block = steps[6 * number : 6 * number + 6]
        assert of_block[0]["error"] == row["before"]
        assert row["after"] == min(row["before"], *(metrics["error"] for metrics in of_block))
    assert sum(metrics["backward"] for metrics in steps) in range(
        10, 19
    )  # of a pass through the whole net: nine, twice


def test_a_model_that_is_not_cut_is_refused():
    problem, candidate = of_case(STAGES)
    with pytest.raises(UsageError, match="Stages has no blocks as it is given here"):
        drive(Blocks(), problem, candidate)
    with pytest.raises(UsageError, match="Linear has no blocks that run one after another"):
        streamed(*problem_of(nn.Linear(4, 4), torch.randn(8, 4)))


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x).detach()


def test_a_block_without_gradients_is_an_error():
    problem, candidate = problem_of(nn.Sequential(Detached(), Detached()), torch.randn(8, 4))
    with pytest.raises(UsageError, match="the output of 0 carries no gradients"):
        streamed(problem, candidate)


@pytest.mark.parametrize("option", [{"passes": 0}, {"learning_rate": -1}, {"moving": 2}, {"every": 0}])
def test_an_option_out_of_its_range_is_refused(option: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(option))):
        Blocks(**option)
