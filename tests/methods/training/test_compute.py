"""Choices about memory and speed: what is learned stays as it is, or near it, and the user's model is left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import AllotError, UsageError
from allot.methods.training import batch_loss as distance
from allot.methods.training.distillation import Training
from allot.network.call import call
from allot.network.checkpointing import repeated_blocks
from allot.network.compute import Compute
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem


class Block(nn.Module):
    """A residual block with batch norm and a buffer that counts its calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(x + self.norm(self.conv(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Sequential(Block(6), Block(6)), Block(6)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(6 * 16, 5)).eval()


DATA = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def posed(model: nn.Module, compute: Compute, data: Tensor = DATA) -> Problem:
    calibration = Calibration.of(data, batch_size=24)
    problem = make_problem(model, Budget(sparsity=0.5), Unstructured(), calibration=calibration)
    return replace(problem, compute=compute)


def learned(compute: Compute, training: Training | None = None, model: nn.Module | None = None) -> Any:
    """(loss, gradients, running statistics, state) of one step on weights other than the dense ones."""
    training, problem = training or Training(), posed(model or net(), compute)
    state = training.begin(problem, Candidate.dense(problem))
    draw = torch.Generator().manual_seed(1)
    tensors = {
        name: (value + 0.1 * torch.randn(value.shape, generator=draw)).requires_grad_()
        for name, value in problem.dense.items()
        if value.is_floating_point() and "running" not in name and "calls" not in name
    }
    running = {n: v.clone() for n, v in problem.dense.items() if "running" in n or "num" in n}
    loss, gradients, _ = training.loss_of(problem, state, tensors | running)
    return loss, gradients, running, state


def aligned(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    flat = [torch.cat([g.float().flatten() for g in found.values()]) for found in (ours, theirs)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


# activation checkpointing


@pytest.mark.parametrize("micro_batch", [0, 7])
@pytest.mark.parametrize("blocks", [(), ("3.conv",)])
def test_checkpointing_gives_the_same_numbers(micro_batch: int, blocks: tuple[str, ...]):
    plain = learned(Compute(micro_batch), Training(blocks=blocks))
    again = learned(Compute(micro_batch, checkpoint=True), Training(blocks=blocks))
    assert again[0] == plain[0]
    for ours, theirs in zip(again[1:3], plain[1:3], strict=True):  # gradients, running statistics
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_checkpointing_keeps_inputs_of_blocks_only():
    model, kept = net(), []
    tensors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for compute in (Compute(), Compute(checkpoint=True)):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            call(model, tensors, DATA, compute=compute)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2


def test_checkpointing_leaves_the_model_as_it_was():
    model = net()
    own = model[3].forward
    model[3].forward = own  # some put a forward on the instance
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    buffers = [dict(module._buffers) for module in model.modules()]
    learned(Compute(checkpoint=True), model=model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model[3].forward is own and "forward" not in vars(model[2][0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    now = [module._buffers for module in model.modules()]
    assert all(a[k] is b[k] for a, b in zip(now, buffers, strict=True) for k in b)


def test_blocks_are_the_outermost_modules_of_a_class_that_repeats():
    model = net()
    assert repeated_blocks(model) == [model[2][0], model[2][1], model[3]]
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert len(repeated_blocks(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))) == 3
    with pytest.raises(UsageError, match="checkpoint: Sequential has no repeated blocks"):
        call(nn.Sequential(nn.Linear(2, 2)), {}, torch.zeros(1, 2), compute=Compute(checkpoint=True))


# precision


def test_bf16_learns_nearly_the_same_and_keeps_gradients_in_float32():
    plain, low = learned(Compute()), learned(Compute(amp="bf16"))
    assert low[0] == pytest.approx(plain[0], rel=0.05) and low[0] != plain[0]
    assert all(gradient.dtype == torch.float32 for gradient in low[1].values())
    assert aligned(low[1], plain[1]) > 0.99


def test_an_overflow_of_fp16_halves_the_factor_and_loses_no_step(monkeypatch: pytest.MonkeyPatch):
    plain = learned(Compute())
    monkeypatch.setattr(distance, "SCALES", (2.0**30, 1))
    low = learned(Compute(amp="fp16"))
    assert 1 <= low[3]["loss_scale"] < 2.0**30 and low[3]["finite"] == 1
    assert aligned(low[1], plain[1]) > 0.99
    for name, running in plain[2].items():  # moved once, however often the batch was done
        torch.testing.assert_close(low[2][name], running, rtol=0.01, atol=0.01)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: torch.zeros(1, dtype=torch.bool))
    monkeypatch.setattr(distance, "SCALES", (2.0, 1))
    with pytest.raises(AllotError, match="gradients overflow fp16 in step 0"):
        learned(Compute(amp="fp16"))


def test_precision_is_refused_where_it_cannot_be_computed(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="amp=bf16: the model computes in float64; of float32 only"):
        Compute(amp="bf16").check(nn.Linear(2, 2).double())

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such type here")

    Compute(amp="bf16").check(nn.Linear(2, 2))
    monkeypatch.setattr(nn.functional, "linear", refuse)
    with pytest.raises(UsageError, match=r"amp=fp16 cannot be computed on cpu here \(no such type here\)"):
        Compute(amp="fp16").check(nn.Linear(2, 2))


# layout, compiling, the value itself


def test_channels_last_reach_the_convolutions_and_change_nothing_but_rounding():
    for channels in (1, 2):
        data = DATA[:, :channels]
        model = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.Conv2d(6, 6, 3))
        layouts = []
        model[1].register_forward_pre_hook(lambda module, args, seen=layouts: seen.append(args[0].stride()[1]))
        outputs = []
        for last in (False, True):
            calibration = Calibration.of(data, batch_size=24, channels_last=last)
            with torch.no_grad():
                outputs.append(call(model, {}, calibration.batch(0)[0]))
        assert layouts == [16, 1]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler imports what torch deprecates
@pytest.mark.parametrize("normed", [True, False])
def test_a_compiled_model_learns_the_same_and_is_left_as_it_was(normed: bool):
    body = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)]
    body = body if normed else [part for part in body if not isinstance(part, nn.BatchNorm2d)]
    micro_batch = 0 if normed else 8
    if normed:
        with pytest.raises(UsageError, match="compile and micro_batch: one of them"):
            Compute(8, compile=True).check(nn.Sequential(*body))
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(6 * 4, 5)).eval()
    attributes = [set(vars(module)) for module in model.modules()]
    plain = learned(Compute(micro_batch), model=model)
    ours = learned(Compute(micro_batch, compile=True), model=model)
    assert ours[0] == pytest.approx(plain[0], rel=1e-4)
    for found, theirs in zip(ours[1:3], plain[1:3], strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_what_cannot_be_chosen_is_refused():
    assert Compute(cached="1MB").cached == 10**6 and Compute.of({"micro_batch": 3}).micro_batch == 3
    assert Compute.of(None) == Compute() and Compute.of({"amp": None}) == Compute()
    for given, told in (
        ({"micro_batch": -1}, "micro_batch=-1"),
        ({"micro_bach": 1}, "did you mean 'micro_batch'"),
        ({"amp": "fp8"}, "unknown amp 'fp8'"),
        ({"checkpoint": 1}, "checkpoint=1: true or false"),
        ({"cached": "much"}, "cached=much: a number of bytes"),
        ({"cached": "50%"}, "cached=50%: a number of bytes"),
        ({"compile": True, "checkpoint": True}, "one of them"),
        (3, "compute=3"),
    ):
        with pytest.raises(UsageError, match=told):
            Compute.of(given)


class Counting(nn.Module):
    """What it gives depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)
        self.register_buffer("ran", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return x + torch.tanh(self.own(x) - 0.5 * self.ran)


def test_a_second_run_sees_buffers_as_the_first_one_did():
    torch.manual_seed(0)
    net = nn.Sequential(Counting(), Counting(), nn.Linear(6, 3)).eval()
    found = []
    for choice in (Compute(), Compute(checkpoint=True)):
        calibration = Calibration.of(torch.ones(4, 6), batch_size=4)
        problem = replace(
            make_problem(net, Budget(sparsity=0.5), Unstructured(), calibration=calibration), compute=choice
        )
        masks = {layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in problem.scope}
        masks["2.weight"] = torch.arange(18).view(3, 6) % 2 == 0  # so that there is something to learn
        training = Training()
        found.append(training.gradients(problem, training.begin(problem, Candidate.dense(problem)), masks)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)
