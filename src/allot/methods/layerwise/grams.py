"""Second-order statistics of the inputs of layers, in two nets at once: all that a quadratic layer error needs.

For a layer with weight W [rows, K], and inputs X_s in the sparse net and X_d in the dense one, [K, positions]:

    |W X_s - W_d X_d|^2  =  <W G, W> - 2 <W_d C, W> + |W_d X_d|^2,      G = X_s X_s^T,  C = X_d X_s^T      [K, K]

Both are sums over positions, so that batches and processes add up. Layers that read the same inputs share G and C. A
convolution is unrolled: K = C_in/groups * kernel, one G a group; parts of a weight that read other inputs (the three
projections of an attention, experts) have a G each.

G is summed in two halves, over every other batch, or over the two halves of one batch: how far they differ says how far
G is from the one that other samples would give.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from allot.methods.layerwise.sites import DenseProducts, Part, Site, part_of, push
from allot.network.products import Product
from allot.processes import all_gather_object, all_reduce, rank, world_size
from allot.run.problem import Problem

POSITIONS = 512  # for each column: K weights fitted to 512 K positions have about 1/512 more error than those of all
LARGEST = 1e30  # of a sum


@dataclass
class Gram:
    """Sums over the positions of one input.

    Attributes:
        halves: X_s X_s^T of the two halves; `[groups, K, K]`.
        cross: X_d X_s^T of all; the sum of `halves` where both nets have the same inputs.
        totals: sums of the columns of X_s, of each half; `[groups, K]`.
        dense_total: sum of the columns of X_d.
        positions: number of columns of X_s, of each half.
    """

    halves: list[Tensor]
    cross: Tensor
    totals: list[Tensor]
    dense_total: Tensor
    positions: list[int]

    @classmethod
    def zeros(cls, groups: int, K: int, like: Tensor) -> Gram:
        """Nothing summed yet; device and dtype are those of `like`."""
        squares, columns = ([like.new_zeros(*size) for _ in range(3)] for size in ((groups, K, K), (groups, K)))
        return cls(squares[:2], squares[2], columns[:2], columns[2], [0, 0])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean columns of X_s and X_d; `[groups, K]`."""
        count = max(1, sum(self.positions))
        return (self.totals[0] + self.totals[1]) / count, self.dense_total / count

    def centred(self) -> Gram:
        """The sums for columns minus their mean."""
        mean, dense_mean = self.means
        halves = [
            half - _outer(total, mean) - _outer(mean, total) + count * _outer(mean, mean)
            for half, total, count in zip(self.halves, self.totals, self.positions, strict=True)
        ]
        for half, before in zip(halves, self.halves, strict=True):  # of inputs that are constant, rounding is left
            half.diagonal(dim1=1, dim2=2).add_(before.diagonal(dim1=1, dim2=2), alpha=1e-5)
        return replace(self, halves=halves, cross=self.cross - sum(self.positions) * _outer(dense_mean, mean))

    @property
    def gram(self) -> Float[Tensor, "groups K K"]:
        return self.halves[0] + self.halves[1]


class Statistics:
    """The Gram of each input of a site, and |W_d X_d|^2 of each part; filled batch by batch.

    Args:
        targets: "dense": the dense net's outputs; "sparse": outputs of the dense weights for the sparse net's inputs.
        inputs: "sparse" or "dense": whose inputs the weights will read.
        dense: reads products of the dense net, for other sites as well.
    """

    def __init__(
        self, problem: Problem, site: Site, *, inputs: str, targets: str, dense: DenseProducts | None = None
    ) -> None:
        self.problem, self.site = problem, site
        self.inputs, self.targets = inputs, targets
        self.dense = dense or DenseProducts(problem, [])
        self.grams: dict[Part, Gram] = {}
        self.energy: dict[Part, Tensor] = {}
        self.forward = 0

    def collect(self, tensors: Mapping[str, Tensor]) -> None:
        """Push all calibration batches through the net with these tensors, and through the dense one where needed."""
        for k in range(self.problem.inputs().batches):
            batch, samples = self.problem.inputs().batch(k)
            read = self._products(tensors if self.inputs == "sparse" else {}, batch)
            dense, passes = read, 1
            if self.inputs == "sparse" and self.targets == "dense":
                dense, more = self.dense.of(self.site, k, batch)
                passes += more
            self.forward += passes * samples
            shared = {part: source for part, source in self.site.source.items() if part != source}
            differ = any(_keys(read, part) != _keys(read, source) for part, source in shared.items())
            if shared and any(all_gather_object(differ)):
                self._restart(tensors)  # in this batch they read different inputs
                return
            for part, products in read.items():
                self._add(part, products, dense.get(part, []), k, samples)
        self._add_up()

    def _restart(self, tensors: Mapping[str, Tensor]) -> None:
        """Collect with a Gram for every part."""
        self.site = replace(self.site, source={})
        self.grams.clear()
        self.energy.clear()
        self.collect(tensors)

    def _products(self, tensors: Mapping[str, Tensor], batch: Any) -> dict[Part, list[Product]]:
        """The products of the site in one pass."""
        products: dict[Part, list[Product]] = {}
        push(self.problem, self.site, tensors, batch, lambda one: products.setdefault(part_of(one), []).append(one))
        return products

    def _add(self, part: Part, read: list[Product], dense: list[Product], k: int, samples: int) -> None:
        routed = self.problem.scope[part[0]].kind.startswith("experts")  # samples may go to others in the other net
        if routed or [d.inputs.shape for d in dense] != [x.inputs.shape for x in read]:
            dense = read
        low, high = (samples * (rank() + i) // world_size() for i in (0, 1))  # the share of this process
        for product, partner in zip(read, dense, strict=True):
            if not _length(product):
                continue
            K = product.layer.total // product.layer.rows
            positions = product.positions * samples // (high - low) * self.problem.inputs().batches * len(read)
            every = max(1, positions // (POSITIONS * K))
            count = _length(product)
            first, total = (count * number // (high - low) for number in (low, samples))
            middle = min(max(total // 2 - first, 0), count)
            if self.problem.inputs().batches > 1:
                middle = 0 if k % 2 else count
            for half, (start, stop) in enumerate(((0, middle), (middle, count))):
                offset = k if product.window else (k - first - start) % every  # the grid is that of one process
                x, d = (_cut(whole, start, stop) for whole in (product, partner))
                if start < stop:
                    self.energy[part] = self.energy.get(part, 0) + self._energy(d, every, offset)
                    if self.site.source.get(part, part) == part:
                        self._add_columns(part, half, x, None if partner is product else d, every, offset)

    def _energy(self, product: Product, every: int, offset: int) -> Tensor:
        weight = _wide(product.layer.matrix(self.problem.dense[product.layer.name])[product.rows])
        weight = weight.unflatten(0, (product.groups, -1))
        outputs = (_wide(columns) @ weight.mT.to(_wide(columns).dtype) for columns in product.columns(every, offset))
        return sum((output.square().sum(dtype=torch.float64) for output in outputs), weight.new_zeros(()).double())

    def _add_columns(
        self, part: Part, half: int, product: Product, partner: Product | None, every: int, offset: int
    ) -> None:
        if partner is None or torch.equal(product.inputs, partner.inputs):
            others: Iterator[Tensor | None] = itertools.repeat(None)
        else:
            others = partner.columns(every, offset)
        for columns, other in zip(product.columns(every, offset), others, strict=False):
            x = _wide(columns)
            gram = self.grams.get(part) or self.grams.setdefault(part, Gram.zeros(len(x), x.shape[2], x))
            addend = x.mT @ x
            gram.halves[half] += addend
            gram.totals[half] += x.sum(1)
            gram.positions[half] += x.shape[1]
            dense = x if other is None else _wide(other)
            gram.cross += addend if other is None else dense.mT @ x
            gram.dense_total += dense.sum(1)

    @property
    def finite(self) -> bool:
        """Whether no sum overflowed, nor will its products."""
        sums = [tensor for gram in self.grams.values() for tensor in (*gram.halves, gram.cross)]
        return all(bool((tensor.abs() < LARGEST).all()) for tensor in (*sums, *self.energy.values()))

    def _add_up(self) -> None:
        """Sums over all processes, which push a part of each batch each; their samples may reach other experts."""
        sizes: dict[Part, tuple[int, int]] = {}
        for found in all_gather_object(
            {part: (len(gram.cross), gram.cross.shape[2]) for part, gram in self.grams.items()}
        ):
            sizes |= found
        like = _wide(self.problem.dense[self.site.layers[0]])
        for part in sorted(sizes):
            gram = self.grams.get(part) or self.grams.setdefault(part, Gram.zeros(*sizes[part], like))
            sums = [*gram.halves, gram.cross, *gram.totals, gram.dense_total, torch.tensor(gram.positions)]
            *gram.halves, gram.cross, one, two, gram.dense_total, positions = all_reduce(sums)
            gram.totals, gram.positions = [one, two], positions.tolist()
        names = sorted(set().union(*all_gather_object(list(self.energy))))
        energy = [self.energy.get(name, like.new_zeros(()).double()) for name in names]
        self.energy = dict(zip(names, all_reduce(energy), strict=True))


def _keys(products: Mapping[Part, list[Product]], part: Part) -> list[Any]:
    return [product.key for product in products.get(part, ())]


def _length(product: Product) -> int:
    """The number of samples, where a kernel moves over them, or of positions."""
    return len(product.inputs) if product.window else product.inputs.shape[-2]


def _cut(product: Product, start: int, stop: int) -> Product:
    """The product of these samples or positions."""
    inputs = product.inputs[start:stop] if product.window else product.inputs[..., start:stop, :]
    return replace(product, inputs=inputs, positions=product.positions * (stop - start) // _length(product))


def _outer(one: Tensor, other: Tensor) -> Tensor:
    return one[:, :, None] * other[:, None, :]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
