"""Wanda and SparseGPT as their papers have them, to compare with: one weight at a time, and a decoder block by block.

    W [R, K] weight, x_t inputs of its layer over all tokens;  G = sum_t x_t x_t^T  [K, K]

wanda        S_rj = |W_rj| sqrt(G_jj): each output row loses the floor(sparsity K) entries of the lowest S, or m - n of
             every m that follow each other. The others stay as they are.
sparsegpt    H = G + damping mean(diag G) I. Columns are taken in order, in blocks of 128. At the start of a block its
             mask is chosen over all rows: the highest W_rj^2 / [H_F^-1]_jj stay, F = {j, j + 1, ..} the columns from j
             on; of n:m at the start of every m columns, by row. Then, column by column, where W_rj is pruned, W_rF
             loses W_rj / [H_F^-1]_jj [H_F^-1]_jF: all columns that follow make up for it. With H^-1 = U^T U, U upper
             triangular, [H_F^-1]_jF = U_jj U_jF, so that one factor serves every F.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024 (arXiv:2306.11695), and Frantar
and Alistarh, SparseGPT, ICML 2023 (arXiv:2301.00774). In both, a block's inputs are those that the already pruned
blocks give it; all linear layers of a block are pruned with what they see in the dense block, which then runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.run.patterns import select

Structure = float | tuple[int, int]  # sparsity, or (n, m)
Control = Callable[[Tensor, Tensor, Structure], Tensor]  # (weight, Gram matrix, structure) -> new weight


def magnitude(weight: Tensor, gram: Tensor, structure: Structure) -> Tensor:
    """The highest |W| of the whole layer stay, or of every m in a row."""
    if isinstance(structure, tuple):
        return weight * best_of_groups(weight.abs(), *structure)
    return weight * select(weight.abs(), round((1 - structure) * weight.numel()))


def wanda(weight: Tensor, gram: Tensor, structure: Structure) -> Tensor:
    """The weights that remain, `[R, K]`.

    >>> wanda(torch.tensor([[3.0, -2.0], [1.0, 1.0]]), torch.diag(torch.tensor([1.0, 4.0])), 0.5).tolist()
    [[0.0, -2.0], [0.0, 1.0]]
    """
    score = weight.abs() * gram.diagonal().sqrt()
    if isinstance(structure, tuple):
        return weight * best_of_groups(score, *structure)
    columns = weight.shape[1]
    return weight * best_of_groups(score, columns - int(columns * structure), columns)


def sparsegpt(weight: Tensor, gram: Tensor, structure: Structure, *, block: int = 128, damping: float = 0.01) -> Tensor:
    """The remaining weights, changed to make up for those that went, `[R, K]`.

    Raises:
        UsageError: the groups of n:m do not divide the columns or the block.
    """
    W, H = weight.clone().float(), gram.clone().float()
    rows, columns = W.shape
    if isinstance(structure, tuple) and (columns % structure[1] or block % structure[1]):
        raise UsageError(f"{columns} columns in blocks of {block} do not divide by {structure[1]}.")
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        diagonal = U.diagonal()[start:stop]
        if not isinstance(structure, tuple):
            mask = select((W[:, start:stop] / diagonal).square(), round((1 - structure) * rows * (stop - start)))
        errors = torch.zeros(rows, stop - start)
        for j in range(start, stop):
            if isinstance(structure, tuple) and (j - start) % structure[1] == 0:
                group = slice(j, j + structure[1])
                mask = torch.zeros(rows, stop - start, dtype=torch.bool) if j == start else mask
                score = (W[:, group] / U.diagonal()[group]).square()
                mask[:, j - start : j - start + structure[1]] = best_of_groups(score, *structure)
            error = W[:, j] * ~mask[:, j - start] / U[j, j]
            W[:, j:stop] -= error[:, None] * U[j, j:stop]
            W[:, j] *= mask[:, j - start]  # exactly zero, whatever the rounding
            errors[:, j - start] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W.to(weight.dtype)


CONTROLS: dict[str, Control] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}


def best_of_groups(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the `n` highest of every `m` entries of a row; equal scores go to the lower column."""
    groups = score.unflatten(1, (-1, m))
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


# A decoder, block by block


@torch.no_grad()
def prune_decoder(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    inputs: Tensor,
    structure: Structure,
    control: Control,
    *,
    batch_size: int = 4,
) -> None:
    """Prunes every `nn.Linear` in the blocks in place, each with the inputs that the pruned blocks before give it.

    Args:
        model: takes a batch of `inputs` and calls the blocks one after another, the hidden states first.
    """
    if control is magnitude:  # needs no inputs
        for layer in (layer for block in blocks for _, layer in _linears(block)):
            layer.weight.copy_(magnitude(layer.weight, layer.weight.new_empty(0), structure))
        return
    batches = list(inputs.split(batch_size))
    calls = [_first_call(model, blocks[0], batch) for batch in batches]
    hidden = [args[0] for args, _ in calls]
    for block in blocks:
        grams: dict[str, Tensor] = {}
        with _watched(block, grams):
            for i in range(len(batches)):
                _output(block, hidden[i], calls[i])
        for name, layer in _linears(block):
            layer.weight.copy_(control(layer.weight, grams[name], structure))
        hidden = [_output(block, hidden[i], calls[i]) for i in range(len(batches))]


class _Reached(Exception):
    """The first block was reached."""


def _first_call(model: nn.Module, block: nn.Module, batch: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of the first block for this batch."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _output(block: nn.Module, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    output = block(hidden, *args[1:], **kwargs)
    return output if isinstance(output, Tensor) else output[0]


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear))


@contextmanager
def _watched(block: nn.Module, grams: dict[str, Tensor]) -> Iterator[None]:
    """While open, passes through the block add up the Gram matrix of each linear layer's inputs.

    Layers that read the same tensor one after another, as q, k and v do, share one product.
    """
    last: list[Tensor] = []  # the last input, and its Gram matrix

    def add(name: str, x: Tensor) -> None:
        if not last or last[0] is not x:
            rows = x.flatten(0, -2).float()
            last[:] = [x, rows.T @ rows]
        grams[name] = grams[name] + last[1] if name in grams else last[1]

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: add(name, args[0])

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in _linears(block)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """The share of zeros in the weights."""
    return 1 - sum(int(w.count_nonzero()) for w in weights.values()) / sum(w.numel() for w in weights.values())
