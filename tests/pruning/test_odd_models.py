"""Models with parts that cannot be pruned, and samples of the wrong structure: a reason, and what to write instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import allot
from allot.run.calibration import Calibration

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
CHANNELS: dict[str, Any] = {"method": "dsa", "options": {"dsa": {"steps": 2}, "distill": {"steps": 2}}}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Scaled(nn.Module):
    """A first layer in 8 bits, as weight-only quantisation leaves it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(16, 16).clamp(-1, 1).to(dtype), requires_grad=False)
        self.rest = Small()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x @ self.packed.to(x.dtype))


EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("ways", [{}, {"repair": "distill", "options": {"distill": {"steps": 2}}}, {"repair": "admm"}])
def test_weights_of_8_bits_stay_as_they_are_with_the_reason(dtype: torch.dtype, ways: dict[str, Any], tmp_path):
    model = Scaled(dtype).eval()
    result = allot.prune(model, X, 0.5, save_to=tmp_path / "x", **ways)
    assert str(dtype)[6:] in result.problem.scope.skipped["packed"]
    kept = allot.load(tmp_path / "x")["packed"]
    assert kept.dtype == dtype and torch.equal(kept.view(torch.uint8), model.packed.view(torch.uint8))
    assert allot.evaluate(result.model(), [(row, 0) for row in X]).samples == 48


def test_weights_of_8_bits_do_not_hold_up_channels():
    model = Small().eval()
    model.extra = nn.Linear(4, 4, bias=False)
    model.extra.weight = nn.Parameter(model.extra.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert "extra.weight" in allot.prune(model, X, "macs=60%", **CHANNELS).problem.scope.skipped


def test_packed_weights_of_quantised_modules_are_listed():
    model = Small().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it will move
        model.b = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.b), {nn.Linear})[0]
        result = allot.prune(model, X, 0.5)
    assert "quantised" in result.problem.scope.skipped["b.weight"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_a_scripted_part_is_named_where_channels_go_and_left_dense_where_weights_go(part: str):
    model = Small().eval()
    setattr(model, part, torch.jit.script(getattr(model, part)))
    with pytest.raises(allot.UsageError, match=rf"{part} is a scripted module .*--pattern unstructured"):
        allot.prune(model, X, "macs=60%", **CHANNELS)
    assert f"{part}.weight" in allot.prune(model, X, 0.5).problem.scope.skipped


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_layers_without_an_element_do_not_hold_up_channels(shape: tuple[int, int]):
    model = Small().eval()
    model.none = nn.Linear(*shape)
    result = allot.prune(model, X, "macs=60%", **CHANNELS)
    assert result.problem.scope.skipped["none.weight"] == "empty"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))), "parametrized: remove"),
        (nn.Sequential(nn.LayerNorm(16)), r"0.weight: normalisation \(LayerNorm\)"),
        (nn.ReLU(), "it has no parameters"),
    ],
)
def test_the_reasons_are_given_where_nothing_is_in_scope(model: nn.Module, says: str):
    for error in (allot.UsageError, allot.BudgetError):
        with pytest.raises(error, match=f"nothing in scope: .*{says}") as caught:
            allot.prune(model.eval(), None, 0.5, repair="none")
        assert caught.value.exit_code == 3 and "include" not in str(caught.value)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(self.embed(input_ids))


T = torch.rand(48, 1)
IDS = torch.randint(0, 50, (48, 6))
ROWS = [{"input_ids": row.tolist(), "attention_mask": [1] * 6} for row in IDS]


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        (Two(), TensorDataset(X, T), r"takes 2 inputs \(x, t\) and got 1.* as \(\(x, t\), label\)"),
        (Two(), DataLoader(TensorDataset(X, T), 8), r"a dict \{'x': \.\.\., 't': \.\.\.\}"),
        (Two(), [{"x": row} for row in X], "needs t too"),
        (
            Small(),
            DataLoader(TensorDataset(X, T), 8, collate_fn=lambda b: tuple(zip(*b, strict=True))),
            r"torch\.stack",
        ),
        (Small(), DataLoader(TensorDataset(X, T), 8, collate_fn=lambda b: b), r"differ in length .* torch\.stack"),
        (Words(), [{"input_ids": row, "idx": i} for i, row in enumerate(IDS)], "does not take idx: leave it out"),
        (Words(), [{"input_ids": row, "text": "a"} for row in IDS], "does not take text"),
        (Words(), ROWS, r"input_ids is a list .*torch\.tensor\(sample\['input_ids'\]\)"),
        (Words(), DataLoader(ROWS, 8), r"'input_ids' of a batch is a list: .*with_format\('torch'\)"),
        (Words(), {"input_ids": IDS.tolist()}, "give the rows"),
    ],
)
def test_samples_of_the_wrong_structure_say_what_to_write(model: nn.Module, data: Any, says: str):
    with pytest.raises(allot.UsageError, match=says):
        allot.prune(model.eval(), data, 0.5, score="wanda")


@pytest.mark.parametrize(
    "data", [[((x, t), 0) for x, t in zip(X, T, strict=True)], [{"x": x, "t": t} for x, t in zip(X, T, strict=True)]]
)
def test_what_the_errors_say_to_write_is_taken(data: Any):
    rows = [{"input_ids": torch.tensor(row["input_ids"])} for row in ROWS]
    for model, samples in ((Two(), data), (Words(), rows)):
        report = allot.prune(model.eval(), samples, 0.5, score="wanda", repair="none").report()
        assert 2 * report["kept"] == report["total"]


@pytest.mark.parametrize(
    ("more", "says"), [({"samples": 1}, "There is one sample"), ({"batch_size": 1}, "larger batch_size")]
)
@pytest.mark.parametrize("repair", ["bn", "distill"])
def test_batch_norm_is_given_what_it_lacks(repair: str, more: dict[str, int], says: str):
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).eval()
    options = {"distill": {"steps": 2}} if repair == "distill" else {}
    with pytest.raises(allot.UsageError, match=says) as caught:
        allot.prune(model, X, 0.5, repair=repair, batch_norm="batch", options=options, **more)
    assert ("larger" in str(caught.value)) == ("batch_size" in more)


def test_batches_of_tensors_and_arrays_are_taken_as_before():
    for batches in ([X[:24], X[24:]], [(X[:24], T[:24])], [{"x": X[:24].numpy()}]):
        assert len(Calibration.of(batches, batched=True)) >= 24


class OverEdges(nn.Module):
    """Averages over the neighbours in a graph, whose edges are a sparse buffer."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sparse.mm(self.edges, self.first(x).T).T)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_model_with_sparse_buffers_is_pruned_and_its_files_say_what_they_lack(layout, tmp_path, caplog):
    edges = torch.eye(8).to_sparse_coo() if layout == "coo" else torch.eye(8).to_sparse_csr()
    model, x = OverEdges(edges).eval(), torch.randn(40, 6)
    result = allot.prune(model, x, "sparsity=0.5", method="erk", save_to=tmp_path / "run")
    assert result.report()["kept"] == 36 and result.verify()["passed"]
    assert "not saved, because no dense tensor: edges" in caplog.text
    again = OverEdges(edges).eval()
    again.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=False)
    sparse = {**result.state_dict(), "edges": edges}
    assert torch.equal(again(x), torch.func.functional_call(model, sparse, x))
