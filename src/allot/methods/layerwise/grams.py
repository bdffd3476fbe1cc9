"""Second-order statistics of the inputs of layers, in two nets at once: all that a quadratic layer error needs.

For a layer with weight W [rows, K], and inputs X_s in the sparse net and X_d in the dense one, [K, positions]:

    |W X_s - W_d X_d|^2  =  <W G, W> - 2 <W_d C, W> + |W_d X_d|^2,      G = X_s X_s^T,  C = X_d X_s^T      [K, K]

Both are sums over positions, so that batches and processes add up, and no other part of the data is kept. Layers that
read the same inputs share G and C. A convolution is unrolled: K = C_in/groups * kernel, one G a group; parts of a
weight that read other inputs (the three projections of an attention, experts) have a G each.

G is summed in two halves, over the first and the second half of each batch: how far the halves differ says how far G is
from the one that other samples would give.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from allot.network.call import call
from allot.network.products import Product, watched_products
from allot.processes import all_reduce
from allot.run.problem import Problem
from allot.run.store import State

POSITIONS = 512  # for each column: K weights fitted to 512 K positions have about 1/512 more error than those of all
Part = tuple[str, int, int]  # layer, first row, last row + 1: rows that read the same inputs


@dataclass(frozen=True)
class Site:
    """Layers that are repaired together, because they read the same inputs.

    Attributes:
        layers: by name, in order of execution.
        source: part -> the part that stands for its inputs.
        visits: products of these layers in one pass; 0 where their number depends on the samples.
    """

    layers: tuple[str, ...]
    source: Mapping[Part, Part]
    visits: int

    def to_state(self) -> State:
        """As lists, for a file: `from_state` is the inverse."""
        return {
            "layers": list(self.layers),
            "source": [[*p, *q] for p, q in self.source.items()],
            "visits": self.visits,
        }

    @classmethod
    def from_state(cls, state: State) -> Site:
        """The inverse of `to_state`."""
        source = {tuple(names[:3]): tuple(names[3:]) for names in state["source"]}
        return cls(tuple(state["layers"]), source, state["visits"])


def sites_of(problem: Problem) -> list[Site]:
    """The layers in scope that a pass over the first sample reaches, in order of execution."""
    keys: dict[Part, list[Any]] = {}
    alive: list[Tensor] = []  # keys tell inputs apart as long as these are alive

    def visit(product: Product) -> None:
        alive.append(product.inputs)
        keys.setdefault(part_of(product), []).append(product.key)

    with watched_products(problem.model, problem.scope, visit):
        call(problem.model, {}, problem.inputs().pick([0]))
    sites: dict[Any, dict[Part, Any]] = {}
    for name in dict.fromkeys(layer for layer, _, _ in keys):
        parts = {part: tuple(keys[part]) for part in keys if part[0] == name}
        sites.setdefault(frozenset(parts.values()), {}).update(parts)
    return [_site(problem, parts) for parts in sites.values()]


def part_of(product: Product) -> Part:
    """The part that a product computes."""
    return product.layer.name, product.rows.start, product.rows.stop


def _site(problem: Problem, parts: Mapping[Part, tuple[Any, ...]]) -> Site:
    first: dict[tuple[Any, ...], Part] = {}
    source = {part: first.setdefault(keys, part) for part, keys in parts.items()}
    layers = tuple(dict.fromkeys(name for name, _, _ in parts))
    routed = any(problem.scope[name].kind.startswith("experts") for name in layers)
    return Site(layers, source, 0 if routed else sum(map(len, parts.values())))


@dataclass
class Gram:
    """Sums over the positions of one input.

    Attributes:
        halves: X_s X_s^T of the first and the second half of each batch; `[groups, K, K]`.
        cross: X_d X_s^T of all; the sum of `halves` where both nets have the same inputs.
        positions: number of columns of X_s.
    """

    halves: list[Tensor]
    cross: Tensor
    positions: int = 0

    @classmethod
    def zeros_like(cls, columns: Tensor) -> Gram:
        """Nothing summed yet, for columns `[groups, positions, K]`."""
        groups, _, K = columns.shape
        return cls([columns.new_zeros(groups, K, K), columns.new_zeros(groups, K, K)], columns.new_zeros(groups, K, K))

    @property
    def gram(self) -> Float[Tensor, "groups K K"]:
        return self.halves[0] + self.halves[1]


class Statistics:
    """The Gram of each input of a site, and |W_d X_d|^2 of each part; filled batch by batch.

    Args:
        targets: "dense": the dense net's outputs; "sparse": outputs of the dense weights for the sparse net's inputs.
        inputs: "sparse" or "dense": whose inputs the weights will read.
    """

    def __init__(self, problem: Problem, site: Site, *, inputs: str, targets: str) -> None:
        self.problem, self.site = problem, site
        self.inputs, self.targets = inputs, targets
        self.grams: dict[Part, Gram] = {}
        self.energy: dict[Part, Tensor] = {}
        self.forward = 0

    def collect(self, tensors: Mapping[str, Tensor]) -> None:
        """Push all calibration batches through the net with these tensors, and through the dense one where needed."""
        for k in range(self.problem.inputs().batches):
            batch, samples = self.problem.inputs().batch(k)
            read = self._products(tensors if self.inputs == "sparse" else {}, batch)
            dense = read
            if self.inputs == "sparse" and self.targets == "dense":
                dense = self._products({}, batch)
                self.forward += samples
            self.forward += samples
            for part, products in read.items():
                self._add(part, products, dense.get(part, []), k)
        self._add_up()

    def _products(self, tensors: Mapping[str, Tensor], batch: Any) -> dict[Part, list[Product]]:
        """The products of the site in one pass, which ends with the last of them."""
        problem, site = self.problem, self.site
        products: dict[Part, list[Product]] = {}
        remaining = site.visits

        def visit(product: Product) -> None:
            nonlocal remaining
            products.setdefault(part_of(product), []).append(product)
            remaining -= 1
            if not remaining:
                raise _LastProduct

        layers = [problem.scope[name] for name in site.layers]
        with suppress(_LastProduct), watched_products(problem.model, layers, visit):
            call(problem.model, tensors, batch)
        return products

    def _add(self, part: Part, read: list[Product], dense: list[Product], offset: int) -> None:
        routed = not self.site.visits  # samples may be routed to other experts in the other net
        if routed or [d.inputs.shape for d in dense] != [x.inputs.shape for x in read]:
            dense = read
        for product, partner in zip(read, dense, strict=True):
            K = product.layer.total // product.layer.rows
            every = max(1, product.positions * self.problem.inputs().batches * len(read) // (POSITIONS * K))
            self.energy[part] = self.energy.get(part, 0) + self._energy(partner, every, offset)
            if self.site.source.get(part, part) == part:
                self._add_columns(part, product, partner, every, offset)

    def _energy(self, product: Product, every: int, offset: int) -> Tensor:
        weight = product.layer.matrix(self.problem.dense[product.layer.name])[product.rows]
        outputs = (columns @ weight.unflatten(0, (product.groups, -1)).mT for columns in product.columns(every, offset))
        return sum((output.float().square().sum(dtype=torch.float64) for output in outputs), torch.zeros(()).double())

    def _add_columns(self, part: Part, product: Product, partner: Product, every: int, offset: int) -> None:
        same = partner is product or torch.equal(product.inputs, partner.inputs)
        middle, position = product.positions // every // 2, 0
        others = itertools.repeat(None) if same else partner.columns(every, offset)
        for columns, other in zip(product.columns(every, offset), others, strict=False):
            x = _wide(columns)
            gram = self.grams.get(part) or self.grams.setdefault(part, Gram.zeros_like(x))
            cut = min(max(middle - position, 0), x.shape[1])
            sums = [x[:, :cut].mT @ x[:, :cut], x[:, cut:].mT @ x[:, cut:]]
            for half, addend in zip(gram.halves, sums, strict=True):
                half += addend
            gram.cross += sums[0] + sums[1] if other is None else _wide(other).mT @ x
            gram.positions += x.shape[1]
            position += x.shape[1]

    @property
    def finite(self) -> bool:
        """Whether no sum overflowed."""
        sums = [tensor for gram in self.grams.values() for tensor in (*gram.halves, gram.cross)]
        return all(bool(torch.isfinite(tensor).all()) for tensor in (*sums, *self.energy.values()))

    def _add_up(self) -> None:
        """Sums over all processes, which push a part of each batch each."""
        for part in sorted(self.grams):
            gram = self.grams[part]
            *gram.halves, gram.cross, positions = all_reduce([*gram.halves, gram.cross, torch.tensor(gram.positions)])
            gram.positions = int(positions)
        names = sorted(self.energy)
        self.energy = dict(zip(names, all_reduce([self.energy[name] for name in names]), strict=True))


class _LastProduct(Exception):
    """No product of the site is left in this pass."""


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
