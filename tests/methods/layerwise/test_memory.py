"""What is on the device at once, counted on a simulated one that refuses to hold more than its limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.simulated import NAME, OutOfDeviceMemory, Simulated
from torch import nn

from allot import METHODS, Budget, Calibration, Unstructured, prune
from allot.methods.layerwise.blocks import size_of
from allot.methods.layerwise.streamed_block import copied
from allot.methods.training.selection import Selection
from allot.pruning.setup import make_problem
from allot.run import fidelity
from allot.run.driver import drive
from allot.run.problem import Candidate
from methods.layerwise.nets import NETS, of_transformers

THERE = torch.device(NAME)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    """A Llama-like one of 8 blocks from a configuration, random weights, and words for it."""
    torch.manual_seed(0)
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
    return of_transformers("Llama", **wide).eval(), torch.randint(0, 24, (2, 4))


OPTIONS: dict[str, Any] = {"layerwise": {"steps": 3}, "lstsq": {"iterations": 2}}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("repair", "share"),
    [("variance", 0.4), pytest.param("layerwise", 0.8, marks=slow), pytest.param("lstsq", 0.8, marks=slow)],
)
def test_a_transformer_larger_than_the_device_is_pruned_within_it(repair: str, share: float):
    model, ids = transformer()
    weights = size_of(model)
    options = {repair: OPTIONS[repair]} if repair in OPTIONS else {}
    limit = int(share * weights)
    with Simulated(limit) as device:
        result = prune(model, ids, "sparsity=0.5", repair=repair, batch_size=2, stream=NAME, options=options)
    assert device.live == 0 < device.peak <= limit < weights
    here = prune(model, ids, "sparsity=0.5", repair=repair, batch_size=2, options=options).candidate.tensors
    assert here.keys() == result.candidate.tensors.keys()
    for name, value in result.candidate.tensors.items():
        assert type(value) is torch.Tensor  # back on the host
        torch.testing.assert_close(value, here[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "rows"])
def test_a_score_by_inputs_needs_one_block_on_the_device(pattern: str):
    model, ids = transformer()
    limit = int(0.4 * size_of(model))
    asked: dict[str, Any] = {"score": "wanda", "pattern": pattern, "repair": "none", "batch_size": 2}
    with Simulated(limit) as device:
        result = prune(model, ids, "sparsity=0.5", stream=NAME, **asked)
    assert device.live == 0 < device.peak <= limit
    here = prune(model, ids, "sparsity=0.5", **asked)
    assert all(type(mask) is torch.Tensor and torch.equal(mask, here.masks[n]) for n, mask in result.masks.items())


@pytest.mark.parametrize("options", [{"iterations": 2, "refinement": 2}, pytest.param({}, marks=slow)], ids=str)
def test_admm_needs_one_block_and_its_grams_on_the_device(options: dict[str, Any]):
    model, ids = transformer()
    weights = size_of(model)
    asked: dict[str, Any] = {"method": "uniform", "repair": "admm", "pattern": "2:4", "batch_size": 2}
    asked["options"] = {"admm": options}
    with Simulated(weights) as device:
        result = prune(model, ids, "sparsity=0.5", stream=NAME, **asked)
    assert device.live == 0 < device.peak <= weights
    here = prune(model, ids, "sparsity=0.5", **asked)
    for name, value in result.candidate.tensors.items():
        assert torch.equal(result.masks[name], here.masks[name])
        torch.testing.assert_close(value, here.candidate.tensors[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("repair", ["admm", "none"])
def test_the_head_runs_for_none_of_the_batches_unless_something_is_pruned_there(
    repair: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fidelity, "NUMBERS", 1)  # watched samples go one by one
    model, _ = transformer()
    ids = torch.randint(0, 24, (12, 4))
    passes = []

    class Watched(type(model.lm_head)):  # what a hook notes is put back as it was
        def forward(self, x):
            passes.append(len(x))
            return super().forward(x)

    model.lm_head.__class__ = Watched
    prune(model, ids, "sparsity=0.5", method="llm", repair=repair, batch_size=4, stream="cpu")
    assert sorted(passes)[-2] <= 2  # to find the blocks, and to check them; one look at the outputs has a batch


def test_the_whole_net_does_not_fit_by_the_same_count():
    model, ids = transformer()
    inputs = Calibration.of(ids, batch_size=2)
    problem = make_problem(model, Budget(sparsity=0.5), Unstructured(), calibration=inputs)
    candidate = drive(Selection(), problem, drive(METHODS["uniform"], problem, Candidate.dense(problem)))
    with pytest.raises(OutOfDeviceMemory), Simulated(size_of(model) - 1):
        copied(model, THERE, {})
    with Simulated() as device:
        masks = {name: mask.to(NAME) for name, mask in candidate.masks.items()}
        there = replace(problem, model=copied(model, THERE, {}), calibration=replace(inputs, device=THERE))
        drive(METHODS["variance"], there, replace(candidate, masks=masks))
    assert device.peak > 2 * size_of(model)  # dense and masked


@pytest.mark.parametrize("repair", ["bn", *(pytest.param(name, marks=slow) for name in ("bias", "layerwise", "lstsq"))])
def test_every_tensor_is_where_it_belongs(repair: str):
    case = NETS["stages" if repair != "bias" else "encoder"]
    arguments: dict[str, Any] = {"repair": repair, "batch_size": 4}
    arguments |= {"options": {repair: OPTIONS[repair]} if repair in OPTIONS else {}}
    with Simulated() as device:  # refuses to mix
        result = prune(case.model(), case.inputs(), "sparsity=0.5", stream=NAME, **arguments)
    assert device.live == 0 < device.peak
    wanted = prune(case.model(), case.inputs(), "sparsity=0.5", **arguments).candidate.tensors
    for name, value in result.candidate.tensors.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)


def test_the_simulated_device_counts_what_is_alive_and_refuses_to_mix():
    with Simulated(limit=1000) as device:
        x = torch.ones(100).to(NAME)
        assert (device.live, x.device) == (400, THERE)
        view, double = x[:50], x + x
        assert device.live == 800  # a view is no memory
        del x
        assert device.live == 800
        del view
        assert device.live == 400 and float(double.sum()) == 200
        with pytest.raises(OutOfDeviceMemory):
            torch.cat([double, double])
        with pytest.raises(RuntimeError, match="on the device and some are not"):
            double + torch.ones(100)
        assert type(double.to("cpu")) is torch.Tensor
    assert device.peak == 800
