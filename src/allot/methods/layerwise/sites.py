"""Which layers read the same inputs, in order of execution, and passes that read what these layers multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from allot.network.call import call
from allot.network.products import Product, watched_products
from allot.run.problem import Problem
from allot.run.store import State

ROOM = 8  # times the bytes of the weights: the most that kept inputs may take
Part = tuple[str, int, int]  # layer, first row, last row + 1: rows that read the same inputs


@dataclass(frozen=True)
class Site:
    """Layers that are repaired together, because they read the same inputs.

    Attributes:
        layers: by name, in order of execution.
        source: part -> the part that stands for its inputs.
        visits: products of these layers in one pass, after which the pass may end; 0 where a layer is used several
            times, or a number of times that depends on the samples.
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
    """The layers in scope that a pass over the first batch reaches, in order of execution.

    Which of them read the same inputs is seen on the first sample; `Statistics` checks it for every batch.
    """
    keys: dict[Part, list[Any]] = {}
    alive: list[Tensor] = []  # keys tell inputs apart as long as these are alive
    counts: dict[Part, int] = {}

    def note_key(product: Product) -> None:
        alive.append(product.inputs)
        for one in by_expert(product):
            keys.setdefault(part_of(one), []).append(one.key)

    def count(product: Product) -> None:
        for one in by_expert(product):
            counts[part_of(one)] = counts.get(part_of(one), 0) + 1

    calibration = problem.inputs()
    for visit, batch in ((note_key, calibration.pick([0])), (count, calibration.batch(0)[0])):
        with watched_products(problem.model, problem.scope, visit):
            call(problem.model, {}, batch)
    sites: dict[Any, dict[Part, Any]] = {}
    for name in dict.fromkeys(layer for layer, _, _ in (*keys, *counts)):
        parts = {part: tuple(keys[part]) for part in keys if part[0] == name}
        sites.setdefault(frozenset(parts.values()) or name, {}).update(parts or {(name, 0, 0): ()})
    return [_site(parts, counts) for parts in sites.values()]


def part_of(product: Product) -> Part:
    """The part that a product computes."""
    return product.layer.name, product.rows.start, product.rows.stop


def _site(parts: Mapping[Part, tuple[Any, ...]], counts: Mapping[Part, int]) -> Site:
    first: dict[tuple[Any, ...], Part] = {}
    source = {part: first.setdefault(keys, part) for part, keys in parts.items() if keys}
    layers = tuple(dict.fromkeys(name for name, _, _ in parts))
    in_batch = {part for part in counts if part[0] in layers}
    once = in_batch == parts.keys() and all(counts[part] == 1 == len(keys) for part, keys in parts.items())
    return Site(layers, source, len(parts) if once else 0)


def by_expert(product: Product) -> list[Product]:
    """The products of single experts: which of them are computed at once depends on the samples."""
    if product.groups == 1 or not product.layer.kind.startswith("experts"):
        return [product]
    count = (product.rows.stop - product.rows.start) // product.groups
    starts = range(product.rows.start, product.rows.stop, count)
    return [
        replace(product, rows=slice(start, start + count), inputs=inputs, groups=1)
        for start, inputs in zip(starts, product.inputs, strict=True)
    ]


def together(sites: Sequence[Site]) -> Site:
    """One site of all."""
    visits = sum(site.visits for site in sites) if all(site.visits for site in sites) else 0
    source = {part: first for site in sites for part, first in site.source.items()}
    return Site(tuple(name for site in sites for name in site.layers), source, visits)


def push(
    problem: Problem, site: Site, tensors: Mapping[str, Tensor], batch: Any, visit: Callable[[Product], None]
) -> None:
    """Run the net on a batch, up to the last product of the site; `visit` gets each of them."""
    remaining = site.visits

    def visit_and_count(product: Product) -> None:
        nonlocal remaining
        for one in by_expert(product):
            visit(one)
        remaining -= 1
        if not remaining:
            raise _LastProduct

    layers = [problem.scope[name] for name in site.layers]
    with suppress(_LastProduct), watched_products(problem.model, layers, visit_and_count):
        call(problem.model, tensors, batch)


class DenseProducts:
    """The products of sites in the dense net: one pass a batch for all of them where their inputs can be kept.

    Inputs of a batch are kept where they take no more than its share of `ROOM` times the bytes of the weights that read
    them; else there is a pass for each site. The pass for all, and that for the last site, runs to the end of the net:
    a streamed run takes the block's output from it.

    Args:
        sites: those that `of` is asked for, in the same order.
    """

    def __init__(self, problem: Problem, sites: Sequence[Site]) -> None:
        self.problem = problem
        self._whole, self._sites = replace(together(sites), visits=0), sites
        weights = sum(problem.dense[name].nbytes for name in self._whole.layers)
        self._room = ROOM * weights // problem.inputs().batches if len(sites) > 1 else 0  # of a batch
        self._kept: dict[int, dict[Part, list[Product]]] = {}  # of each batch; nothing where it does not fit

    def of(self, site: Site, k: int, batch: Any) -> tuple[dict[Part, list[Product]], int]:
        """(the products of the site in the k-th batch, how many passes that takes).

        The pass for all sites counts for the first one alone, so that a resumed run counts as an uninterrupted one.
        """
        passes = int(bool(self._room) and site.layers == self._sites[0].layers)
        if self._room and k not in self._kept:
            self._kept[k] = self._inputs_of(self._whole, batch, self._room)
        kept = self._kept.get(k, {})
        if products := {part: found for part, found in kept.items() if part[0] in site.layers}:
            return products, passes
        if self._sites and site.layers == self._sites[-1].layers:
            site = replace(site, visits=0)
        return self._inputs_of(site, batch, None), passes + 1

    def leave(self, site: Site) -> None:
        """Forget the inputs of a site; they are read again where it is asked for again."""
        for products in self._kept.values():
            for part in [part for part in products if part[0] in site.layers]:
                del products[part]

    def _inputs_of(self, site: Site, batch: Any, room: int | None) -> dict[Part, list[Product]]:
        """The products in one pass.

        Args:
            room: most bytes of copies of the inputs, without which nothing is returned; None: no copies.
        """
        products: dict[Part, list[Product]] = {}
        alive: list[Tensor] = []  # keys tell inputs apart as long as these are alive
        copies: dict[Any, Tensor] = {}

        def keep(product: Product) -> None:
            if room is not None:
                alive.append(product.inputs)
                if product.key not in copies:
                    copies[product.key] = product.inputs.clone()  # the net may write to it
                    if sum(copy.nbytes for copy in copies.values()) > room:
                        products.clear()
                        raise _LastProduct
                product = replace(product, inputs=copies[product.key])
            products.setdefault(part_of(product), []).append(product)

        push(self.problem, site, {}, batch, keep)
        return products


class _LastProduct(Exception):
    """No product of the site is left in this pass."""
