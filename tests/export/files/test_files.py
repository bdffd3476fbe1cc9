"""The files of a run: their size is known before they are written, and what goes in comes out."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import allot
from allot.budget.budget import Budget
from allot.budget.costs import mask_bits
from allot.errors import UsageError
from allot.export.files import formats as files
from allot.pruning.prune import prune
from allot.pruning.setup import make_problem
from allot.run.patterns import Unstructured, select
from contract.cases import CASES, bits
from export.damage import timeless


class Odd(nn.Module):
    """Odd shapes, tied weights, and buffers of every sort."""

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = sizes
        self.one = nn.Linear(first, second)
        self.two = nn.Linear(second, second, bias=False)
        self.tied = nn.Linear(second, second)
        self.tied.weight = self.two.weight
        self.größe = nn.Conv1d(second, third, 1)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("view", torch.arange(6.0)[2:5])
        self.register_buffer("masked", torch.full((2,), float("-inf")))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)


def sparsified(model: nn.Module, budget: Budget, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """(state with random zeros that meets the budget, what the metadata says, predicted bytes)."""
    problem = make_problem(model, budget, Unstructured())
    kept = problem.budget.counts({layer.name: 1.0 for layer in problem.scope})
    generator = torch.Generator().manual_seed(seed)
    state = files.plain_state(model)[0]
    for name, count in kept.items():
        mask = select(torch.rand(state[name].shape, generator=generator), count)
        state[name] = torch.where(mask, state[name].abs() + 0.5, 0).to(state[name].dtype)
    return state, files.metadata_of(model, problem.scope, problem.budget), problem.budget.cost("bytes", kept)


@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    sparsity=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_bitmask_file_is_as_long_as_predicted_and_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    sparsity: float,
    seed: int,
):
    model = Odd(sizes).to(dtype)
    floor = 3 / sum(p.numel() for p in (model.one.weight, model.two.weight, model.größe.weight))
    state, said, predicted = sparsified(model, Budget(sparsity=max(min(sparsity, 0.99 - floor), 0.01)), seed)
    path = tmp_path_factory.mktemp("file") / "model.bitmask.safetensors"
    files.save_bitmask(path, state, said)
    assert path.stat().st_size == predicted
    found = files.load(path)
    assert set(found) == set(model.state_dict())
    assert {name: bits(value) for name, value in found.items() if name in state} == {
        name: bits(value) for name, value in state.items()
    }
    assert all(found[name].dtype == value.dtype and found[name].shape == value.shape for name, value in state.items())
    assert bits(found["tied.weight"]) == bits(state["two.weight"])
    Odd(sizes).to(dtype).load_state_dict(found)


@pytest.mark.parametrize("share", ["40%", "55%", "70%", "90%", "99%"])
def test_a_budget_in_bytes_is_that_of_the_file_on_disk(tmp_path: Path, share: str):
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 3))
    result = prune(model, None, f"bytes={share}", method="erk", repair="none", save_to=tmp_path / "run")
    [row] = result.report()["budget"]
    assert (tmp_path / "run" / "model.bitmask.safetensors").stat().st_size == row["achieved"] <= row["limit"]
    assert row["achieved"] >= 0.999 * row["limit"]


def as_described(stored: np.ndarray, total: int, kept: int) -> list[bool]:
    """A mask read bit by bit, as files.py describes it; l by trying all."""
    bits = [bool(stored[i // 8] >> (7 - i % 8) & 1) for i in range(8 * stored.size)]
    if stored.size == -(-total // 8):
        return bits[:total]
    low = min(range(total.bit_length()), key=lambda low: kept * (low + 1) + (total - 1) // 2**low + 1)
    mask, above, place = [False] * total, 0, kept * low
    for i in range(kept):
        while not bits[place]:
            above, place = above + 1, place + 1
        place += 1
        mask[above * 2**low + sum(bits[i * low + j] << (low - 1 - j) for j in range(low))] = True
    return mask


@pytest.mark.parametrize("kept", [0, 1, 2, 11, 60, 249, 250, 400, 999, 1000])
def test_every_mask_comes_back_whatever_way_is_the_smallest(kept: int, tmp_path: Path):
    value = torch.where(select(torch.rand(1000), kept), torch.rand(1000) + 1, 0.0)
    said = {"aliases": {}, "layers": {"w": [[1000], None]}, "asked": {}, "limits": {}}
    files.save_bitmask(tmp_path / "w", {"w": value}, said)
    assert torch.equal(files.load(tmp_path / "w")["w"], value)
    stored = safetensors.torch.load_file(tmp_path / "w")
    if "w.mask" in stored:
        assert as_described(stored["w.mask"].numpy(), 1000, kept) == (value != 0).tolist()
        assert stored["w.mask"].numel() == -(-int(mask_bits(1000, kept)) // 8)


def test_a_file_of_nothing_is_no_bomb(tmp_path: Path):
    tensors = {"w.mask": torch.zeros(1, dtype=torch.uint8), "w.values": torch.zeros(0)}
    files.save_tensors(tmp_path / "w", tensors, "bitmask", {"layers": {"w": [[10**9], None]}, "aliases": {}})
    with pytest.raises(UsageError, match="cannot hold 1,000,000,000 weights"):
        files.load(tmp_path / "w")
    rows = {"w.crow": torch.zeros(2).int(), "w.col": torch.zeros(0).int(), "w.values": torch.zeros(0)}
    files.save_tensors(tmp_path / "w", rows, "csr", {"layers": {"w": [[1, 2**28], 1]}, "aliases": {}})
    with pytest.raises(UsageError, match="cannot hold 268,435,456 weights"):
        files.load(tmp_path / "w")
    every = {
        f"{i}.{part}": value
        for i in range(100)
        for part, value in (("mask", torch.zeros(1).byte()), ("values", torch.zeros(0)))
    }
    files.save_tensors(tmp_path / "w", every, "bitmask", {"layers": {str(i): [[2**23], None] for i in range(100)}})
    with pytest.raises(UsageError, match="cannot hold 838,860,800 weights"):  # together
        files.load(tmp_path / "w")
    for nested in ("[" * 200_000, "[1, 2]"):
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "n", {"allot": nested})
        with pytest.raises(UsageError, match="is not a whole safetensors file"):
            files.load(tmp_path / "n")


def test_both_files_are_plain_safetensors_with_plain_keys(tmp_path: Path):
    result = prune(CASES["with batch norm"].make(), None, "sparsity=0.9", repair="none", save_to=tmp_path / "run")
    plain = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert set(plain) == set(result.state_dict())
    stored = safetensors.torch.load_file(tmp_path / "run" / "model.bitmask.safetensors")
    mask = torch.tensor(as_described(stored["full.weight.mask"].numpy(), 216, len(stored["full.weight.values"])))
    assert torch.equal(mask, plain["full.weight"].flatten() != 0)
    assert torch.equal(stored["full.weight.values"], plain["full.weight"].flatten()[mask])
    assert "full.weight" not in stored


def test_a_layer_that_is_smaller_dense_is_stored_dense(tmp_path: Path):
    result = prune(nn.Linear(20, 20), None, "sparsity=0.02", repair="none", save_to=tmp_path / "run")
    with safetensors.safe_open(tmp_path / "run" / "model.bitmask.safetensors", "pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
    assert torch.equal(
        allot.load(tmp_path / "run" / "model.bitmask.safetensors")["weight"], result.state_dict()["weight"]
    )


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path):
    case = CASES["attention"]
    for name in ("a", "b"):
        prune(case.make(), case.inputs(), "sparsity=0.6", save_to=tmp_path / name)
    for name in (
        "model.safetensors",
        "model.bitmask.safetensors",
        "allocation.json",
        "steps.jsonl",
    ):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")


# what is tied


def test_views_of_one_memory_are_tensors_of_their_own(tmp_path: Path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.other = nn.Linear(6, 6)
            both, buffer = torch.randn(12, 6), torch.randn(6, 6)
            # one memory, two parameters: that their entries overlap is refused
            self.linear.weight, self.other.weight = nn.Parameter(both[:6]), nn.Parameter(both[6:])
            self.register_buffer("plain", buffer)
            self.register_buffer("transposed", buffer.t())
            self.register_buffer("row", buffer[0])
            self.register_buffer("flat", buffer.view(-1)[:6])

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.linear(x) @ self.transposed + self.row + self.flat)

    model = Views()
    before = {name: bits(value) for name, value in model.state_dict().items()}
    inputs = torch.randn(12, 6)
    result = prune(model, inputs, "sparsity=0.5", save_to=tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / files.BITMASK):
        state = allot.load(path)
        assert {name: bits(value) for name, value in state.items()} == {
            name: bits(value) for name, value in result.model().state_dict().items()
        }
    assert state["linear.weight"].count_nonzero() + state["other.weight"].count_nonzero() <= 36
    assert bits(state["transposed"]) == before["transposed"]
    assert {name: bits(value) for name, value in model.state_dict().items()} == before


def test_tied_names_are_stored_once_and_loaded_under_both(tmp_path: Path):
    result = prune(CASES["tied weights"].make(), None, "sparsity=0.5", repair="none", save_to=tmp_path / "run")
    for name in (files.PLAIN, files.BITMASK):
        with safetensors.safe_open(tmp_path / "run" / name, "pt") as file:
            assert not [key for key in file.keys() if key.startswith("2.weight")]  # noqa: SIM118
        state = allot.load(tmp_path / "run" / name)
        assert set(state) == set(result.model().state_dict())
        assert torch.equal(state["2.weight"], state["0.weight"])
    model = result.model()
    assert model[2].weight is model[0].weight


def test_a_buffer_that_is_registered_twice_is_stored_once(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.append(model[1])
    result = prune(model.eval(), torch.randn(8, 4), "sparsity=0.5", save_to=tmp_path / "run")
    state = allot.load(tmp_path / "run")
    assert set(state) == set(model.state_dict())
    assert torch.equal(state["2.running_mean"], state["1.running_mean"])
    assert torch.equal(state["1.running_mean"], result.model()[1].running_mean)


def test_extra_state_that_is_no_tensor_stays_with_the_model(tmp_path: Path):
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"calls": 3}

    model = Extra(4, 4)
    result = prune(model, torch.randn(5, 4), "sparsity=0.5", save_to=tmp_path / "run")
    model.load_state_dict(result.state_dict())
    assert set(allot.load(tmp_path / "run")) == {"weight", "bias"}


# damage


def test_any_safetensors_file_can_be_loaded(tmp_path: Path):
    tensors = {"a.mask": torch.ones(3), "a.values": torch.zeros(2, dtype=torch.int8), "b": torch.ones(1, 1)}
    safetensors.torch.save_file(tensors, tmp_path / "foreign.safetensors", {"made": "elsewhere"})
    found = allot.load(tmp_path / "foreign.safetensors")
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES["tied weights"]
    path = tmp_path_factory.mktemp("run")
    prune(case.make(), case.inputs(), "sparsity=0.6", save_to=path)
    return path


@pytest.mark.parametrize("name", [files.PLAIN, files.BITMASK])
def test_a_truncated_file_is_one_line_whatever_its_length(tmp_path: Path, run: Path, name: str):
    whole = (run / name).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(whole), 97), len(whole) - 1]:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UsageError, match=f"{name} is not a whole safetensors file"):
            allot.load(tmp_path / name)


@pytest.mark.parametrize("name", [files.PLAIN, files.BITMASK])
def test_a_file_with_a_flipped_bit_loads_or_is_one_clear_error(tmp_path: Path, run: Path, name: str):
    whole = (run / name).read_bytes()
    generator = random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    said = []
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            allot.load(tmp_path / name)
        except UsageError as error:
            said.append(str(error))
    assert len(said) > 100 and all(str(tmp_path / name) in message for message in said)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["aliases"].update({"x": "not there"}),
        lambda about: about["layers"].update({"0.weight": [[5, 5], 1]}),
        lambda about: about["layers"].update({"0.weight": None}),
        lambda about: about["layers"].update({"0.weight": [["a"], 1]}),
        lambda about: about.update(layers=3),
        lambda about: about.update(aliases=[1]),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_a_clear_error(tmp_path: Path, run: Path, change: Any):
    with safetensors.safe_open(run / files.BITMASK, "pt") as file:
        about = json.loads(file.metadata()["allot"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(about)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"allot": json.dumps(about)})
    with pytest.raises(UsageError, match=r"x\.safetensors is damaged"):
        allot.load(tmp_path / "x.safetensors")


def test_what_is_not_there_is_said_to_be_so(tmp_path: Path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            allot.load(path)
