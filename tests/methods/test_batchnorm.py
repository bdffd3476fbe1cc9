"""`bn`: the pooled statistics are those of all calibration samples together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods import METHODS
from allot.methods.training.selection import Selection
from allot.network.layers import Layer
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem
from contract.cases import bits

NORMS = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}


def convolutional(dims: int, **options: Any) -> nn.Module:
    conv, norm = NORMS[dims]
    torch.manual_seed(dims)
    return nn.Sequential(
        conv(3, 6, 3, padding=1), norm(6, **options), nn.ReLU(), conv(6, 5, 1), norm(5, **options), nn.Flatten()
    ).eval()


def repaired(model: nn.Module, inputs: Any, batch_size: int = 100) -> tuple[Problem, Candidate, Candidate]:
    """(problem, candidate before, candidate after)."""
    problem = make_problem(
        model, Budget(sparsity=0.5), Unstructured(), calibration=Calibration.of(inputs, batch_size=batch_size)
    )
    candidate = Candidate.dense(problem)
    candidate = drive(Selection(), problem, drive(METHODS["uniform"], problem, candidate))
    return problem, candidate, drive(METHODS["bn"], problem, candidate)


def statistics_in_one_pass(problem: Problem, candidate: Candidate, inputs: Tensor) -> dict[str, Tensor]:
    """The oracle: PyTorch's own running statistics after one pass in train mode with momentum 1."""
    import copy

    model = copy.deepcopy(problem.model)
    model.load_state_dict({**model.state_dict(), **candidate.effective(problem)})
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 1.0
    with torch.no_grad():
        model(inputs)
    return {name: value for name, value in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("dims", NORMS)
def test_one_batch_gives_what_pytorch_gives_with_momentum_1(dims: int):
    inputs = torch.randn(24, 3, *[5] * dims)
    problem, before, after = repaired(convolutional(dims), inputs)
    expected = statistics_in_one_pass(problem, before, inputs)
    assert len(expected) == 4
    for name, value in expected.items():
        torch.testing.assert_close(after.tensors[name], value, msg=name)


def test_batch_norm_of_matrices_is_pooled_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)).eval()
    inputs = torch.randn(30, 6) + 3
    problem, before, after = repaired(model, inputs)
    for name, value in statistics_in_one_pass(problem, before, inputs).items():
        torch.testing.assert_close(after.tensors[name], value)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 23])
def test_the_first_batch_norm_is_exact_however_the_samples_are_split(batch_size: int):
    inputs = torch.randn(24, 3, 5, 5) * torch.arange(1, 25).view(-1, 1, 1, 1)  # batches differ in mean and spread
    problem, before, after = repaired(convolutional(2), inputs, batch_size)
    expected = statistics_in_one_pass(problem, before, inputs)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(after.tensors[name], expected[name], rtol=1e-5, atol=1e-5)


def test_the_variance_is_unbiased():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0.1], [0.1, 1.0]]))
    inputs = torch.tensor([[1.0, 5.0], [2.0, 3.0], [6.0, 4.0]])
    _, _, after = repaired(model, inputs)
    torch.testing.assert_close(after.tensors["1.running_var"], torch.tensor([4.0, 1.0]) * inputs.var(0))
    torch.testing.assert_close(after.tensors["1.running_mean"], torch.tensor([2.0, 1.0]) * inputs.mean(0))


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_momentum_plays_no_part_and_only_running_statistics_change(momentum: float | None):
    inputs = torch.randn(24, 3, 5, 5)
    model = convolutional(2, momentum=momentum)
    _, before, after = repaired(model, inputs, batch_size=6)
    _, _, plain = repaired(convolutional(2), inputs, batch_size=6)
    assert after.tensors.keys() - before.tensors.keys() == {
        f"{i}.running_{what}" for i in (1, 4) for what in ("mean", "var")
    }
    assert all(torch.equal(after.tensors[name], plain.tensors[name]) for name in after.tensors)
    assert [m.momentum for m in model if isinstance(m, nn.BatchNorm2d)] == [momentum] * 2
    assert int(model[1].num_batches_tracked) == 0 and bits(model[1].running_var) == bits(torch.ones(6))


def test_a_shared_batch_norm_pools_both_of_its_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(x)) + self.norm(input=self.first(x))

    torch.manual_seed(0)
    inputs = torch.randn(16, 4)
    problem, before, after = repaired(Twice().eval(), inputs, batch_size=5)
    weights = before.effective(problem)
    seen = torch.cat(
        [inputs @ weights[f"{name}.weight"].T + problem.dense[f"{name}.bias"] for name in ("first", "second")]
    )
    torch.testing.assert_close(after.tensors["norm.running_mean"], seen.mean(0))
    torch.testing.assert_close(after.tensors["norm.running_var"], seen.var(0))


def test_a_model_without_running_statistics_costs_nothing():
    for model in (convolutional(2, track_running_stats=False), nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))):
        shape = (3, 5, 5) if isinstance(model[0], nn.Conv2d) else (3,)
        _, before, after = repaired(model.eval(), torch.randn(12, *shape))
        assert after == before


def test_a_batch_norm_that_the_inputs_never_reach_keeps_its_statistics():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.idle = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    _, _, after = repaired(Idle().eval(), torch.randn(8, 4))
    assert set(after.tensors) == {"norm.running_mean", "norm.running_var"}


def test_one_sample_without_positions_has_no_statistics_and_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(UsageError, match=r"no batch statistics from 1 samples.*larger batch_size"):
        repaired(model, torch.randn(5, 4), batch_size=1)


def test_a_dead_channel_gets_variance_0_and_no_nan():
    model = convolutional(2)
    with torch.no_grad():
        model[0].weight[0] = 0
    problem, _, after = repaired(model, torch.randn(8, 3, 5, 5))
    assert float(after.tensors["1.running_var"][0]) == 0
    assert bool(
        torch.isfinite(torch.func.functional_call(model, after.effective(problem), torch.randn(2, 3, 5, 5))).all()
    )
    assert isinstance(problem.scope.layers[0], Layer)
