"""Tables of latency are of the layers that run; nets are timed beside the dense one, and held to the limit by that."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import allot
from allot.budget.budget import Budget
from allot.budget.channels import channel_budget
from allot.errors import BudgetError, Stopped, UsageError
from allot.export.timing import latency as timing
from allot.export.timing.latency import Runtime, fitted
from allot.methods.training.selection import Selection
from allot.pruning import latency_limit as held
from allot.pruning import setup
from allot.pruning.setup import make_problem
from allot.run.patterns import parse
from export.damage import DAMAGES, damage, passed
from network.coupling.nets import net, picture

NETS = ("resnet", "mobilenet", "grouped conv")  # the clock does not see into fused attention


def work(runs: Mapping[str, Callable[[], Any]], **settings: Any) -> dict[str, float]:
    """A clock that counts multiply-accumulates: a microsecond each, and one for every run."""
    taken = {}
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        taken[name] = 1e-6 * (1 + counter.get_total_flops() / 2)
    return taken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timed", work)


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("name", NETS)
def test_the_tables_foretell_a_net_whose_time_is_its_macs(name: str, clock: None, torch_only: None):
    problem = make_problem(net(name), Budget(latency="70%"), parse("channels"), example=picture(1))
    known = channel_budget(problem.budget).latency
    assert known.off < 0.1 and known.scale == pytest.approx(1, rel=0.2)
    whole = {term.name: term.total for term in problem.budget.terms}
    assert problem.budget.cost("latency", whole) == pytest.approx(known.dense, rel=0.1)


@pytest.mark.parametrize("name", NETS)
def test_a_share_of_the_time_is_that_share_of_the_macs_where_nothing_else_takes_time(
    name: str, clock: None, torch_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = {
        "allocate": "uniform",
        "pattern": "channels",
        "repair": "none",
        "save_to": tmp_path / "run",
        "example": picture(1),
    }
    result = allot.prune(net(name), None, "latency=60%", **made)
    told = result.report()["latency"]
    assert told["runtime"] == "torch" and told["batch"] == 1
    assert told["sparse_ms"] <= told["limit_ms"] == pytest.approx(0.6 * told["dense_ms"], rel=1e-5)
    assert told["predicted_ms"] == pytest.approx(told["sparse_ms"], rel=0.02)
    slim = work({"slim": Runtime("torch").ready(result.slim(), picture(1))})["slim"]
    assert told["sparse_ms"] == pytest.approx(1e3 * slim, rel=1e-3)
    row = result.report()["budget"][0]
    assert row["kind"] == "latency" and row["met"] and row["achieved"] <= row["limit"]
    checks = {row["check"]: row for row in result.verify()["rows"]}
    assert checks["latency=60%, ns by the tables"]["passed"]
    assert checks["latency=60%, ns by the tables"]["found"] == f"{row['achieved']:,}"
    assert 100 * told["sparse_ms"] / told["dense_ms"] > 45  # and not much less
    monkeypatch.setattr(timing, "timed", None)  # opened, not measured
    again = allot.prune(net(name), None, "latency=60%", **made)
    assert again.allocation == result.allocation and again.report()["latency"] == told


def test_a_run_goes_on_with_the_tables_it_began_with(clock: None, torch_only: None, tmp_path: Path, monkeypatch: Any):
    made = {"allocate": "uniform", "pattern": "channels", "repair": "bn", "samples": 8, "batch_size": 4, "seed": 3}
    data = picture(8)
    whole = allot.prune(net("resnet"), data, "latency=70%", **made, save_to=tmp_path / "whole")
    seen: list[str] = []

    def stop() -> bool:
        return "repair-1-bn" in seen

    with pytest.raises(Stopped):
        allot.prune(
            net("resnet"), data, "latency=70%", **made, save_to=tmp_path / "run",
            on_step=lambda p: seen.append(p.stage), should_stop=stop,
        )  # fmt: skip
    monkeypatch.setattr(timing, "latency_of", None)  # is not asked again
    monkeypatch.setattr(setup, "latency_of", None)
    found = allot.prune(net("resnet"), data, "latency=70%", **made, save_to=tmp_path / "run")
    assert found.allocation == whole.allocation and found.verify()["passed"]
    assert json.loads((tmp_path / "run/latency.json").read_text()) == json.loads(
        (tmp_path / "whole/latency.json").read_text()
    )


def test_tables_that_were_changed_fail_verification(clock: None, torch_only: None, tmp_path: Path):
    made = {"allocate": "uniform", "pattern": "channels", "repair": "none", "example": picture(1)}
    allot.prune(net("resnet"), None, "latency=60%", **made, save_to=tmp_path / "run")
    tables = json.loads((tmp_path / "run/latency.json").read_text())
    (tmp_path / "run/latency.json").write_text(json.dumps({**tables, "slow": 3.0}))
    failed = [row["check"] for row in allot.verify(tmp_path / "run")["rows"] if not row["passed"]]
    assert "sha256" in failed and "latency=60%, ns by the tables" in failed


class Machine:
    """Takes `slower` times what the tables say, and `more` on top for every attempt."""

    def __init__(self, slower: float, more: float = 0.0) -> None:
        self.slower, self.more, self.calls = slower, more, 0

    def __call__(self, problem: Any, plan: Any) -> dict[str, int]:
        kept = {name: len(some) for name, some in plan.kept.items()}
        self.calls += 1
        true = channel_budget(problem.budget).slowed(1.0).time(kept)[0] * (self.slower + self.more * self.calls)
        return {"dense": channel_budget(problem.budget).latency.dense, "sparse": round(true)}


@pytest.mark.parametrize(
    ("slower", "calls"), [(1.0, 4), (1.3, 6), (0.8, 6)]
)  # accepted after two, and timed once more at the end
def test_counts_follow_what_was_measured_in_both_directions(
    slower: float, calls: int, clock: None, torch_only: None, monkeypatch: pytest.MonkeyPatch
):
    machine = Machine(slower)
    monkeypatch.setattr(held, "time_net", machine)
    problem = make_problem(net("resnet"), Budget(latency="60%"), parse("channels"), example=picture(1))
    table = channel_budget(problem.budget)
    result = allot.prune(
        net("resnet"), None, "latency=60%", allocate="uniform", pattern="channels", repair="none", example=picture(1)
    )
    assert machine.calls <= calls
    true = table.slowed(1.0).time(result.allocation.kept)[0] * slower
    ceiling = table.limits[0].ceiling
    assert 0.85 * ceiling <= true <= ceiling + 1  # tiny nets have few counts to choose from
    assert result.problem.budget.cost("latency", result.allocation.kept) == pytest.approx(true, rel=1e-3)


def test_a_machine_that_is_never_fast_enough_is_an_error_with_what_was_tried(
    clock: None, torch_only: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(held, "time_net", Machine(100.0, 50.0))
    with pytest.raises(BudgetError, match="nets timed: "):
        allot.prune(
            net("resnet"), None, "latency=60%", allocate="uniform", pattern="channels", repair="none",
            example=picture(1),
        )  # fmt: skip


def test_a_fit_finds_the_figures_that_made_the_times_and_none_below_zero():
    draw = np.random.default_rng(0)
    sums, traffic = draw.uniform(10, 100, 8), draw.uniform(1e3, 1e4, 8)
    b, s, m, off = fitted(list(20 + 1.5 * sums + 0.01 * traffic), list(sums), list(traffic))
    assert (b, s, m) == pytest.approx((20, 1.5, 0.01)) and off < 1e-9
    b, s, m, off = fitted(list(500 - 1.0 * sums), list(sums), list(traffic))
    assert s >= 0 and m >= 0 and off > 0.01


@pytest.mark.parametrize("runtime", ["onnx", "torch:3"])
def test_a_real_clock_times_every_layer_and_the_whole(runtime: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "WHOLE", timing.WHOLE[:2])  # each net is an export
    monkeypatch.setattr(timing, "MIXED", 1)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding="same"), nn.BatchNorm2d(2), nn.ReLU(), nn.ConvTranspose2d(2, 2, 2, 2),
        nn.ReLU(), nn.Flatten(), nn.Linear(2 * 256, 5),
    ).eval()  # fmt: skip
    timing_of = lambda *given: timing.latency_of(*given, runtime=Runtime.parse(runtime))  # noqa: E731
    problem = make_problem(
        model, Budget(latency="10s"), parse("channels"), example=torch.randn(1, 3, 8, 8), latency=timing_of
    )
    known = channel_budget(problem.budget).latency
    assert [layer.layer for layer in known.layers] == ["0.weight", "3.weight", "6.weight"]
    assert all(time > 0 for layer in known.layers for row in layer.times for time in row)
    assert known.runtime == runtime and known.batch == int(runtime.partition(":")[2] or 1) and known.dense > 0
    assert known.layers[1].places == 256 * known.batch and known.layers[1].out == 1


@pytest.mark.parametrize("text", ["tensorrt", "onnx:many", "torch:0", "onnx:"])
def test_a_runtime_that_is_none_is_refused(text: str):
    if text == "onnx:":
        with pytest.raises(UsageError, match="batch size after the colon"):
            Runtime.parse(text)
        return
    with pytest.raises(UsageError, match="runtime"):
        Runtime.parse(text)


class Counting(nn.Module):
    """Writes to a buffer in every pass, and applies one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        x = self.first(x).relu()
        return self.last(self.twice(self.twice(x).relu()).relu())


def counting() -> Counting:
    torch.manual_seed(0)
    return Counting().eval()


def test_timing_leaves_the_model_and_the_callers_draws_as_they_were(torch_only: None):
    model, before = counting(), torch.get_rng_state()
    given = {name: value.clone() for name, value in model.state_dict().items()}
    with contextlib.suppress(BudgetError):  # a net so small waits more than it computes
        allot.prune(
            model, None, "latency=95%", allocate="uniform", pattern="channels", repair="none", example=torch.ones(1, 6)
        )  # fmt: skip
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_runs_twice_takes_twice_the_time_and_its_own_dtype(
    dtype: torch.dtype, torch_only: None, monkeypatch: pytest.MonkeyPatch
):
    seen: set[torch.dtype] = set()

    def watched(runs: Mapping[str, Callable[[], Any]], **settings: Any) -> dict[str, float]:
        seen.update(run().dtype for run in runs.values())
        return work(runs)

    monkeypatch.setattr(timing, "timed", watched)
    model, x = counting().to(dtype), torch.ones(1, 6, dtype=dtype)
    known = make_problem(model, Budget(latency="70%"), parse("channels"), example=x).budget.latency
    times = {layer.layer: layer.times[-1][-1] for layer in known.layers}
    assert times["twice.weight"] == pytest.approx(2 * 1e3 * (1 + 256)) and times["last.weight"] == 1e3 * (1 + 48)
    assert dtype in seen and seen <= {dtype, torch.float32}


def test_tables_are_right_for_the_net_with_equal_shares_that_meets_the_limit(
    torch_only: None, monkeypatch: pytest.MonkeyPatch
):
    def steep(runs: Mapping[str, Callable[[], Any]], **settings: Any) -> dict[str, float]:
        return {name: (1e6 * time) ** 1.5 / 1e6 for name, time in work(runs).items()}  # no sum of layers is like that

    monkeypatch.setattr(timing, "timed", steep)
    problem = make_problem(net("resnet"), Budget(latency="40%"), parse("channels"), example=picture(1))
    kept = problem.budget.counts({term.name: 1.0 for term in problem.budget.terms})
    plan = allot.network.channels.ChannelPlan.of(
        problem.model, problem.scope.groups, {n: range(k) for n, k in kept.items()}
    )
    assert held.time_net(problem, plan)["sparse"] == pytest.approx(problem.budget.cost("latency", kept), rel=0.15)


def test_a_net_that_is_over_at_the_end_is_an_error_and_time_is_in_units_of_the_dense_net(
    clock: None, torch_only: None, monkeypatch: pytest.MonkeyPatch
):
    problem = make_problem(net("resnet"), Budget(latency="60%"), parse("channels"), example=picture(1))
    ready = Selection()
    whole = allot.run.problem.Candidate.dense(problem)
    counts = problem.budget.counts({term.name: 1.0 for term in problem.budget.terms})
    cut = allot.run.driver.drive(
        ready, problem, replace(whole, allocation=allot.Allocation.of(counts, whole.allocation.total))
    )
    dense = channel_budget(problem.budget).latency.dense
    monkeypatch.setattr(held, "time_both", lambda *given: [7.0, 3.5])  # a machine that counts otherwise
    assert held.latency_report(problem, cut)["sparse_ms"] == pytest.approx(dense / 2e6)
    monkeypatch.setattr(held, "time_both", lambda *given: [1.0, 0.9])
    with pytest.raises(BudgetError, match="last of five measurements"):
        held.latency_report(problem, cut)


@pytest.mark.parametrize("damage", [{"layers": []}, {"slow": 0}, {"slow": -1}, {"dense": 0}, {"base": float("nan")}])
def test_tables_of_no_clock_are_refused(damage: dict[str, Any], clock: None, torch_only: None):
    problem = make_problem(net("resnet"), Budget(latency="60%"), parse("channels"), example=picture(1))
    whole = channel_budget(problem.budget).latency.to_json()
    with pytest.raises(UsageError, match="no table of latencies"):
        type(channel_budget(problem.budget).latency).from_json({**whole, **damage})
    for broken in ({"times": []}, {"rows": [1, 1]}, {"out": 7}, {"times": [[1.0]]}):
        layer = {**whole["layers"][0], **broken}
        with pytest.raises(UsageError, match="no table of latencies"):
            type(channel_budget(problem.budget).latency).from_json({**whole, "layers": [layer]})


def test_a_directory_of_another_model_is_refused_in_one_line(clock: None, torch_only: None, tmp_path: Path):
    made = {"allocate": "uniform", "pattern": "channels", "repair": "none", "save_to": tmp_path / "run"}
    seen: list[str] = []
    ends = {"on_step": lambda step: seen.append(step.stage), "should_stop": lambda: "select" in seen}
    with pytest.raises(Stopped):
        allot.prune(net("resnet"), None, "latency=60%", **made, **ends, example=picture(1))
    with pytest.raises(UsageError, match="belongs to another"):
        allot.prune(counting(), None, "latency=60%", **made, example=torch.ones(1, 6))


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_tables_fail_verification_and_do_not_raise(how: str, clock: None, torch_only: None, tmp_path: Path):
    made = {"allocate": "uniform", "pattern": "channels", "repair": "none", "example": picture(1)}
    allot.prune(net("resnet"), None, "latency=60%", **made, save_to=tmp_path / "run")
    damage(tmp_path / "run/latency.json", how)
    assert not passed(tmp_path / "run")
