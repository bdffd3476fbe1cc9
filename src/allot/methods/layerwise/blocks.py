"""Blocks of a model that run one after another, found by watching it run.

A chain is a row of modules m_1 .. m_n, each an element of a ModuleList or Sequential (of any of them: the stages of a
ResNet are several), run once, whose first argument is the very tensor that m_{i-1} gave. Of all chains the one is
taken that needs the least room where one part at a time is held:

    max( size of the largest m_i, size of everything outside of the chain )      size: bytes of parameters and buffers

Elements without a matrix or kernel of their own, such as activations and norms, go with the element before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.call import call
from allot.network.trees import tensors_in

LEAF = object()  # where a tensor, or an object, stands among arguments


@dataclass(frozen=True)
class Link:
    """One module of the chain and how it is called.

    Attributes:
        name: of the module.
        spec: its positional and keyword arguments, `LEAF` where a tensor or an object stands; the first is the hidden.
        slots: which slot each leaf after the first takes its value from.
        within: what its output looks like where it is no tensor: a tuple or list whose first place is the hidden.
        enters, leaves: dimension of the hidden that counts samples, on the way in and out.
    """

    name: str
    spec: Any
    slots: tuple[int, ...]
    within: tuple[Any, ...] | None
    enters: int
    leaves: int

    def given(self, output: Any) -> Tensor:
        """The hidden in an output."""
        return output if self.within is None else output[0]

    def formed(self, hidden: Tensor) -> Any:
        """An output of the module's form that holds this hidden and nothing else."""
        return hidden if self.within is None else (hidden, *self.within)


@dataclass(frozen=True)
class Chain:
    """A model cut into blocks.

    Attributes:
        blocks: modules that one block runs, in order.
        slots: of each value that blocks get beside the hidden, the dimension that counts samples; None: the same value
            for all samples.
        before: names of the modules outside that begin before the first block does.
        size: bytes of the largest part: of a block, or of what lies outside.
    """

    blocks: tuple[tuple[Link, ...], ...]
    slots: tuple[int | None, ...]
    before: frozenset[str]
    size: int

    @property
    def links(self) -> tuple[Link, ...]:
        """All modules of the chain, in order."""
        return tuple(link for block in self.blocks for link in block)

    def block_of(self, name: str) -> int | None:
        """Which block holds the parameter, buffer or module of this name; None: it lies outside."""
        for number, block in enumerate(self.blocks):
            if any(f"{name}.".startswith(f"{link.name}.") for link in block):
                return number
        return None


def flat(tree: Any) -> tuple[Any, list[Any]]:
    """(the form of nested tuples, lists and dicts with `LEAF` for tensors and objects, these in order)."""
    if isinstance(tree, tuple | list):
        parts = [flat(part) for part in tree]
        return tuple(spec for spec, _ in parts), [leaf for _, leaves in parts for leaf in leaves]
    if type(tree) is dict:
        parts = [flat(part) for part in tree.values()]
        specs = dict(zip(tree, (spec for spec, _ in parts), strict=True))
        return specs, [leaf for _, leaves in parts for leaf in leaves]
    if tree is None or isinstance(tree, bool | int | float | str | torch.dtype):
        return tree, []
    return LEAF, [tree]


def unflat(spec: Any, leaves: Iterator[Any]) -> Any:
    """The inverse of `flat`; lists come back as tuples."""
    if spec is LEAF:
        return next(leaves)
    if isinstance(spec, tuple):
        return tuple(unflat(part, leaves) for part in spec)
    return {key: unflat(part, leaves) for key, part in spec.items()} if isinstance(spec, dict) else spec


def size_of(module: nn.Module) -> int:
    """Bytes of its parameters and buffers, each once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def chain_of(model: nn.Module, single: Any, pair: Any) -> Chain:
    """The chain of `model`, seen on a batch of one sample and on one of two.

    Args:
        single, pair: batches of inputs, as `call` takes them.
    Raises:
        UsageError: no two modules run one after another, or they hold less than a quarter of the model.
    """
    elements = _elements(model)
    before, seen = _watched(model, single, elements), _watched(model, pair, elements)
    candidates = []
    given = {id(tensor) for run in seen for tensor in tensors_in(run.output)}
    for run in _once(model, seen, elements):
        if any(id(leaf) in given for leaf in run.leaves[1:]):
            continue  # what another element gave, beside the hidden: no value that is there from the start
        first = next((other for other in before if other.name == run.name), None)
        if first is not None and (found := _known(first, run)):
            candidates.append(found)
    total = size_of(model)
    best = _best(candidates, total)
    held = sum(node.size for node in best)
    if len(best) < 2 or 4 * held < total:
        what = f"; the best row, {best[0].run.name} to {best[-1].run.name}, holds {held / total:.0%}" if best else ""
        raise UsageError(
            f"{type(model).__name__} has no blocks that run one after another and hold a quarter of it{what}. "
            "Elements of a ModuleList or Sequential are looked at, run once each, the first argument of each being "
            "the output of the one before. Leave stream out."
        )
    links, slots = _linked(best)
    blocks: list[list[Link]] = []
    for link, node in zip(links, best, strict=True):
        own = any(parameter.dim() > 1 for parameter in node.run.module.parameters())
        if not blocks or (own and any(p.dim() > 1 for n in blocks[-1] for p in _module(model, n).parameters())):
            blocks.append([])
        blocks[-1].append(link)
    sizes = [sum(size_of(_module(model, link)) for link in block) for block in blocks]
    started = best[0].run.started
    inside = tuple(f"{node.run.name}." for node in best)
    early = {run.name for run in seen if run.started < started and not f"{run.name}.".startswith(inside)}
    return Chain(tuple(map(tuple, blocks)), slots, frozenset(early), max(*sizes, total - held))


@dataclass
class _Run:
    """One pass through a module."""

    name: str
    module: nn.Module
    started: int
    spec: Any
    leaves: list[Any]
    version: int
    ended: int = -1
    output: Any = None
    left: int = -1  # version of the hidden on the way out


@dataclass(frozen=True)
class _Node:
    """A module that may be part of a chain; `slots` tells of each leaf after the hidden how it counts samples."""

    run: _Run
    enters: int
    leaves: int
    slots: tuple[int | None, ...]
    size: int = field(compare=False)


def _watched(model: nn.Module, inputs: Any, elements: set[int]) -> list[_Run]:
    """Every pass through every module of the model, in the order in which they begin; what elements get and give."""
    runs: list[_Run] = []
    open_runs: list[_Run] = []

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            spec, leaves = flat((tuple(args), dict(kwargs))) if id(module) in elements else (None, [])
            run = _Run(name, module, len(runs), spec, leaves, _version(leaves[0] if leaves else None))
            runs.append(run)
            open_runs.append(run)

        return hook

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run = open_runs.pop()
        run.ended = len(runs)
        if id(module) in elements:  # what others gave is let go
            run.output, run.left = output, _version(_first(output))

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(begin(name), with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        call(model, {}, inputs)
    return runs


def _elements(model: nn.Module) -> set[int]:
    """Ids of the modules that stand in a ModuleList or Sequential."""
    rows = (module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    return {id(child) for module in rows for child in module.children()}


def _once(model: nn.Module, runs: list[_Run], elements: set[int]) -> Iterator[_Run]:
    """Passes through elements that run once and share no parameter with what lies outside of them."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    times = Counter(run.name for run in runs)
    for run in runs:
        own = f"{run.name}."
        names = (n for parameter in run.module.parameters() for n in places[id(parameter)])
        if id(run.module) in elements and times[run.name] == 1 and all(n.startswith(own) for n in names):
            yield run


def _known(single: _Run, pair: _Run) -> _Node | None:
    """The module as a node, where its first argument and output are tensors that count samples."""
    if single.spec != pair.spec or not pair.leaves or not _is_hidden_first(pair.spec):
        return None
    hidden, out = (_counting(a, b) for a, b in ((single.leaves[0], pair.leaves[0]), _outputs(single, pair)))
    if hidden is None or out is None or hidden < 0 or out < 0:
        return None
    slots = []
    for one, two in zip(single.leaves[1:], pair.leaves[1:], strict=True):
        dim = _counting(one, two)
        if dim is not None and dim < 0 and isinstance(two, Tensor):
            return None
        slots.append(dim)
    return _Node(pair, hidden, out, tuple(slots), size_of(pair.module))


def _outputs(single: _Run, pair: _Run) -> tuple[Any, Any]:
    return _first(single.output), _first(pair.output)


def _counting(one: Any, two: Any) -> int | None:
    """The dimension that counts samples; None: there is none; -1: shapes differ otherwise, or it is no tensor."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return None if not isinstance(one, Tensor) and type(one) is type(two) else -1
    if one.dim() != two.dim():
        return -1
    differing = [dim for dim in range(one.dim()) if one.shape[dim] != two.shape[dim]]
    if not differing:
        return None
    dim = differing[0]
    return dim if len(differing) == 1 and (one.shape[dim], two.shape[dim]) == (1, 2) else -1


def _is_hidden_first(spec: Any) -> bool:
    args, kwargs = spec
    return (args[0] if args else next(iter(kwargs.values()), None)) is LEAF


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1


def _best(nodes: list[_Node], total: int) -> list[_Node]:
    """The chain whose largest part, or rest, is smallest; of equals the one with more elements."""
    after: dict[tuple[int, int], list[int]] = {}
    for number, node in enumerate(nodes):
        hidden = node.run.leaves[0]
        after.setdefault((id(hidden), node.run.version), []).append(number)
    found: tuple[int, int, list[_Node]] = (total + 1, 0, [])
    for cap in sorted({node.size for node in nodes}):
        ways: dict[int, tuple[int, int, int | None]] = {}  # from here on: size, elements, the next one
        for number in reversed(range(len(nodes))):
            node = nodes[number]
            if node.size > cap:
                continue
            key = (id(_first(node.run.output)), node.run.left)
            following = [n for n in after.get(key, ()) if n in ways and nodes[n].run.started >= node.run.ended]
            best = max(following, key=lambda n: ways[n][:2], default=None)
            size, count = ways[best][:2] if best is not None else (0, 0)
            ways[number] = (size + node.size, count + 1, best)
        start = max(ways, key=lambda n: ways[n][:2])
        row: list[_Node] = []
        at: int | None = start
        while at is not None:
            row.append(nodes[at])
            at = ways[at][2]
        room = max(max(node.size for node in row), total - sum(node.size for node in row))
        if (room, -len(row)) < found[:2]:
            found = (room, -len(row), row)
    return found[2]


def _linked(nodes: Iterable[_Node]) -> tuple[list[Link], tuple[int | None, ...]]:
    """The chain's links; values that several of them get are one slot."""
    numbers: dict[int, int] = {}
    dims: list[int | None] = []
    links = []
    for node in nodes:
        slots = []
        for leaf, dim in zip(node.run.leaves[1:], node.slots, strict=True):
            if id(leaf) not in numbers:
                numbers[id(leaf)] = len(dims)
                dims.append(dim)
            slots.append(numbers[id(leaf)])
        output = node.run.output
        within = tuple(None for _ in output[1:]) if isinstance(output, tuple | list) else None
        links.append(Link(node.run.name, node.run.spec, tuple(slots), within, node.enters, node.leaves))
    return links, tuple(dims)


def _module(model: nn.Module, link: Link) -> nn.Module:
    return model.get_submodule(link.name)
