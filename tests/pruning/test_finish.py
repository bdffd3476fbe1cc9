"""The finish of a run: one tensor in memory at a time, a line a phase, and what run.json and the report say of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.export.export import export_run
from allot.export.files.formats import BITMASK, PLAIN, read
from allot.pruning.memory_limit import peak
from allot.pruning.result import Result

WIDTH, DEPTH = 64, 24
ONE = WIDTH * WIDTH * 4  # bytes of one layer


def deep_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))).to(dtype).eval()


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def result() -> Result:
    return allot.prune(deep_net(), torch.randn(8, WIDTH), "sparsity=0.8", method="uniform", repair="none")


def test_a_result_is_made_and_saved_with_a_few_tensors_beside_model_and_masks(result: Result, tmp_path: Path):
    held = [*result.problem.dense.values(), *result.masks.values()]
    with peak(torch.device("cpu"), held) as found:
        again = Result(result.problem, result.candidate, result.log, result.names, result.method, result.label)
        again.save(tmp_path / "run")
    assert found.bytes <= size(held) + 5 * ONE


def test_an_export_holds_one_model_more_and_a_few_tensors(result: Result, tmp_path: Path):
    result.save(tmp_path / "run")
    held = [*result.problem.dense.values(), *result.masks.values()]
    with peak(torch.device("cpu"), held) as found:
        row = export_run(
            result.problem.model, tmp_path / "run", result.report(), torch.randn(1, WIDTH), "bitmask", None
        )
    assert found.bytes <= size(held) + DEPTH * ONE + 6 * ONE and row["error"] == 0.0


def test_verifying_holds_a_few_tensors(result: Result, tmp_path: Path):
    result.save(tmp_path / "run")
    with peak(torch.device("cpu")) as found:
        assert allot.verify(tmp_path / "run")["passed"]
    assert found.bytes <= 5 * ONE


def test_a_copy_of_the_sparse_model_takes_the_memory_of_the_copy(result: Result):
    held = [*result.problem.dense.values(), *result.masks.values()]
    with peak(torch.device("cpu"), held) as found:
        model = result.model()
    assert found.bytes <= size(held) + DEPTH * ONE + 2 * ONE
    assert all(torch.equal(model.state_dict()[name] != 0, mask) for name, mask in result.masks.items())


def test_the_masked_copy_that_scoring_makes_is_not_kept():
    test = torch.utils.data.TensorDataset(torch.randn(8, WIDTH), torch.zeros(8).long())
    scored = allot.prune(deep_net(), torch.randn(8, WIDTH), "sparsity=0.8", method="uniform", repair="none", test=test)
    assert scored.scores and not scored.candidate._effective


def test_tensors_one_at_a_time_are_the_effective_ones(result: Result):
    lazy, whole = result.candidate.one_at_a_time(result.problem), result.candidate.effective(result.problem)
    assert set(lazy) == set(whole) and len(lazy) == len(whole) and "none" not in lazy
    assert all(torch.equal(lazy[name], whole[name]) for name in whole)
    with pytest.raises(KeyError):
        lazy["none"]


def test_each_phase_is_logged_with_its_seconds_and_noted_in_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="allot.phases"):
        allot.prune(
            deep_net(), None, "sparsity=0.8", method="uniform", repair="none", example=torch.randn(1, WIDTH),
            save_to=tmp_path / "run",
        )  # fmt: skip
    phases = [f"writing {PLAIN}", f"writing {BITMASK}", "re-opening and recounting", "writing the report"]
    assert [
        record.getMessage().rpartition(":")[0] for record in caplog.records if record.name == "allot.phases"
    ] == phases
    finish = json.loads((tmp_path / "run" / "run.json").read_text())["finish"]
    assert list(finish) == phases and all(seconds >= 0 for seconds in finish.values())


def test_histograms_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    module = sys.modules["allot.pruning.result"]
    counted: list[None] = []
    real = module.histograms
    monkeypatch.setattr(module, "histograms", lambda *given: counted.append(None) or real(*given))
    made = allot.prune(deep_net(), torch.randn(4, WIDTH), "sparsity=0.8", method="uniform", repair="none")
    made.save(tmp_path / "run")
    made.timed()
    assert len(counted) == 1


def test_an_export_says_how_many_layers_a_mask_would_not_make_smaller(tmp_path: Path):
    net = deep_net(torch.float16)
    shares = {f"{i}.weight": 1.0 if i < 4 else 0.5 for i in range(DEPTH)}
    budget = f"params={(4 * 2 + (DEPTH - 4)) * WIDTH * WIDTH // 2}"
    made = allot.prune(
        net,
        None,
        budget,
        allocate=shares,
        repair="none",
        example=torch.randn(1, WIDTH).half(),
        save_to=tmp_path / "run",
    )
    row = made.export(to="bitmask")
    assert row["note"] == f"4 of {DEPTH} layers are stored whole: a mask would not make them smaller"
    assert read(tmp_path / "run" / BITMASK)[1]["plain"] == 4
    assert made.verify()["passed"]


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


def test_timing_and_comparing_leave_a_model_that_counts_its_calls_as_it_was(tmp_path: Path):
    net = Counts().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = allot.prune(net, torch.randn(4, 8), "sparsity=0.5", repair="none", save_to=tmp_path / "run")
    made.timed()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
