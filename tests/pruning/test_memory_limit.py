"""A limit of memory: choices are tried in the stated order, the first that fits is taken, said and kept."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import Stopped, UsageError
from allot.network.compute import Compute
from allot.pruning import memory_limit as memory
from allot.pruning.assemble import assemble
from allot.pruning.memory_limit import OverLimit, choose_compute, compute_choices, peak
from allot.pruning.setup import make_problem
from allot.report.page import run_page


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x)


def net() -> nn.Sequential:
    """Few weights, large activations."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 1), Block(), Block(), nn.AvgPool2d(12), nn.Flatten(), nn.Linear(4, 3)).eval()


DATA = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
SHORT: dict[str, Any] = {"batch_size": 8, "options": {"fcpts": {"steps": 12, "start": "uniform"}}}


def problem_of(compute: Compute | None = None, model: nn.Module | None = None) -> Any:
    calibration = allot.Calibration.of(DATA, batch_size=8)
    problem = make_problem(model or net(), allot.Budget(sparsity=0.5), allot.Unstructured(), calibration=calibration)
    return replace(problem, compute=compute or Compute())


PARTS = assemble("fcpts")


def needed(compute: Compute) -> int:
    """The peak with that choice."""
    found = choose_compute(problem_of(compute), PARTS, 10**12)
    assert found and found["tried"] == []
    return found["peak"]


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    return {str(compute.to_json()): needed(compute) for compute in compute_choices(problem_of())}


def test_the_order_goes_from_exact_to_near_and_from_fast_to_slow():
    order = [compute.to_json() for compute in compute_choices(problem_of())]
    assert order == [
        {}, {"checkpoint": True}, {"micro_batch": 4}, {"micro_batch": 2},
        {"micro_batch": 4, "checkpoint": True}, {"micro_batch": 2, "checkpoint": True},
        {"micro_batch": 1, "checkpoint": True},
    ]  # fmt: skip
    plain = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(576, 3))  # no blocks that repeat
    assert [c.micro_batch for c in compute_choices(problem_of(model=plain))] == [0, 4, 2, 1]
    low = [compute.to_json() for compute in compute_choices(problem_of(Compute(micro_batch=2, amp="bf16")))]
    assert all(choices["amp"] == "bf16" and choices["micro_batch"] <= 2 for choices in low)
    assert [c.micro_batch for c in compute_choices(problem_of(Compute(checkpoint=True)))] == [0, 4, 2, 1]


def test_the_first_that_fits_is_taken(sizes: dict[str, int]):
    order = [compute.to_json() for compute in compute_choices(problem_of())]
    peaks = [sizes[str(choices)] for choices in order]
    assert peaks[1] < peaks[0] and peaks[2] < peaks[0] and peaks[-1] == min(peaks)
    for limit in sorted(peaks):
        found = choose_compute(problem_of(), PARTS, limit)
        assert found is not None
        first = next(i for i, used in enumerate(peaks) if used <= limit)
        assert (found["picked"], found["peak"], found["tried"]) == (order[first], peaks[first], order[:first])


def test_what_nothing_fits_is_an_error_that_names_the_least(sizes: dict[str, int]):
    least = min(sizes.values())
    with pytest.raises(UsageError, match=r"the least .* takes is .* [kM]B, with micro_batch=1, checkpoint"):
        choose_compute(problem_of(), PARTS, least - 1)
    with pytest.raises(UsageError, match="max_memory=lots: a number of bytes, like 800MB or 6GB"):
        choose_compute(problem_of(), PARTS, "lots")


def test_what_does_not_train_has_nothing_to_choose(caplog: pytest.LogCaptureFixture):
    found = choose_compute(problem_of(), assemble("erk"), "1MB")
    assert found and found["picked"] == {} and found["peak"] is None
    assert "nothing in this chain trains" in caplog.text
    assert choose_compute(problem_of(), PARTS, None) is None


def test_the_peak_of_tensors_is_what_is_alive_at_a_time():
    cpu = torch.device("cpu")
    held = torch.zeros(1000)
    with peak(cpu, [held, held[10:]]) as found:
        one = torch.ones(500)
        one = one + 1  # two at a time
        one.add_(1)
        del one
        torch.ones(100)
    assert found.bytes == 4 * (1000 + 2 * 500)
    weight = torch.ones(1000, requires_grad=True)
    with peak(cpu) as found:
        y = weight.sin()  # kept: its input only, which is there already
        y.exp().sum().backward()
    assert 3 * 4000 <= found.bytes <= 5 * 4000
    with pytest.raises(OverLimit), peak(cpu, [torch.ones(999)], most=4000):
        torch.ones(2)


def test_a_run_says_what_it_picked_and_keeps_it(
    tmp_path: Path, sizes: dict[str, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    data = torch.cat([DATA, DATA[:2]])  # two are watched
    limit = sizes[str({"checkpoint": True})] + DATA[:2].nbytes

    def run(out: Path, **more: Any) -> Any:
        more = {"batch_norm": "batch", **more}
        return allot.prune(net(), data, "sparsity=0.5", method="fcpts", save_to=out, **SHORT, **more)

    free = run(tmp_path / "free")
    calls = iter(range(10**6))
    with pytest.raises(Stopped), caplog.at_level(logging.WARNING, "allot"):
        run(tmp_path / "held", max_memory=limit, should_stop=lambda: next(calls) > 5)
    assert "at the peak, with checkpoint (more than that with nothing chosen)" in caplog.text
    monkeypatch.setattr(memory, "_peak", None)  # nothing is measured again
    held = run(tmp_path / "held", max_memory=limit)
    told = held.report()["diagnostics"]["memory"]
    assert told == {"limit": limit, "asked": {}, "picked": {"checkpoint": True}, "peak": limit, "tried": [{}]}
    assert json.loads((tmp_path / "held/report.json").read_text())["diagnostics"]["memory"] == told
    page = run_page(held.report(), json.loads((tmp_path / "held/certificate.json").read_text()), "", [])
    assert f"takes {limit:,} at the peak, with checkpoint." in page
    assert all(torch.equal(free.state_dict()[name], value) for name, value in held.state_dict().items())


def test_what_changes_results_is_part_of_what_a_run_is(tmp_path: Path):
    def run(**compute: Any) -> Any:
        return allot.prune(
            net(), DATA, "sparsity=0.5", method="fcpts", save_to=tmp_path / "run", compute=compute, **SHORT
        )

    run(micro_batch=2, checkpoint=True)
    assert json.loads((tmp_path / "run/run.json").read_text())["configuration"]["compute"] == {"micro_batch": 2}
    run(micro_batch=2)  # exact choices may change
    with pytest.raises(UsageError, match=r"compute\.micro_batch was 2, is None"):
        run()
