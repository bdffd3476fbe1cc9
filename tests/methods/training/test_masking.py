"""Weights masked where the model uses them give what masked copies of them give, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.methods.training.distillation import Training
from allot.network.applied_masks import Masking, masked
from allot.network.compute import Compute
from allot.pruning.memory_limit import peak
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate


class Attention(nn.Module):
    """Parts of one weight are used by themselves; the output's is used by the attention, not by its own module."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x)[0]
        return x + self.last(x)


class Standardised(nn.Conv2d):
    """Its weight is worked on before use."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        assert self.weight.shape == weight.shape
        return self._conv_forward(x, weight.flatten(1).T.contiguous().T.view(weight.shape), self.bias)


class Own(torch.autograd.Function):
    """A product that no function of torch's sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return dy.float() @ weight, dy.float().T @ x


class Hidden(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Own.apply(x, self.weight) + self.bias


def tied() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4))
    net[2].weight = net[0].weight
    return net


def convolutions() -> nn.Sequential:
    body = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=2)]
    return nn.Sequential(*body, nn.ReLU(), nn.ConvTranspose2d(6, 3, 3), Standardised(3, 2, 3), nn.Flatten())


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "convolutions": (convolutions, (2, 6, 6)),
    "attention": (lambda: nn.Sequential(Attention(), Attention(), nn.Flatten(), nn.Linear(24, 4)), (3, 8)),
    "tied": (tied, (6,)),
    "hidden": (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), Hidden(6, 4)), (6,)),
}
WAYS = {
    "pieces": Compute(micro_batch=5),
    "checkpoint": Compute(checkpoint=True),
    "both": Compute(micro_batch=5, checkpoint=True),
    "bf16": Compute(micro_batch=5, amp="bf16"),
}


def stepped(name: str, compute: Compute, *, late: bool) -> tuple[Any, dict[str, Any]]:
    """(gradients of two steps, the state after them)."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make().eval()
    data = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    problem = make_problem(model, Budget(sparsity=0.5), Unstructured(), calibration=Calibration.of(data, batch_size=16))
    problem, training = replace(problem, compute=compute), Training()
    state = training.begin(problem, Candidate.dense(problem))
    if not late:
        state["late"] = False
    draw = torch.Generator().manual_seed(1)
    masks = {layer.name: torch.rand(layer.shape, generator=draw) < 0.5 for layer in problem.scope}
    found = []
    for _ in range(2):
        gradients, told = training.gradients(problem, state, masks)
        training.update(state, gradients)
        found.append((told["loss"], gradients))
    return found, state


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("way", WAYS)
def test_late_masks_learn_what_masked_copies_learn(name: str, way: str):
    compute = WAYS[way]
    if compute.checkpoint and name != "attention":
        pytest.skip("no blocks that repeat")
    if compute.amp and name == "hidden":
        pytest.skip("a function with gradients of its own says itself what it computes in")
    (late, state), (early, other) = (stepped(name, compute, late=late) for late in (True, False))
    for (loss, gradients), (wanted, theirs) in zip(late, early, strict=True):
        assert (
            loss == pytest.approx(wanted, rel=1e-2 if (name, way) == ("tied", "bf16") else 0)
            and gradients.keys() == theirs.keys()
        )
        # a tied weight is rounded to bf16 once for each use
        off = {"rtol": 1e-2, "atol": 1e-2} if (name, way) == ("tied", "bf16") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(gradients, theirs, **off)
    if not off["atol"]:
        assert all(torch.equal(state["tensors"][key], value) for key, value in other["tensors"].items())
    assert state["late"] is (name != "hidden")  # what no mask reaches is noticed, and done again with copies


def test_masks_come_late_only_where_memory_is_to_be_saved():
    assert [Compute(**how).lean for how in ({}, {"micro_batch": 4}, {"checkpoint": True}, {"amp": "bf16"})] == [
        False, True, True, False,
    ]  # fmt: skip
    assert not Compute(micro_batch=4, compile=True).lean


def test_no_copy_is_kept_for_gradients():
    weight, mask = torch.randn(300, 200).requires_grad_(), torch.rand(300, 200) < 0.5
    x = torch.randn(2, 200).requires_grad_()
    for remember in (True, False):
        masking = Masking({"w": (weight, mask)}, recompute=remember)
        with peak(torch.device("cpu")) as found:
            with masking:
                y = nn.functional.linear(x, masking.placed["w"])
            torch.zeros(300, 200)
        assert (found.bytes < 2 * 300 * 200 * 4) is remember  # the copy was gone when something as large came
        dx, dw = torch.autograd.grad(y.sum(), [x, weight])
        assert torch.equal(dx, torch.ones(2, 300) @ masked(weight.detach(), mask))
        assert torch.equal(dw, torch.ones(300, 2) @ x.detach()) and not masking.missed
