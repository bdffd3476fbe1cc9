"""Training: gradients at masked weights, losses, the teacher and its table, batch norms, dtypes, schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import AllotError, UsageError
from allot.methods.training.distillation import Training, trained
from allot.methods.training.losses import LOSSES
from allot.methods.training.schedule import Schedule, warm_cosine
from allot.methods.training.selection import is_finite
from allot.network.compute import Compute
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem


def posed(model: nn.Module, inputs: Any, *, batch_size: int = 8) -> Problem:
    dtype = next(model.parameters()).dtype
    calibration = Calibration.of(inputs, batch_size=batch_size, dtype=dtype)
    return make_problem(model.eval(), Budget(sparsity=0.5), Unstructured(), calibration=calibration)


def half(problem: Problem) -> dict[str, Tensor]:
    """Masks of every second weight."""
    masks = {layer.name: torch.arange(layer.total).view(layer.shape) % 2 == 0 for layer in problem.scope}
    return {name: mask.contiguous() for name, mask in masks.items()}


def begun(training: Training, problem: Problem) -> dict[str, Any]:
    return training.begin(problem, Candidate.dense(problem))


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def counted(model: nn.Module) -> list[int]:
    """Samples of every forward pass from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


# the gradient


def test_the_gradient_is_that_of_the_loss_at_every_masked_weight_pruned_ones_included():
    model, inputs = perceptron(torch.float64), torch.randn(8, 5, dtype=torch.float64)
    problem = posed(model, inputs)
    training, masks = Training(temperature=3.0), half(problem)
    gradients, told = training.gradients(problem, begun(training, problem), masks)
    weights = {name: tensor.clone() for name, tensor in problem.dense.items()}
    weights |= {name: weights[name] * mask for name, mask in masks.items()}

    def loss() -> float:
        with torch.no_grad():
            dense, ours = (
                z.div(3.0).softmax(1) for z in (model(inputs), torch.func.functional_call(model, weights, inputs))
            )
            return float(9 * (dense * (dense.log() - ours.log())).sum(1).mean())

    assert told["loss"] == pytest.approx(loss())
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        for i in range(weight.numel()):
            at = weight.view(-1)
            before = float(at[i])
            at[i] = before + 1e-6
            above = loss()
            at[i] = before - 1e-6
            below = loss()
            at[i] = before
            assert float(gradients[name].flatten()[i]) == pytest.approx((above - below) / 2e-6, abs=1e-7)


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 1), ((4, 5, 3), 2), ((4, 3, 2, 2), 1)])
def test_kl_is_taken_over_the_classes_and_averaged_over_everything_else(shape: tuple[int, ...], dim: int):
    ours, theirs = torch.randn(2, *shape).double()
    p, q = (theirs / 2).softmax(dim), (ours / 2).softmax(dim)
    expected = 4 * (p * (p.log() - q.log())).sum(dim).mean()
    assert float(LOSSES["kl"](ours, theirs, 2.0, 2.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(LOSSES["kl"](theirs, theirs, 2.0, 2.0)) == pytest.approx(0, abs=1e-6)


def test_mse_is_relative_to_the_dense_output():
    ours, theirs = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 3.0, 3.0])
    assert float(LOSSES["mse"](ours, theirs, 1.0, 1.0)) == pytest.approx((0 + 1 + 4) / (1 + 9 + 9))
    assert float(LOSSES["mse"](100 * ours, 100 * theirs, 1.0, 1.0)) == pytest.approx(5 / 19)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 1e4])
def test_a_step_is_a_share_of_the_tensor_whatever_its_scale(scale: float):
    model = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(1.0, 13).view(3, 4) * scale)
    problem = posed(model, torch.randn(8, 4))
    training = Training(loss="mse", learning_rate=0.1)
    state = begun(training, problem)
    gradients, _ = training.gradients(problem, state, half(problem))
    training.update(state, gradients)
    moved = (state["tensors"]["weight"] - model.weight.detach()).abs() / model.weight.detach().square().mean().sqrt()
    # the first step of Adam is a sign; warm-up makes it a tenth
    assert float(moved.max()) == pytest.approx(0.1 * warm_cosine(0, 250), rel=1e-2)


def test_what_starts_at_zero_can_move():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.bias)
    problem, training = posed(model, torch.randn(8, 4)), Training(loss="mse", learning_rate=0.1)
    state = begun(training, problem)
    training.update(state, training.gradients(problem, state, half(problem))[0])
    # the first step of Adam is a sign, and a vector counts as at least 0.001
    assert torch.allclose(
        state["tensors"]["bias"].abs(), torch.full((3,), 0.001 * 0.1 * warm_cosine(0, 250)), rtol=0.01
    )


def test_training_goes_on_from_what_came_before_it():
    problem = posed(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(8, 4))
    changed = {name: problem.dense[name] + 1 for name in ("0.weight", "1.running_mean")}
    state = Training().begin(problem, replace(Candidate.dense(problem), tensors=changed))
    for name, tensor in (problem.dense | changed).items():
        assert torch.equal(state["tensors"][name], tensor) and state["tensors"][name] is not tensor


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do():
    problem = posed(nn.Linear(4, 3), torch.randn(8, 4))
    training = Training()
    state = begun(training, problem)
    state["tensors"]["weight"].fill_(float("inf"))
    with pytest.raises(AllotError, match="lower learning_rate"):
        training.gradients(problem, state, {})


# what is compared


class Told(nn.Module):
    """A model whose output is wrapped."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = perceptron(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def boxes(output: dict[str, Tensor]) -> list[Tensor]:
    return [output["scores"], output["boxes"]]


@pytest.mark.parametrize("wrap", [lambda z: {"scores": z, "boxes": 2 * z}, lambda z: (z, z)], ids=["dict", "tuple"])
def test_all_parts_of_an_output_are_compared_by_squared_error(wrap: Callable[[Tensor], Any]):
    problem = posed(Told(wrap), torch.randn(8, 5))
    every = Training(outputs=lambda output: list(output.values()) if isinstance(output, dict) else output, loss="mse")
    losses = [
        training.gradients(problem, begun(training, problem), half(problem))[1]["loss"]
        for training in (Training(), every)
    ]
    assert losses[0] == losses[1] > 0


def test_whole_numbers_in_an_output_need_a_function():
    problem = posed(Told(lambda z: {"scores": z, "labels": z.argmax(1)}), torch.randn(8, 5))
    with pytest.raises(UsageError, match=r"outputs=package\.module:function"):
        Training().gradients(problem, begun(Training(), problem), {})


def test_probabilities_are_compared_as_the_logits_that_they_come_from():
    inputs, losses = torch.randn(8, 5), []
    for wrap in (lambda z: z, lambda z: z.softmax(1)):
        torch.manual_seed(0)
        problem = posed(Told(wrap), inputs)
        losses.append(Training().gradients(problem, begun(Training(), problem), half(problem))[1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_values_between_0_and_1_that_are_no_distribution_are_compared_by_squared_error():
    inputs, losses = torch.randn(8, 5), []
    for loss in (None, "mse"):
        torch.manual_seed(0)
        problem = posed(Told(torch.sigmoid), inputs)
        training = Training(loss=loss)
        losses.append(training.gradients(problem, begun(training, problem), half(problem))[1]["loss"])
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("outputs", [boxes, "methods.training.test_distillation:boxes", lambda output: output])
def test_a_function_picks_what_is_compared(outputs: Any):
    problem = posed(Told(lambda z: {"scores": z, "boxes": 2 * z}), torch.randn(8, 5))
    plain = posed(perceptron(), torch.randn(8, 5))
    plain = posed(perceptron(), problem.inputs().source)
    masks = half(problem)
    both = Training(outputs=outputs, loss="mse")
    _, told = both.gradients(problem, begun(both, problem), masks)
    one = Training(loss="mse")
    renamed = {name.removeprefix("inner."): mask for name, mask in masks.items()}
    _, alone = one.gradients(plain, begun(one, plain), renamed)
    assert told["loss"] == pytest.approx(2 * alone["loss"])


def test_an_object_with_logits_needs_nothing():
    problem = posed(Told(lambda z: SimpleNamespace(logits=z)), torch.randn(8, 5))
    gradients, told = Training().gradients(problem, begun(Training(), problem), half(problem))
    assert told["loss"] > 0 and all(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("outputs", ["no.such:place", "math:no", "json", "math:pi"])
def test_what_is_no_function_that_can_be_found_is_an_error(outputs: str):
    with pytest.raises(UsageError, match=rf"outputs='{outputs}'.* package\.module:function is accepted"):
        Training(outputs=outputs)


def test_one_number_for_a_whole_batch_can_be_compared():
    problem = posed(perceptron(), torch.randn(8, 5))
    training = Training(outputs=lambda output: output.square().mean(), loss="mse")
    _, told = training.gradients(problem, begun(training, problem), {})
    assert told["loss"] == pytest.approx(0, abs=1e-9)


def test_outputs_without_gradients_say_what_to_change():
    problem = posed(Told(lambda z: z.detach()), torch.randn(8, 5))
    with pytest.raises(UsageError, match="no_grad and detach"):
        Training().gradients(problem, begun(Training(), problem), {})


def test_one_class_has_no_kl():
    problem = posed(nn.Linear(4, 1), torch.randn(8, 4))
    with pytest.raises(UsageError, match="use mse"):
        Training(loss="kl").gradients(problem, begun(Training(), problem), {})


def test_block_outputs_add_their_error():
    problem = posed(perceptron(), torch.randn(8, 5))
    masks = half(problem)

    def loss(**options: Any) -> float:
        training = Training(**options)
        return float(training.gradients(problem, begun(training, problem), masks)[1]["loss"])

    apart, once, twice = loss(), loss(blocks=["0"], block_weight=1.0), loss(blocks="0", block_weight=2.0)
    assert once > apart and twice - apart == pytest.approx(2 * (once - apart), rel=1e-4)
    with pytest.raises(UsageError, match="unknown module in blocks 'layer9'"):
        loss(blocks=["0", "layer9"])


def test_a_block_term_is_the_relative_error_of_what_its_module_gives():
    inputs = torch.randn(8, 5)
    problem = posed(Told(lambda z: z), inputs)
    masks, model = half(problem), perceptron()
    pruned = {name: problem.dense[name] * mask for name, mask in masks.items()}
    found = {}
    for blocks in ((), ("inner.[01]",)):
        training = Training(blocks=blocks, block_weight=0.5)
        found[blocks] = training.gradients(problem, begun(training, problem), masks)
    with torch.no_grad():
        dense = model[0](inputs)
        sparse = nn.functional.linear(inputs, pruned["inner.0.weight"], model[0].bias)
    errors = [(b - a).square().mean() / a.square().mean() for a, b in ((dense, sparse), (dense.tanh(), sparse.tanh()))]
    (apart, without), (together, told) = found.values()
    assert told["loss"] - without["loss"] == pytest.approx(0.5 * float(sum(errors)), rel=1e-4)
    assert not torch.allclose(together["inner.0.weight"], apart["inner.0.weight"], rtol=1e-3)
    assert torch.allclose(together["inner.2.weight"], apart["inner.2.weight"])  # it comes after the blocks
    with pytest.raises(UsageError, match=r"'inner\.00': did you mean 'inner\.0'"):
        begun(Training(blocks=("inner.00",)), problem)


# the teacher


@pytest.mark.parametrize("kept", ["kept", "too large", "drawn", "blocks"])
def test_the_teacher_runs_once_per_sample_where_inputs_repeat(kept: str):
    class Drawn(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(5)

    model = perceptron()
    problem = posed(model, Drawn() if kept == "drawn" else torch.randn(12, 5), batch_size=6)
    if kept == "too large":
        problem = replace(problem, compute=Compute(cached=12 * 3 * 4 - 1))
    training = Training(blocks=("0",) if kept == "blocks" else ())
    state, seen = begun(training, problem), counted(model)
    for _ in range(4):  # two passes
        before = len(seen)
        gradients, told = training.gradients(problem, state, half(problem))
        assert told["forward"] == sum(seen[before:])
        training.update(state, gradients)
    assert sum(seen) == (36 if kept == "kept" else 48)


def test_a_table_of_answers_changes_nothing():
    inputs = torch.randn(12, 5)
    states = []
    for repeat in (True, False):
        problem, training = posed(perceptron(), inputs, batch_size=6), Training()
        state = begun(training, problem)
        assert state["repeat"]
        for _ in range(6):
            state["repeat"] = repeat
            training.update(state, training.gradients(problem, state, half(problem))[0])
        states.append(state["tensors"])
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-6) for name in states[0])


@pytest.mark.parametrize("samples", [12, 11])  # 11 make a batch of 6 and one of 5
def test_answers_are_kept_by_sample_only_where_their_first_dimension_counts_samples(samples: int):
    model, inputs = perceptron(), torch.randn(samples, 6, 5)  # 6 places, and 6 samples a batch
    losses: dict[str, list[float]] = {}
    for order in ("samples first", "places first"):
        turned = Told((lambda z: z.transpose(0, 1)) if order == "places first" else lambda z: z)
        turned.inner.load_state_dict(model.state_dict())
        problem, training = posed(turned, inputs, batch_size=6), Training(learning_rate=0.0)
        state, losses[order] = begun(training, problem), []
        for k in range(4):
            gradients, told = training.gradients(problem, state, half(problem))
            training.update(state, gradients)
            losses[order].append(told["loss"])
            assert state["repeat"] == (order == "samples first")
            if k == 0:  # two of the samples tell
                assert told["forward"] == 2 * len(problem.inputs().positions(0)) + 2
    assert losses["places first"] == pytest.approx(losses["samples first"], rel=1e-4)


class Normed(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_teacher_in_eval_mode_student_with_batch_statistics_and_without_dropout():
    model = Normed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.randn(8, 5) * 3 + 1
    problem, training = posed(model, inputs), Training()
    state = begun(training, problem)
    first = training.gradients(problem, state, {})[1]["loss"]
    order = problem.inputs().positions(0)
    with torch.no_grad():
        dense = model(inputs[order])
        assert torch.allclose(state["teacher"][0][order], dense, atol=1e-6)
        normal = torch.nn.functional.batch_norm(
            model[0](inputs), None, None, model[1].weight, model[1].bias, training=True
        )
        batch = model[3](normal)[order]
    assert first == pytest.approx(float(LOSSES["kl"](batch, dense, 2.0, 2.0)), rel=1e-4)
    expected = 0.9 * before["1.running_mean"] + 0.1 * model[0](inputs).mean(0).detach()
    assert torch.allclose(state["tensors"]["1.running_mean"], expected, atol=1e-5)
    assert int(state["tensors"]["1.num_batches_tracked"]) == int(before["1.num_batches_tracked"]) + 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(part.training for part in model.modules())


def test_a_batch_of_one_says_what_to_change():
    problem, training = posed(Normed(), torch.randn(3, 5), batch_size=1), Training()
    with pytest.raises(UsageError, match="larger batch_size"):
        training.gradients(problem, begun(training, problem), {})


def test_frozen_parameters_are_trained_and_stay_frozen_in_the_users_model():
    model = perceptron().requires_grad_(requires_grad=False)
    problem, training = posed(model, torch.randn(8, 5)), Training()
    gradients, _ = training.gradients(problem, begun(training, problem), half(problem))
    assert gradients.keys() == dict(model.named_parameters()).keys() == set(trained(problem))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_half_precision_is_trained_in_float32_and_comes_back_in_its_own():
    problem, training = posed(perceptron(torch.bfloat16), torch.randn(8, 5)), Training(steps=3)
    state = begun(training, problem)
    assert all(tensor.dtype == torch.float32 for tensor in state["tensors"].values())
    for _ in range(3):
        training.update(state, training.gradients(problem, state, half(problem))[0])
    found = training.tensors(problem, Candidate.dense(problem), state)
    assert found and all(tensor.dtype == torch.bfloat16 for tensor in found.values())


# options and schedules


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"steps": True},
        {"learning_rate": -1},
        {"learning_rate": "fast"},
        {"temperature": 0},
        {"loss": "kll"},
        {"loss": ["kl"]},
        {"block_weight": float("nan")},
        {"blocks": 3},
        {"blocks": [1]},
        {"outputs": 3},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(option: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(option))):
        Training(**option)


@pytest.mark.parametrize("option", [{"every": 0}, {"freeze_at": 1.1}, {"ramp": 0.5}, {"ramp_until": -0.1}])
def test_a_schedule_out_of_range_is_refused_by_name(option: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(option))):
        Schedule(**option)


@pytest.mark.parametrize("steps", [1, 2, 3, 12, 250])
@pytest.mark.parametrize("freeze_at", [0.0, 0.3, 0.8, 1.0])
def test_every_schedule_ends_on_the_budget_itself(steps: int, freeze_at: float):
    schedule = Schedule(every=5, freeze_at=freeze_at, ramp=8.0, ramp_until=0.6)
    due = [t for t in range(steps) if schedule.due(t, steps)]
    assert due[0] == 0 and due[-1] == schedule.last(steps) and schedule.factor(due[-1], steps) == 1.0
    factors = [schedule.factor(t, steps) for t in range(steps)]
    assert factors == sorted(factors, reverse=True)
    assert all(factors[t] == factors[t - 1] for t in range(1, steps) if t not in due)  # it changes with the masks
    if len(due) > 1 and freeze_at == 0.8:
        assert factors[0] == (8.0 if steps == 250 else pytest.approx(8.0 ** (steps / 250) ** 0.5))


def test_a_step_is_that_of_torchs_adam_to_the_bit():
    problem = posed(nn.Linear(6, 5), torch.randn(8, 6))
    training = Training(steps=9)
    state = begun(training, problem)
    theirs = {name: value.clone().requires_grad_() for name, value in state["tensors"].items()}
    groups = [{"params": [theirs[name]], "lr": 0.02 * state["scale"][name]} for name in theirs]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-8)
    for k in range(4):
        draw = torch.Generator().manual_seed(k)
        gradients = {name: torch.randn(value.shape, generator=draw) for name, value in theirs.items()}
        training.descend(state, gradients, 0.02)
        for name, value in theirs.items():
            value.grad = gradients[name]
        optimiser.step()
    assert state["step"] == 4
    assert all(torch.equal(state["tensors"][name], value.detach()) for name, value in theirs.items())


def test_masks_of_several_counts_are_those_of_each_count_from_one_score():
    problem = posed(nn.Linear(6, 5), torch.randn(8, 6))
    state, counts = begun(Training(), problem), [{"weight": k} for k in (7, 30, 0, 29)]
    asked = []

    def score(layer: Any, weight: Tensor, evidence: Any) -> Tensor:
        asked.append(layer.name)
        return weight.abs()

    problem = replace(problem, score=score)
    masks = Training().select_each(problem, state, None, counts)
    assert asked == ["weight"]
    for found, kept in zip(masks, counts, strict=True):
        assert torch.equal(found["weight"], Training().select(problem, state, None, kept)["weight"])


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, 1.0], [1.0, -math.inf]])
def test_a_score_that_is_not_finite_is_seen_from_its_extremes(values: list[float]):
    assert not is_finite(torch.tensor([*values, 0.0])) and is_finite(torch.tensor([1.0, -2.0]))
    assert is_finite(torch.zeros(0)) and not is_finite(torch.tensor(values, dtype=torch.float16))


@pytest.mark.parametrize("limits", [{"sparsity": 0.5}, {"macs": "30%"}, {"sparsity": 0.9, "params": "60%"}])
def test_no_ramp_begins_wider_than_the_dense_net(limits: dict[str, Any]):
    budget = Budget(**limits).on((Term("a", 200, macs=800), Term("b", 800, macs=800)))
    schedule = Schedule(ramp=50.0)
    everything, halves = {"a": 200, "b": 800}, {"a": 0.5, "b": 0.5}
    first = schedule.budget(budget, 0, 1_000)
    assert first.counts(halves) == everything and first.factor == budget.widest
    later = [schedule.budget(budget, t, 1_000).counts(halves) for t in range(5, 600, 100)]
    assert later[0] != everything and all(sum(a.values()) > sum(b.values()) for a, b in itertools.pairwise(later))
    assert budget.widened(budget.widest * 0.9).counts(halves) != everything


def test_a_ramp_below_the_dense_net_is_the_one_of_the_equation():
    budget, schedule = Budget(sparsity=0.95).on((Term("a", 1_000),)), Schedule(ramp=8.0)
    factors = [schedule.budget(budget, t, 250).factor for t in (0, 50, 149, 150)]
    assert factors == [8.0, 1 + 7 * (1 - 50 / 150) ** 3, 1 + 7 * (1 - 145 / 150) ** 3, 1.0]
