"""Recurrent layers: products are the maps of inputs and hidden states, other tensors and masks reach the kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from allot.network.applied_masks import Masking
from allot.network.attach import attach, fold
from allot.network.call import call, write_into
from allot.network.hooks import biases_of, watched_layers, watched_outputs
from allot.network.input_squares import Squares, input_norms, watched_squares
from allot.network.layers import Scope
from allot.network.macs import measured
from allot.network.products import Product, watched_products

T, B, N, H = 4, 3, 5, 6
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(N, H),
    "lstm without bias": lambda: nn.LSTM(N, H, bias=False),
    "lstm, two layers, both ways": lambda: nn.LSTM(N, H, 2, bidirectional=True, dropout=0.5),
    "lstm, batch first": lambda: nn.LSTM(N, H, batch_first=True),
    "lstm of double precision": lambda: nn.LSTM(N, H).double(),
    "gru": lambda: nn.GRU(N, H),
    "gru, two layers, both ways": lambda: nn.GRU(N, H, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(N, H),
    "rnn of relu": lambda: nn.RNN(N, H, nonlinearity="relu", bias=False),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm cell": lambda: nn.LSTMCell(N, H),
    "gru cell": lambda: nn.GRUCell(N, H),
    "rnn cell": lambda: nn.RNNCell(N, H, bias=False),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs_of(model: Any) -> Tensor:
    return torch.randn(B, T, N) if model.batch_first else torch.randn(T, B, N).to(model.weight_ih_l0)


def columns_of(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Layer -> all columns that its whole weight is multiplied with, sorted."""
    seen: dict[str, list[Tensor]] = {}

    def visit(product: Product) -> None:
        assert product.rows == slice(0, product.layer.rows)
        assert product.groups == 1
        seen.setdefault(product.layer.name, []).extend(part[0] for part in product.columns())

    with watched_products(model, Scope.of(model), visit):
        call(model, {}, inputs)
    return {name: rows_sorted(torch.cat(parts)) for name, parts in seen.items()}


def rows_sorted(rows: Tensor) -> Tensor:
    return torch.stack(sorted(rows.double(), key=lambda row: row.tolist()))


def by_hand(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Inputs and hidden states of every weight, step after step, by a cell of the same kind."""
    make = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}[type(model).__name__]
    options = {"nonlinearity": model.nonlinearity} if make is nn.RNNCell else {}
    seen = {}
    for number in range(model.num_layers):
        outputs = []
        for suffix in ("", "_reverse") if model.bidirectional else ("",):
            cell = make(x.shape[-1], H, bias=model.bias, dtype=x.dtype, **options)
            for part in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if model.bias else ())):
                setattr(cell, part, getattr(model, f"{part}_l{number}{suffix}"))
            state: Any = None
            before, after = [], []
            for t in range(T)[:: -1 if suffix else 1]:
                hidden = torch.zeros(B, H).to(x) if state is None else state[0] if make is nn.LSTMCell else state
                before.append(hidden)
                state = cell(x[t], state)
                after.append(state[0] if make is nn.LSTMCell else state)
            seen[f"weight_ih_l{number}{suffix}"] = x.flatten(0, 1)
            seen[f"weight_hh_l{number}{suffix}"] = torch.cat(before)
            outputs.append(torch.stack(after[:: -1 if suffix else 1]))
        x = torch.cat(outputs, -1)
    return {name: rows_sorted(value.detach()) for name, value in seen.items()}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("inference", [False, True])
def test_products_are_those_of_every_input_and_every_hidden_state(name: str, inference: bool) -> None:
    model: Any = LAYERS[name]().eval()
    x = inputs_of(model)
    with torch.inference_mode(inference):
        seen = columns_of(model, x)
    expected = by_hand(model, x.transpose(0, 1) if model.batch_first else x)
    assert seen.keys() == expected.keys() == {layer.name for layer in Scope.of(model)}
    for layer in expected:
        torch.testing.assert_close(seen[layer], expected[layer], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_macs_are_positions_times_the_size_of_the_weights(name: str) -> None:
    model: Any = (LAYERS.get(name) or CELLS[name])()
    x = inputs_of(model) if name in LAYERS else torch.randn(B, N)
    scope = measured(Scope.of(model), model, lambda: model(x))
    steps = T if name in LAYERS else 1
    assert {layer.name: layer.macs for layer in scope} == {layer.name: steps * B * layer.total for layer in scope}
    if name == "lstm":
        assert sum(layer.macs or 0 for layer in scope) == T * B * (4 * H * (N + H))


@pytest.mark.parametrize("name", CELLS)
def test_products_of_a_cell_are_its_input_and_its_state(name: str) -> None:
    model, x, h = CELLS[name](), torch.randn(B, N), torch.randn(B, H)
    seen = columns_of(model, (x, (h, h) if name == "lstm cell" else h))
    assert torch.equal(seen["weight_ih"], rows_sorted(x))
    assert torch.equal(seen["weight_hh"], rows_sorted(h))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_half_precision_is_seen_as_well(make: Any, dtype: torch.dtype) -> None:
    model = make(N, H).to(dtype)
    seen = columns_of(model, torch.randn(T, B, N).to(dtype))
    assert {name: len(rows) for name, rows in seen.items()} == {"weight_ih_l0": T * B, "weight_hh_l0": T * B}


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_have_a_product_for_every_step_that_a_sample_has(make: Any) -> None:
    model, lengths = make(N, H), [4, 2, 1]
    x = torch.randn(T, B, N)
    net = Packing(model, lengths)
    scope = measured(Scope.of(net), net, lambda: net(x))
    assert [layer.macs for layer in scope] == [sum(lengths) * layer.total for layer in scope]
    inputs = columns_of(net, x)["model.weight_ih_l0"]
    expected = torch.cat([x[:n, k] for k, n in enumerate(lengths)])
    assert torch.equal(inputs, rows_sorted(expected))


class Packing(nn.Module):
    def __init__(self, model: nn.Module, lengths: list[int]) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(pack_padded_sequence(x, self.lengths))[0].data
        return out


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_the_projection_of_an_lstm_is_seen() -> None:
    model = nn.LSTM(N, H, proj_size=2)
    x = torch.randn(T, B, N)
    scope = measured(Scope.of(model), model, lambda: model(x))
    sizes = {"weight_ih_l0": 24 * N, "weight_hh_l0": 24 * 2, "weight_hr_l0": 2 * H}
    assert {layer.name: layer.macs for layer in scope} == {name: T * B * size for name, size in sizes.items()}


MAKES = [lambda: nn.LSTM(N, H, 2, bidirectional=True), lambda: nn.GRU(N, H), lambda: nn.RNN(N, H)]


@pytest.mark.parametrize("make", MAKES)
def test_other_tensors_masks_and_written_values_reach_the_kernels(make: Any) -> None:
    model, x = make(), torch.randn(T, B, N)
    masks = {layer.name: torch.rand(layer.shape) > 0.5 for layer in Scope.of(model)}
    values = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    masked = {name: value * masks[name] if name in masks else value for name, value in values.items()}
    expected_model = make()
    expected_model.load_state_dict(masked)
    expected, before = expected_model(x)[0], model(x)[0]
    for training in (None, lambda module: True):
        assert torch.equal(call(model, masked, x, training=training)[0], expected)
        assert torch.equal(model(x)[0], before)
    masking = Masking({name: (values[name].clone().requires_grad_(), mask) for name, mask in masks.items()})
    output = call(model, {**values, **masking.placed}, x, masking=masking)[0]
    assert torch.equal(output, expected)
    output.sum().backward()
    assert not masking.missed
    attached = copy.deepcopy(model)
    write_into(attached, values)
    assert torch.equal(attach(attached, masks)(x)[0], expected)
    assert torch.equal(fold(attached)(x)[0], expected)
    assert attached.state_dict().keys() == model.state_dict().keys()


def test_recurrent_layers_are_not_visited_module_by_module() -> None:
    model = nn.Sequential(nn.LSTM(N, H), First(), nn.Linear(H, 2))
    scope, visited = Scope.of(model), []
    assert list(biases_of(model, scope)) == ["2.weight"]
    with (
        watched_outputs(model, scope, lambda layer, moments: visited.append(layer.name)),
        watched_layers(model, scope, lambda layer, apply, output: visited.append(layer.name)),
    ):
        model(torch.randn(T, B, N))
    assert visited == ["2.weight", "2.weight"]


class First(nn.Module):
    def forward(self, outputs: tuple[Tensor, Any]) -> Tensor:
        return outputs[0]


def test_input_squares_are_sums_over_samples_and_steps() -> None:
    model, x = nn.GRU(N, H), torch.randn(T, B, N)
    scope = Scope.of(model)
    sums: Squares = {}
    with watched_squares(model, scope, sums):
        model(x)
        model(x)
    hidden = torch.cat([torch.zeros(1, B, H), model(x)[0][:-1].detach()])
    for name, values in (("weight_ih_l0", x), ("weight_hh_l0", hidden)):
        expected = 2 * values.flatten(0, 1).square().sum(0).expand(3 * H, -1)
        torch.testing.assert_close(input_norms(scope[name], sums[name]).square().float(), expected)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_kernels_of_cudnn_which_hide_their_products_are_off_for_recurrent_layers_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cudnn.is_available", lambda: True)
    model, enabled = nn.Sequential(make(N, H), First(), nn.Linear(H, 2)), {}
    before = torch.backends.cudnn.enabled

    def visit(product: Product) -> None:
        enabled[product.layer.name] = torch.backends.cudnn.enabled

    with watched_products(model, Scope.of(model), visit):
        model(torch.randn(T, B, N))
    assert enabled == {"0.weight_ih_l0": False, "0.weight_hh_l0": False, "2.weight": before}
    assert torch.backends.cudnn.enabled == before
