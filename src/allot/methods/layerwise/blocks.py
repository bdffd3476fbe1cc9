"""Blocks of a model that run one after another, found by watching the model run.

A sequence is modules m_1 .. m_n, each an element of a ModuleList or Sequential (of any of them: the stages of a ResNet
are several), run once, whose first argument, the hidden, is the very tensor that m_{i-1} returned. Of all sequences the
one is taken that needs the least memory where one part at a time is held:

    max( size of the largest m_i, size of everything outside the sequence )      size: bytes of parameters and buffers

Elements without a matrix or kernel, such as activations and norms, join the block of the element before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.call import call
from allot.network.trees import tensors_in

LEAF = object()  # where a tensor, or an object, stands among arguments


@dataclass(frozen=True)
class ModuleCall:
    """One module of the sequence and how it is called.

    Attributes:
        name: of the module.
        spec: its positional and keyword arguments, `LEAF` where a tensor or an object stands; the first is the hidden.
        slots: which slot each leaf after the first takes its value from.
        rest: where its output is a tuple or list whose first entry is the hidden, None for each entry after it; None
            where the output is the hidden itself.
        dim_in, dim_out: dimension of the hidden that counts samples, before and after the module.
    """

    name: str
    spec: Any
    slots: tuple[int, ...]
    rest: tuple[Any, ...] | None
    dim_in: int
    dim_out: int

    def hidden_of(self, output: Any) -> Tensor:
        return output if self.rest is None else output[0]

    def output_of(self, hidden: Tensor) -> Any:
        """An output of the module's form that holds this hidden and nothing else."""
        return hidden if self.rest is None else (hidden, *self.rest)


@dataclass(frozen=True)
class BlockSequence:
    """A model cut into blocks.

    Attributes:
        blocks: modules that one block runs, in order.
        slots: of each value that blocks take beside the hidden, the dimension that counts samples; None: the same
            value for all samples.
        before: names of the modules outside that begin before the first block does.
        size: bytes of the largest part: of a block, or of everything outside.
    """

    blocks: tuple[tuple[ModuleCall, ...], ...]
    slots: tuple[int | None, ...]
    before: frozenset[str]
    size: int

    @property
    def calls(self) -> tuple[ModuleCall, ...]:
        """All modules of the sequence, in order."""
        return tuple(module_call for block in self.blocks for module_call in block)

    def block_of(self, name: str) -> int | None:
        """Which block holds the parameter, buffer or module of this name; None: it lies outside."""
        for number, block in enumerate(self.blocks):
            if any(f"{name}.".startswith(f"{module_call.name}.") for module_call in block):
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
    """Bytes of its parameters and buffers, each once.

    >>> size_of(nn.Linear(3, 2))
    32
    """
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def find_blocks(model: nn.Module, single: Any, pair: Any) -> BlockSequence:
    """The blocks of `model`, found from its passes over a batch of one sample and a batch of two.

    Args:
        single, pair: batches of inputs, as `call` takes them.
    Raises:
        UsageError: no two modules run one after another, or they hold less than a quarter of the model.
    """
    containers = (module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    element_ids = {id(child) for container in containers for child in container.children()}
    single_passes, pair_passes = _passes_of(model, single, element_ids), _passes_of(model, pair, element_ids)
    elements = []
    output_ids = {id(tensor) for passed in pair_passes for tensor in tensors_in(passed.output)}
    for passed in _separate_passes(model, pair_passes, element_ids):
        if any(id(leaf) in output_ids for leaf in passed.leaves[1:]):
            continue  # beside the hidden it takes the output of another element: no value that is there from the start
        counterpart = next((other for other in single_passes if other.name == passed.name), None)
        if counterpart is not None and (element := _element_of(counterpart, passed)):
            elements.append(element)
    total = size_of(model)
    best = _best_sequence(elements, total)
    inside = sum(element.size for element in best)
    if len(best) < 2 or 4 * inside < total:
        names = f"{best[0].passed.name} to {best[-1].passed.name}" if best else ""
        longest = f"; the best row, {names}, holds {inside / total:.0%}" if best else ""
        raise UsageError(
            f"{type(model).__name__} has no blocks that run one after another and hold a quarter of it{longest}. "
            "Elements of a ModuleList or Sequential are looked at, run once each, the first argument of each being "
            "the output of the one before."
        )
    calls, slots = _calls_of(best)
    blocks: list[list[ModuleCall]] = []
    for module_call in calls:
        if not blocks or (_has_matrix(model, module_call) and any(_has_matrix(model, c) for c in blocks[-1])):
            blocks.append([])
        blocks[-1].append(module_call)
    sizes = [sum(size_of(model.get_submodule(module_call.name)) for module_call in block) for block in blocks]
    prefixes = tuple(f"{element.passed.name}." for element in best)
    before = {
        passed.name
        for passed in pair_passes
        if passed.started < best[0].passed.started and not f"{passed.name}.".startswith(prefixes)
    }
    return BlockSequence(tuple(map(tuple, blocks)), slots, frozenset(before), max(*sizes, total - inside))


@dataclass
class _Pass:
    """One pass through a module."""

    name: str
    module: nn.Module
    started: int
    spec: Any
    leaves: list[Any]
    version_in: int  # of the hidden
    ended: int = -1
    output: Any = None
    version_out: int = -1


@dataclass(frozen=True)
class _Element:
    """A module that may be part of a sequence; `slots`: of each leaf after the hidden, how it counts samples."""

    passed: _Pass
    dim_in: int
    dim_out: int
    slots: tuple[int | None, ...]
    size: int = field(compare=False)


def _passes_of(model: nn.Module, inputs: Any, element_ids: set[int]) -> list[_Pass]:
    """Every pass through every module, in the order in which they begin; of elements with arguments and outputs."""
    passes: list[_Pass] = []
    open_passes: list[_Pass] = []

    def begin(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        spec, leaves = flat((tuple(args), dict(kwargs))) if id(module) in element_ids else (None, [])
        passed = _Pass(name, module, len(passes), spec, leaves, _version(leaves[0] if leaves else None))
        passes.append(passed)
        open_passes.append(passed)

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        passed = open_passes.pop()
        passed.ended = len(passes)
        if id(module) in element_ids:  # outputs of other modules are not kept alive
            passed.output, passed.version_out = output, _version(_first(output))

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(begin, name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        call(model, {}, inputs)
    return passes


def _separate_passes(model: nn.Module, passes: list[_Pass], element_ids: set[int]) -> Iterator[_Pass]:
    """Passes through elements that run once and share no parameter with a module outside of them."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    times = Counter(passed.name for passed in passes)
    for passed in passes:
        prefix = f"{passed.name}."
        names = (n for parameter in passed.module.parameters() for n in names_of[id(parameter)])
        if id(passed.module) in element_ids and times[passed.name] == 1 and all(n.startswith(prefix) for n in names):
            yield passed


def _element_of(single: _Pass, pair: _Pass) -> _Element | None:
    """The module as an element, where its first argument and output are tensors that count samples."""
    args, kwargs = pair.spec
    if single.spec != pair.spec or (args[0] if args else next(iter(kwargs.values()), None)) is not LEAF:
        return None
    dim_in = _sample_dim(single.leaves[0], pair.leaves[0])
    dim_out = _sample_dim(_first(single.output), _first(pair.output))
    if dim_in is None or dim_out is None or dim_in < 0 or dim_out < 0:
        return None
    slots = []
    for one, two in zip(single.leaves[1:], pair.leaves[1:], strict=True):
        dim = _sample_dim(one, two)
        if dim is not None and dim < 0 and isinstance(two, Tensor):
            return None
        slots.append(dim)
    return _Element(pair, dim_in, dim_out, tuple(slots), size_of(pair.module))


def _sample_dim(one: Any, two: Any) -> int | None:
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


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1


def _best_sequence(elements: list[_Element], total: int) -> list[_Element]:
    """The sequence whose largest part, or rest, is smallest; of equal ones the one with more elements."""
    readers: dict[tuple[int, int], list[int]] = {}  # (id, version) of a hidden -> the elements that take it
    for number, element in enumerate(elements):
        readers.setdefault((id(element.passed.leaves[0]), element.passed.version_in), []).append(number)
    best: tuple[int, int, list[_Element]] = (total + 1, 0, [])  # bytes of the largest part, minus length, sequence
    for largest in sorted({element.size for element in elements}):
        ways: dict[int, tuple[int, int, int | None]] = {}  # from here on: size, number of elements, the next one
        for number in reversed(range(len(elements))):
            element = elements[number]
            if element.size > largest:
                continue
            key = (id(_first(element.passed.output)), element.passed.version_out)
            after = [
                n for n in readers.get(key, ()) if n in ways and elements[n].passed.started >= element.passed.ended
            ]
            following = max(after, key=lambda n: ways[n][:2], default=None)
            size, count = ways[following][:2] if following is not None else (0, 0)
            ways[number] = (size + element.size, count + 1, following)
        sequence: list[_Element] = []
        current: int | None = max(ways, key=lambda n: ways[n][:2])
        while current is not None:
            sequence.append(elements[current])
            current = ways[current][2]
        sizes = [element.size for element in sequence]
        room = max(*sizes, total - sum(sizes))
        if (room, -len(sequence)) < best[:2]:
            best = (room, -len(sequence), sequence)
    return best[2]


def _calls_of(elements: Iterable[_Element]) -> tuple[list[ModuleCall], tuple[int | None, ...]]:
    """The calls of a sequence, and the dimension that counts samples in each slot; one value is one slot for all."""
    slot_of: dict[int, int] = {}
    dims: list[int | None] = []
    calls = []
    for element in elements:
        slots = []
        for leaf, dim in zip(element.passed.leaves[1:], element.slots, strict=True):
            if id(leaf) not in slot_of:
                slot_of[id(leaf)] = len(dims)
                dims.append(dim)
            slots.append(slot_of[id(leaf)])
        output = element.passed.output
        rest = tuple(None for _ in output[1:]) if isinstance(output, tuple | list) else None
        spec = element.passed.spec
        calls.append(ModuleCall(element.passed.name, spec, tuple(slots), rest, element.dim_in, element.dim_out))
    return calls, tuple(dims)


def _has_matrix(model: nn.Module, module_call: ModuleCall) -> bool:
    return any(parameter.dim() > 1 for parameter in model.get_submodule(module_call.name).parameters())
