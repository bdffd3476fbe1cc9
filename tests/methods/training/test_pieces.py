"""A batch in pieces gives what it gives whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods.training.distillation import Training
from allot.network.batch_norms import Norms
from allot.network.compute import Compute
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem


def posed(model: nn.Module, data: Tensor, micro_batch: int, batch_size: int = 12) -> Problem:
    calibration = Calibration.of(data, batch_size=batch_size)
    problem = make_problem(model.eval(), Budget(sparsity=0.5), Unstructured(), calibration=calibration)
    return replace(problem, compute=Compute(micro_batch))


def shaken(problem: Problem) -> dict[str, Tensor]:
    """Weights other than the dense ones, so that there is something to learn."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: (value + 0.1 * torch.randn(value.shape, generator=draw)).requires_grad_()
        for name, value in problem.dense.items()
        if value.is_floating_point() and "running" not in name
    }


def learned(problem: Problem, training: Training) -> tuple[float, dict[str, Tensor], int, dict[str, Tensor]]:
    state = training.begin(problem, Candidate.dense(problem))
    buffers = {n: v.clone() for n, v in problem.dense.items() if "running" in n}
    loss, gradients, forward = training.loss_of(problem, state, shaken(problem) | buffers)
    return loss, gradients, forward, buffers


PLAIN = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
NORMED = nn.Sequential(
    nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6),
    nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 5),
)  # fmt: skip


@pytest.mark.parametrize("loss", ["kl", "mse"])
@pytest.mark.parametrize("blocks", [(), ("0", "3")])
def test_micro_batches_add_up_to_the_whole_batch(loss: str, blocks: tuple[str, ...]):
    training = Training(loss=loss, blocks=blocks)
    data = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    whole, pieces = (learned(posed(PLAIN.double(), data, m), training) for m in (0, 5))
    assert pieces[0] == pytest.approx(whole[0], rel=1e-9)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(pieces[1][name], gradient, rtol=1e-6, atol=1e-10)
    assert pieces[2] == whole[2] + (12 if blocks else 0)  # the dense net's blocks are not kept


def test_batch_norms_of_micro_batches_see_the_whole_batch():
    data = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    net = NORMED.double()
    whole, pieces = (learned(posed(net, data, m, batch_size=24), Training()) for m in (0, 8))
    assert pieces[0] == pytest.approx(whole[0], rel=1e-9)
    assert pieces[2] == whole[2] + 24
    for name, running in whole[3].items():
        if "num_batches" not in name:
            torch.testing.assert_close(pieces[3][name], running, rtol=1e-6, atol=1e-9)
    flat = [torch.cat([g.flatten() for g in found[1].values()]) for found in (whole, pieces)]
    assert float(F.cosine_similarity(*flat, dim=0)) > 0.9  # the statistics' own gradient is each piece's


def test_one_piece_by_whole_statistics_is_torchs_batch_norm():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, generator=draw, dtype=torch.float64).requires_grad_()
    gamma, beta = (torch.randn(3, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    found = []
    for mode in (None, Norms()):
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        run = lambda: F.batch_norm(x, mean, var, gamma, beta, training=True, momentum=0.3)  # noqa: E731
        if mode is None:
            y = run()
        else:
            with mode:
                y = run()
        weights = torch.arange(48, dtype=torch.float64).view_as(y).sin()
        found.append([y, mean, var, *torch.autograd.grad((y * weights).sum(), [x, gamma, beta])])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
    assert len(Norms().seen) == 0


def test_pieces_whose_targets_are_zero_count_as_they_do_in_the_whole_batch():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4, 3))
        net[0].bias.zero_()
        data[:6] = -data[:6].abs()  # six of eight outputs are zero
    whole, pieces = (learned(posed(net, data, m, batch_size=8), Training(loss="mse")) for m in (0, 1))
    assert pieces[0] == pytest.approx(whole[0], rel=1e-9)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(pieces[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_a_batch_in_pieces_counts_once():
    data = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    problem = posed(NORMED.double(), data, 8, batch_size=24)
    state = Training().begin(problem, Candidate.dense(problem))
    before = {n: int(v) for n, v in state["tensors"].items() if n.endswith("num_batches_tracked")}
    Training().gradients(problem, state, {})
    assert before and all(int(state["tensors"][name]) == count + 1 for name, count in before.items())


def test_answers_that_stack_two_heads_are_no_samples():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.one(x), self.two(x)])  # [2, B, 4]

    problem = posed(Heads(), torch.randn(12, 3), 2, batch_size=4)
    state = Training(loss="mse").begin(problem, Candidate.dense(problem))
    Training(loss="mse").gradients(problem, state, {})
    assert not state["repeat"] and not state["teacher"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, track_running_stats=False), nn.SyncBatchNorm(6)])
def test_norms_that_answer_by_the_batch_are_not_parted(norm: nn.Module):
    net = nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.Flatten(), nn.Linear(6 * 16, 3))
    with pytest.raises(UsageError, match=r"^1 is a (SyncBatchNorm|batch norm without running statistics)"):
        Compute(micro_batch=2).check(net)
    Compute().check(net)


@pytest.mark.parametrize(("samples", "most", "sizes"), [(10, 4, [3, 3, 4]), (4, 8, [4]), (4, 0, [4]), (3, 1, [1] * 3)])
def test_pieces(samples: int, most: int, sizes: list[int]):
    pieces = Compute(most).pieces(samples)
    assert [stop - start for start, stop in pieces] == sizes
    assert pieces[0][0] == 0 and pieces[-1][1] == samples
