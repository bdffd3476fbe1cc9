"""Importance of whole channels against loops over them, and against every label that the net could have given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods.training import channel_gates as gates
from allot.methods.training.selection import CollectedEvidence, importance
from allot.network.layers import Group, Layer, Scope
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.patterns import Channels, Unstructured
from allot.run.problem import Candidate, Problem
from allot.run.scores import CHANNEL_SCORES, channel_norms, channel_random, channel_scale, channel_taylor
from contract import cases
from contract.cases import ON_CHANNELS, WITHOUT_CHANNELS, Case, problem_of

CASES = [case for case in cases.CASES if case not in WITHOUT_CHANNELS]


def channel_problem(case: str = "with batch norm") -> Problem:
    return problem_of(case, "params=75%", name="uniform" + ON_CHANNELS)


def evidence_of(problem: Problem, **tensors: Tensor) -> CollectedEvidence:
    candidate = Candidate.dense(problem)
    return CollectedEvidence(problem, Candidate(candidate.allocation, tensors=tensors), {})


def group_of(problem: Problem, name: str) -> Group:
    [found] = [group for group in problem.scope.groups if group.name == name]
    return found


def over_mean(norms: list[float]) -> Tensor:
    values = torch.tensor(norms, dtype=torch.float64)
    return values / values.mean()


def same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left.double(), right, rtol=1e-5)


# norms


def test_magnitude_is_the_mean_of_the_norms_of_all_that_writes_and_reads():
    problem = channel_problem()
    model: Any = problem.model.requires_grad_(False)
    evidence = evidence_of(problem)
    pairs = [[i, i + 4] for i in range(4)]  # a grouped convolution reads channel i of both halves at one place
    full = over_mean([float(model.full.weight[pair].norm()) for pair in pairs])
    depthwise = over_mean([float(model.depthwise.weight[pair].norm()) for pair in pairs])
    grouped = over_mean([float(model.grouped.weight[:, i].norm()) for i in range(4)])
    assert same(channel_norms(group_of(problem, "full"), evidence), (full + depthwise + grouped) / 3)
    written = over_mean([float(model.pointwise.weight[i].norm()) for i in range(9)])
    read = over_mean([float(model.out.weight[:, i].norm()) for i in range(9)])
    assert same(channel_norms(group_of(problem, "pointwise"), evidence), (written + read) / 2)


def test_magnitude_of_a_head_is_that_of_its_rows_and_columns():
    problem = channel_problem("attention")
    attention: Any = problem.model.requires_grad_(False).get_submodule("attention")
    rows = [[8 * part + 4 * head + i for part in range(3) for i in range(4)] for head in range(2)]
    written = over_mean([float(attention.in_proj_weight[own].norm()) for own in rows])
    read = over_mean([float(attention.out_proj.weight[:, 4 * h : 4 * h + 4].norm()) for h in range(2)])
    found = channel_norms(group_of(problem, "attention.heads"), evidence_of(problem))
    assert same(found, (written + read) / 2)


def test_scale_is_gamma_of_every_norm_that_scales_the_channel():
    problem = channel_problem()
    model: Any = problem.model.requires_grad_(False)
    evidence = evidence_of(problem)
    first = over_mean([float(model.norm1.weight[[i, i + 4]].norm()) for i in range(4)])
    second = over_mean([float(model.norm2.weight[[i, i + 4]].norm()) for i in range(4)])
    assert same(channel_scale(group_of(problem, "full"), evidence), (first + second) / 2)
    alone = over_mean(model.norm3.weight.detach().abs().tolist())
    assert same(channel_scale(group_of(problem, "pointwise"), evidence), alone)


def test_the_sign_of_gamma_does_not_count():
    problem = channel_problem()
    group = group_of(problem, "pointwise")
    flipped = evidence_of(problem, **{"norm3.weight": -problem.dense["norm3.weight"]})
    assert torch.equal(channel_scale(group, flipped), channel_scale(group, evidence_of(problem)))


@pytest.mark.parametrize("case", ["without batch norm", "linear chain", "attention"])
def test_scale_without_norms_is_magnitude(case: str):
    problem = channel_problem(case)
    evidence = evidence_of(problem)
    for group in problem.scope.groups:
        assert torch.equal(channel_scale(group, evidence), channel_norms(group, evidence))


@pytest.mark.parametrize("name", ["magnitude", "scale"])
def test_norms_are_those_of_the_candidate_and_not_of_the_model(name: str):
    problem = channel_problem()
    changed = {"norm3.weight": torch.arange(1.0, 10), "out.weight": torch.arange(1.0, 10).expand(5, 9)}
    found = CHANNEL_SCORES[name](group_of(problem, "pointwise"), evidence_of(problem, **changed))
    assert not same(CHANNEL_SCORES[name](group_of(problem, "pointwise"), evidence_of(problem)), found)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_one_tensor_does_not_weigh(factor: float):
    problem = channel_problem()
    scaled = evidence_of(problem, **{"pointwise.weight": factor * problem.dense["pointwise.weight"]})
    for group in problem.scope.groups:
        assert same(channel_norms(group, scaled), channel_norms(group, evidence_of(problem)))


# random


def test_random_is_a_function_of_seed_and_group():
    problem = channel_problem()
    group, other = group_of(problem, "full"), group_of(problem, "pointwise")
    evidence = evidence_of(problem)
    first = channel_random(group, evidence)
    assert torch.equal(first, channel_random(group, evidence_of(problem, **{"full.weight": torch.ones(8, 3, 3, 3)})))
    assert not torch.equal(first, channel_random(other, evidence)[:4])
    for seed in (1, 2, -1):
        evidence.seed = seed
        assert not torch.equal(first, channel_random(group, evidence))
    for seed in (2**62, 2**80):
        evidence.seed = seed
        assert channel_random(group, evidence).shape == (4,)
    assert float(first.min()) >= 0 and float(first.max()) < 1


# Fisher information


class Small(nn.Module):
    """Two groups and four classes."""

    def __init__(self, *, dead: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4)
        for i, tensor in enumerate(self.parameters()):
            tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
        if dead:
            self.second.weight.data[:, 2] = 0
            self.out.weight.data[:, 1] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def gated(self, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
        x = torch.tanh(self.first(x)) * gates["first"]
        return self.out(torch.tanh(self.second(x)) * gates["second"])


def small_problem(samples: int, batch_size: int, *, dead: bool = False) -> Problem:
    inputs = Case(Small, (3,)).inputs(samples)
    calibration = Calibration.of(inputs, batch_size=batch_size)
    return make_problem(Small(dead=dead), Budget.parse("params=60%"), Channels(), calibration=calibration)


def information(problem: Problem) -> dict[str, Tensor]:
    """sum over samples and over every label y of p(y | x) (d log p(y | x) / d gate)^2."""
    model: Any = problem.model
    found = {group.name: torch.zeros(group.total, dtype=torch.float64) for group in problem.scope.groups}
    for sample in problem.inputs().pick(range(len(problem.inputs()))):
        gates = {name: torch.ones(len(value), requires_grad=True) for name, value in found.items()}
        log_p = model.gated(sample, gates).log_softmax(-1)
        for one in log_p:
            for name, slope in zip(
                gates, torch.autograd.grad(one, list(gates.values()), retain_graph=True), strict=True
            ):
                found[name] += float(one.detach().exp()) * slope.double().square()
    return found


@pytest.mark.parametrize(("samples", "batch_size", "repeats"), [(4, 4, 600), (6, 3, 300)])
def test_taylor_is_the_information_of_every_label_weighted_by_its_probability(
    samples: int, batch_size: int, repeats: int, monkeypatch: pytest.MonkeyPatch
):
    problem = small_problem(samples, batch_size)
    monkeypatch.setattr(gates, "DRAWS", repeats)
    torch.manual_seed(0)
    evidence = evidence_of(problem)
    for name, expected in information(problem).items():
        found = channel_taylor(group_of(problem, name), evidence) / repeats
        assert torch.allclose(found, expected, rtol=0.35)
        assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=0.25)


def test_labels_are_drawn_by_their_probability():
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    drawn = gates._drawn_classes(logits.expand(100_000, 4), 100_000)
    found = torch.bincount(drawn.flatten(), minlength=4) / len(drawn)
    torch.testing.assert_close(found, logits.softmax(1)[0], rtol=0, atol=0.01)


def test_taylor_draws_every_label_as_often_as_the_net_says_it(monkeypatch: pytest.MonkeyPatch):
    """With each label drawn once for each unit of a fine grid of probabilities, the sum is exact."""
    problem = small_problem(1, 1)
    [sample] = problem.inputs().pick([0])
    share = problem.model(sample).softmax(-1).detach()
    labels = torch.arange(4).repeat_interleave((share * 300).round().long())
    turn = iter(labels.tolist())
    monkeypatch.setattr(gates, "DRAWS", len(labels))
    monkeypatch.setattr(gates, "_drawn_classes", lambda logits, samples: torch.full((len(logits), 1), next(turn)))
    evidence = evidence_of(problem)
    for name, expected in information(problem).items():
        found = channel_taylor(group_of(problem, name), evidence) / len(labels)
        assert torch.allclose(found, expected, rtol=0.08)


def test_taylor_asks_the_net_once_for_all_groups_and_counts_it():
    problem = channel_problem()
    evidence = evidence_of(problem)
    passed: list[int] = []
    hook = problem.model.register_forward_hook(lambda module, args, output: passed.append(len(output)))
    first = [channel_taylor(group, evidence) for group in problem.scope.groups]
    again = [channel_taylor(group, evidence) for group in problem.scope.groups]
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert sum(passed) == 20 * gates.DRAWS == evidence.forward == evidence.backward


def test_channels_that_nobody_reads_have_no_information():
    problem = small_problem(5, 5, dead=True)
    evidence = evidence_of(problem)
    first, second = (channel_taylor(group_of(problem, name), evidence) for name in ("first", "second"))
    assert first[2] == 0 and second[1] == 0
    assert int(first.count_nonzero()) == 3 and int(second.count_nonzero()) == 4


def test_taylor_leaves_the_model_and_its_gradients_alone():
    problem = channel_problem()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    channel_taylor(problem.scope.groups[0], evidence_of(problem))
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_a_score_may_ask_for_gates_and_for_input_norms():
    problem = channel_problem()
    scope: Scope = problem.scope
    layer: Layer = scope["out.weight"]

    def both(group: Group, evidence: Any) -> Tensor:
        return evidence.gate_squares(group) * float(evidence.input_norm(layer).sum())

    assert bool(torch.isfinite(both(problem.scope.groups[0], evidence_of(problem))).all())


@pytest.mark.parametrize("score", [lambda total: torch.ones(total + 1), lambda total: torch.full((total,), torch.nan)])
def test_a_score_of_another_shape_or_that_is_not_finite_is_refused_with_the_group(score: Callable[[int], Tensor]):
    problem = replace(channel_problem(), score=lambda group, evidence: score(group.total))
    group = problem.scope.groups[0]
    with pytest.raises(UsageError, match=rf"{group.name}: the score has shape .* not finite"):
        importance(problem, group, evidence_of(problem))


# every score


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CHANNEL_SCORES)
def test_a_score_is_a_finite_number_a_channel_not_below_zero(name: str, case: str):
    problem = channel_problem(case)
    evidence = evidence_of(problem)
    for group in problem.scope.groups:
        found = CHANNEL_SCORES[name](group, evidence)
        assert found.shape == (group.total,) and found.dtype in (torch.float32, torch.float64)
        assert not found.requires_grad and bool(torch.isfinite(found).all()) and bool((found >= 0).all())


@pytest.mark.parametrize("name", ["magnitude", "scale"])
@pytest.mark.parametrize("case", ["zero weights", "zero weights without batch norm"])
def test_zero_weights_score_zero_wherever_weights_decide(name: str, case: str):
    problem = channel_problem(case)
    evidence = evidence_of(problem)
    for group in problem.scope.groups:
        scaled = name == "scale" and any(member.tensor.startswith("norm") for member in group.members)
        assert bool(CHANNEL_SCORES[name](group, evidence).any()) == scaled


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CHANNEL_SCORES)
def test_scores_of_other_dtypes_are_those_of_single_precision(name: str, dtype: torch.dtype):
    inputs = Case(Small, (3,)).inputs(8)
    found = {}
    for kind in (dtype, torch.float32):
        calibration = Calibration.of(inputs.to(kind), batch_size=4)
        problem = make_problem(Small().to(kind), Budget.parse("params=60%"), Channels(), calibration=calibration)
        torch.manual_seed(3)
        score = importance(_with(problem, name), problem.scope.groups[0], evidence_of(problem))
        assert score.dtype == torch.float64
        found[kind] = score
    if name != "taylor":  # its draws differ with the last bit
        assert torch.allclose(found[dtype], found[torch.float32], rtol=0.02)


def _with(problem: Problem, name: str) -> Problem:
    return Problem(problem.model, problem.scope, problem.budget, problem.pattern, CHANNEL_SCORES[name])


# norms of inputs


def test_input_norms_are_those_of_the_candidates_net():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    problem = make_problem(model, Budget(sparsity=0.5), Unstructured(), calibration=Calibration.of(torch.randn(6, 3)))
    dense, doubled = evidence_of(problem), evidence_of(problem, **{"0.weight": 2 * model[0].weight.detach()})
    layer = problem.scope["1.weight"]
    torch.testing.assert_close(doubled.input_norm(layer), 2 * dense.input_norm(layer))


def test_a_layer_that_no_input_reaches_has_no_norms():
    problem = channel_problem()
    layer = replace(problem.scope.layers[0], name="elsewhere.weight")
    with pytest.raises(UsageError, match=r"elsewhere\.weight is never reached by the calibration inputs"):
        evidence_of(problem).input_norm(layer)
