"""The controls of language models against the formulas of their papers, evaluated the slow way."""

from __future__ import annotations

import pytest
import torch
from benchmarks.controls import CONTROLS, Structure, prune_decoder, sparsegpt, sparsity_of, wanda
from torch import Tensor, nn

from allot.errors import UsageError


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, inputs, Gram matrix) with inputs that depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=draw)
    x = torch.randn(4 * columns, columns, generator=draw) @ mixed
    return torch.randn(rows, columns, generator=draw), x, x.T @ x


def naive_sparsegpt(weight: Tensor, gram: Tensor, structure: Structure, block: int, damping: float) -> Tensor:
    """Column by column, with the inverse of every submatrix computed afresh, in float64."""
    W = weight.double().clone()
    H = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    rows, columns = W.shape
    mask = torch.ones(rows, columns, dtype=torch.bool)

    def saliency(r: int, j: int) -> float:
        return float(W[r, j] ** 2 / torch.linalg.inv(H[j:, j:])[0, 0])

    for j in range(columns):
        if isinstance(structure, tuple):
            n, m = structure
            if j % m == 0:
                for r in range(rows):
                    worst = sorted(range(j, j + m), key=lambda c: saliency(r, c))[: m - n]
                    mask[r, worst] = False
        elif j % block == 0:
            entries = [(r, c) for r in range(rows) for c in range(j, min(j + block, columns))]
            gone = len(entries) - round((1 - structure) * len(entries))
            for r, c in sorted(entries, key=lambda entry: saliency(*entry))[:gone]:
                mask[r, c] = False
        inverse = torch.linalg.inv(H[j:, j:])
        for r in range(rows):
            if not mask[r, j]:
                W[r, j:] -= W[r, j] / inverse[0, 0] * inverse[0].clone()
                W[r, j] = 0
    return W


@pytest.mark.parametrize("structure", [0.5, 0.7, (2, 4), (1, 4)])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(structure: Structure):
    for seed in range(3):
        weight, _, gram = layer(3, 12, seed)
        found = sparsegpt(weight, gram, structure, block=4)
        torch.testing.assert_close(
            found.double(), naive_sparsegpt(weight, gram, structure, 4, 0.01), rtol=2e-3, atol=2e-4
        )
        if isinstance(structure, tuple):
            assert (found.unflatten(1, (-1, 4)).count_nonzero(-1) == structure[0]).all()


def test_the_last_pruned_column_is_a_least_squares_fit_of_those_that_follow():
    weight, x, gram = layer(1, 6)
    one = weight.clone()
    one[0, 0] = 1e-3  # the first column goes, and nothing else
    found = sparsegpt(one, gram, 1 / 6, block=6, damping=0.0)
    best = torch.linalg.lstsq(x[:, 1:], x @ one[0]).solution
    assert found[0, 0] == 0
    torch.testing.assert_close(found[0, 1:], best, rtol=1e-3, atol=1e-4)


def test_wanda_keeps_the_highest_products_of_each_row():
    weight, x, gram = layer(5, 8)
    norms = [float(x[:, j].norm()) for j in range(8)]
    half, pairs = wanda(weight, gram, 0.6), wanda(weight, gram, (2, 4))
    for r in range(5):
        order = sorted(range(8), key=lambda j: -abs(float(weight[r, j])) * norms[j])
        kept = set(order[: 8 - 4])  # floor(0.6 * 8) = 4 go
        assert {j for j in range(8) if half[r, j] != 0} == kept
        assert all(half[r, j] == weight[r, j] for j in kept)
        for first in (0, 4):
            best = [j for j in order if first <= j < first + 4][:2]
            assert [j for j in range(first, first + 4) if pairs[r, j] != 0] == sorted(best)


def test_inputs_that_are_always_zero_lose_their_weights_first():
    weight, x, _ = layer(3, 8)
    x[:, 2] = 0
    found = sparsegpt(weight, x.T @ x, 0.25, block=8)
    assert found.isfinite().all() and (found[:, 2] == 0).all()
    assert (wanda(weight, x.T @ x, 0.25)[:, 2] == 0).all()


def test_groups_that_do_not_divide_the_columns_are_an_error():
    weight, _, gram = layer(2, 6)
    with pytest.raises(UsageError, match="6 columns in blocks of 128 do not divide by 4"):
        sparsegpt(weight, gram, (2, 4))


class Block(nn.Module):
    """Two linear layers that read the same tensor, and one that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden: Tensor, scale: Tensor, *, shift: float) -> tuple[Tensor]:
        return (hidden + self.down(torch.tanh(self.gate(hidden)) * self.up(hidden) * scale) + shift,)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            (hidden,) = block(hidden, torch.tensor(0.5), shift=0.25)
        return self.head(hidden)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_block_sees_what_the_pruned_blocks_before_it_give(name: str):
    torch.manual_seed(0)
    model, slow = Decoder(), Decoder()
    slow.load_state_dict(model.state_dict())
    ids = torch.randint(0, 20, (6, 5))
    prune_decoder(model, model.blocks, ids, 0.5, CONTROLS[name], batch_size=4)
    for block in slow.blocks:  # the whole model runs for every layer of a block before the block is pruned
        seen: dict[str, Tensor] = {}
        for part in ("gate", "up", "down"):
            handle = getattr(block, part).register_forward_pre_hook(
                lambda module, args, part=part: seen.__setitem__(part, args[0].flatten(0, 1))
            )
            slow(ids)
            handle.remove()
        with torch.no_grad():
            for part, x in seen.items():
                weight = getattr(block, part).weight
                weight.copy_(CONTROLS[name](weight, x.T @ x, 0.5))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[key], rtol=1e-4, atol=1e-5)
    pruned = {key: value for key, value in model.state_dict().items() if "blocks" in key and "weight" in key}
    assert sparsity_of(pruned) == 0.5 and model.head.weight.all()
