"""Which block of the model a layer stands in, and the order in which layers run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from allot.network.call import call
from allot.network.products import watched_products
from allot.run.problem import Problem

CONTAINERS = (nn.ModuleList, nn.Sequential)


def block_names(problem: Problem) -> dict[str, str]:
    """Layer -> its block: the outermost module that a ModuleList or Sequential holds and that is none of these itself.

    So decoder blocks, residual blocks, or the layers of a plain chain. A layer outside of all is a block by itself.
    """
    modules = dict(problem.model.named_modules())
    return {layer.name: _block_of(modules, layer.name) for layer in problem.scope}


def _block_of(modules: dict[str, nn.Module], name: str) -> str:
    steps = name.split(".")[:-1]
    for count in range(len(steps)):
        holder, element = (".".join(steps[:end]) for end in (count, count + 1))
        if isinstance(modules[holder], CONTAINERS) and not isinstance(modules[element], CONTAINERS):
            return element
    return name


def ran_in_order(problem: Problem) -> list[str]:
    """Layers in the order in which a pass over `problem.example` first multiplies by them.

    A layer that this pass does not multiply by follows the one before it in the model.
    """
    seen: dict[str, None] = {}
    with watched_products(problem.model, problem.scope, lambda product: seen.setdefault(product.layer.name)):
        call(problem.model, {}, problem.example)
    return with_others(list(seen), [layer.name for layer in problem.scope])


def with_others(ran: list[str], registered: Iterable[str]) -> list[str]:
    """`ran`, with each other name of `registered` after the name that stands before it there.

    >>> with_others(["c", "a"], ["a", "b", "c", "d"])
    ['c', 'd', 'a', 'b']
    """
    order, before = list(ran), ""
    for name in registered:
        if name not in order:
            order.insert(order.index(before) + 1 if before else 0, name)
        before = name
    return order
