"""What flows between the parts of a streamed model, and the parts as modules that are called with numbers of samples.

A part is a copy of some modules on the device. It finds what enters it by the numbers of the samples, and notes what
leaves it. Which of the two nets runs shows in a parameter `sparse` of the part: 0 as it is, 1 among the candidate's
tensors, so that whoever puts these in place gets the sparse net's inputs with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.methods.layerwise.blocks import Chain, Link, flat, unflat
from allot.network.call import as_arguments
from allot.run.calibration import moved

FLAG = "sparse"  # the parameter's name


class Rows:
    """A tensor of every sample, on the host; `dim` counts samples."""

    def __init__(self, count: int, dim: int, host: torch.device) -> None:
        self.dim, self.host = dim, host
        self.values: Tensor | None = None
        self.seen = torch.zeros(count, dtype=torch.bool)

    def put(self, numbers: Tensor, value: Tensor) -> None:
        """Keep `value` for the samples of these numbers.

        Raises:
            UsageError: samples differ in shape.
        """
        rows = value.detach().movedim(self.dim, 0).to(self.host)
        if self.values is None:
            self.values = torch.empty((len(self.seen), *rows.shape[1:]), dtype=rows.dtype, device=self.host)
        if rows.shape != (len(numbers), *self.values.shape[1:]):
            raise UsageError(
                f"streaming: samples of shapes {list(self.values.shape[1:])} and {list(rows.shape[1:])} enter a block, "
                "one shape for all is accepted."
            )
        self.values[numbers] = rows
        self.seen[numbers] = True

    def get(self, numbers: Tensor, device: torch.device) -> Tensor:
        """The samples of these numbers as one batch; the caller may write to it."""
        if self.values is None or not bool(self.seen[numbers].all()):
            raise KeyError("a sample that did not come through the block before")
        return self.values[numbers].movedim(0, self.dim).to(device)


class Entry:
    """What enters a part in one of the two nets: the hidden of every sample, and the values of the chain's slots."""

    def __init__(self, hidden: Rows, slots: list[Any]) -> None:
        self.hidden, self.slots = hidden, slots

    @property
    def whole(self) -> bool:
        """Whether every sample is there."""
        return bool(self.hidden.seen.all())


class Part(nn.Module):
    """Some of a model's modules on a device, called with numbers of samples `[B]`.

    Attributes:
        sparse: 0-dim; above 0.5 what runs is the sparse net. A parameter: whatever trains takes it along.
        entries, exits: False (the dense net) or True -> what enters, and what leaves where it was noted.
    """

    sparse: nn.Parameter

    def __init__(self, chain: Chain, count: int, device: torch.device, host: torch.device) -> None:
        super().__init__()
        self.chain, self.count, self.device, self.host = chain, count, device, host
        self.sparse = nn.Parameter(torch.zeros((), device=device))
        self.entries: Mapping[bool, Entry] = {}
        self.exits: dict[bool, Entry] = {}
        self._noted = False

    def inner(self, name: str) -> str | None:
        """What a tensor of the model is called here; None: it is not here."""
        raise NotImplementedError

    def outer(self, name: str) -> str:
        """The inverse of `inner`."""
        raise NotImplementedError

    def touched(self, names: Iterable[str]) -> bool:
        """Whether other values of these tensors of the part would change what leaves it."""
        return any(name != FLAG for name in names)

    def run(self, numbers: Tensor, *, sparse: bool) -> Any:
        """What the part gives."""
        raise NotImplementedError

    def forward(self, numbers: Tensor) -> Any:
        return self.run(numbers, sparse=bool(self.sparse > 0.5))

    def leave(self) -> None:
        """Let go what is on the device; what was noted stays."""
        self._modules.clear()
        self._parameters.clear()

    @contextmanager
    def noting(self, noted: bool) -> Iterator[None]:  # noqa: FBT001
        """While open, what leaves is kept for the next part, or not."""
        self._noted = noted
        try:
            yield
        finally:
            self._noted = False


class Block(Part):
    """One block of the chain."""

    def __init__(
        self, model: nn.Module, chain: Chain, number: int, count: int, device: torch.device, host: torch.device
    ) -> None:
        super().__init__(chain, count, device, host)
        self.called = chain.blocks[number]
        self.steps = nn.ModuleList(copied(model.get_submodule(link.name), device, {}) for link in self.called)
        self._constants: dict[int, Tensor] = {}

    def inner(self, name: str) -> str | None:
        for place, link in enumerate(self.called):
            if name.startswith(f"{link.name}."):
                return f"steps.{place}.{name.removeprefix(f'{link.name}.')}"
        return None

    def outer(self, name: str) -> str:
        _, place, rest = name.split(".", 2)
        return f"{self.called[int(place)].name}.{rest}"

    def run(self, numbers: Tensor, *, sparse: bool) -> Any:
        entry = self.entries[sparse]
        hidden = entry.hidden.get(numbers, self.device)
        for module, link in zip(self.steps, self.called, strict=True):
            values = (self._value(entry.slots[slot], slot, numbers) for slot in link.slots)
            args, kwargs = unflat(link.spec, iter([hidden, *values]))
            hidden = link.given(module(*args, **kwargs))
        if self._noted:
            if sparse not in self.exits:
                self.exits[sparse] = Entry(Rows(self.count, self.called[-1].leaves, self.host), entry.slots)
            self.exits[sparse].hidden.put(numbers, hidden)
        return hidden

    def _value(self, value: Any, slot: int, numbers: Tensor) -> Any:
        if isinstance(value, Rows):
            return value.get(numbers, self.device)
        if isinstance(value, Tensor):
            if slot not in self._constants:
                self._constants[slot] = value.to(self.device)
            return self._constants[slot]
        return copy.deepcopy(value)  # an object such as a cache of keys: the block may write to it


def copied(module: nn.Module, device: torch.device, instead: Mapping[int, nn.Module]) -> nn.Module:
    """A copy of the module with its tensors on the device; those that are there already are shared.

    Args:
        instead: id of a module inside -> what stands in its place; it is not copied.
    Raises:
        UsageError: the module holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(instead)
    pending = [module]
    while pending:
        inside = pending.pop()
        if id(inside) in instead:
            continue
        pending += inside.children()
        for tensor in (*inside._parameters.values(), *inside._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                placed = tensor.detach().to(device)
                own = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(placed, requires_grad=tensor.requires_grad) if own else placed
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"streaming: {type(module).__name__} cannot be copied ({error}).") from error


class _Reached(Exception):
    """The last block would begin."""


class _Gate(nn.Module):
    """Stands in a block's place, and has the block's attributes for models that read them."""

    def __init__(self, block: nn.Module, place: int, meet: Callable[[int, Any, Any], Any]) -> None:
        super().__init__()
        self.place, self.meet = place, meet
        self.__dict__["block"] = block  # no child: it is not here

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.meet(self.place, args, kwargs)


class Outside(Part):
    """The model without its blocks: either up to the first one, or all of it with the last block's output put in.

    Args:
        pick: numbers of samples -> these as one batch of the model's inputs.
        ends: whether the pass ends where the last block would begin.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        pick: Callable[[Sequence[int]], Any],
        count: int,
        device: torch.device,
        host: torch.device,
        *,
        ends: bool,
    ) -> None:
        super().__init__(chain, count, device, host)
        self.pick, self.ends = pick, ends
        blocks = [model.get_submodule(link.name) for link in chain.links]
        gates = {id(block): _Gate(block, place, self._meet) for place, block in enumerate(blocks)}
        self.model = copied(model, device, gates)
        early = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n in chain.before]
        self._early = {id(t) for _, m in early for t in (*m._parameters.values(), *m._buffers.values())}
        self._names = dict(model.named_parameters()) | dict(model.named_buffers())
        self._numbers, self._sparse = torch.zeros(0, dtype=torch.long), False
        self._met: set[int] = set()

    def inner(self, name: str) -> str | None:
        return None if self.chain.block_of(name) is not None else f"model.{name}"

    def outer(self, name: str) -> str:
        return name.removeprefix("model.")

    def touched(self, names: Iterable[str]) -> bool:
        return any(name != FLAG and id(self._names[self.outer(name)]) in self._early for name in names)

    def run(self, numbers: Tensor, *, sparse: bool) -> Any:
        self._numbers, self._sparse, self._met = numbers, sparse, set()
        args, kwargs = as_arguments(moved(self.pick(numbers.tolist()), self.device))
        try:
            return self.model(*args, **kwargs)
        except _Reached:
            return None

    def _meet(self, place: int, args: Any, kwargs: Any) -> Any:
        links = self.chain.links
        link, last = links[place], place + 1 == len(links)
        spec, leaves = flat((tuple(args), dict(kwargs)))
        if spec != link.spec:
            raise UsageError(
                f"streaming: {link.name} is called with other arguments for some samples (where some batches have a "
                "mask and others none, say): inputs of one kind are accepted."
            )
        if self.ends:
            if self._noted:
                self._note(place, link, leaves)
            if last:
                raise _Reached
        elif last:
            return link.formed(self.entries[self._sparse].hidden.get(self._numbers, self.device))
        return link.formed(leaves[0])

    def _note(self, place: int, link: Link, leaves: list[Any]) -> None:
        if self._sparse not in self.exits:
            rows = Rows(self.count, link.enters, self.host)
            slots = [None if dim is None else Rows(self.count, dim, self.host) for dim in self.chain.slots]
            self.exits[self._sparse] = Entry(rows, slots)
        entry = self.exits[self._sparse]
        if not place:
            entry.hidden.put(self._numbers, leaves[0])
        for slot, leaf in zip(link.slots, leaves[1:], strict=True):
            if slot in self._met:
                continue
            self._met.add(slot)
            held = entry.slots[slot]
            if isinstance(held, Rows):
                held.put(self._numbers, leaf)
            elif held is None:
                entry.slots[slot] = leaf.detach().to(self.host) if isinstance(leaf, Tensor) else leaf
            elif isinstance(leaf, Tensor) and not torch.equal(held, leaf.to(self.host)):
                raise UsageError(f"streaming: an argument of {link.name} differs between batches, not by sample.")
