"""The parts of a streamed model, as modules that are called with numbers of samples, and the tensors between them.

A part is a copy of some of the model's modules on the device. It reads its inputs by the numbers of the samples, and
records the inputs of the next part. Which of the two nets runs is a parameter `sparse` of the part: 0 as it is, 1 among
the candidate's tensors, so that putting these in place also selects the inputs of the sparse net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import UsageError, first_line
from allot.methods.layerwise.blocks import BlockSequence, ModuleCall, flat, unflat
from allot.network.copies import deep_copy
from allot.network.trees import as_arguments
from allot.run.calibration import moved

FLAG = "sparse"  # the parameter's name


class SampleTensor:
    """A tensor of every sample, on the host; `dim` counts samples."""

    def __init__(self, count: int, dim: int, host: torch.device) -> None:
        self.dim, self.host = dim, host
        self.rows: Tensor | None = None
        self.filled = torch.zeros(count, dtype=torch.bool)

    def put(self, numbers: Tensor, value: Tensor) -> None:
        """Keep `value` for the samples of these numbers.

        Raises:
            UsageError: samples differ in shape.
        """
        rows = value.detach().movedim(self.dim, 0).to(self.host)
        if self.rows is None:
            self.rows = torch.empty((len(self.filled), *rows.shape[1:]), dtype=rows.dtype, device=self.host)
        if rows.shape != (len(numbers), *self.rows.shape[1:]):
            raise UsageError(
                f"streaming: samples of shapes {list(self.rows.shape[1:])} and {list(rows.shape[1:])} enter a block, "
                "one shape for all is accepted."
            )
        self.rows[numbers] = rows
        self.filled[numbers] = True

    def get(self, numbers: Tensor, device: torch.device) -> Tensor:
        """The samples of these numbers as one batch; the caller may write to it."""
        if self.rows is None or not bool(self.filled[numbers].all()):
            raise KeyError("a sample that did not come through the block before")
        return self.rows[numbers].movedim(0, self.dim).to(device)


class PartInputs:
    """The inputs of a part in one of the two nets: the hidden of every sample, and the values of the slots."""

    def __init__(self, hidden: SampleTensor, slots: list[Any]) -> None:
        self.hidden, self.slots = hidden, slots


class ModelPart(nn.Module):
    """Some of a model's modules on a device, called with numbers of samples `[B]`.

    Attributes:
        sparse: 0-dim; above 0.5 the sparse net runs. A parameter, so that a method that trains takes it along.
        inputs: False (the dense net) or True -> the inputs of this part.
        next_inputs: the same of the next part, as far as they were recorded.
    """

    sparse: nn.Parameter

    def __init__(self, sequence: BlockSequence, count: int, device: torch.device, host: torch.device) -> None:
        super().__init__()
        self.sequence, self.count, self.device, self.host = sequence, count, device, host
        self.sparse = nn.Parameter(torch.zeros((), device=device))
        self.inputs: Mapping[bool, PartInputs] = {}
        self.next_inputs: dict[bool, PartInputs] = {}
        self._recorded: tuple[bool, ...] = ()

    def inner_name(self, name: str) -> str | None:
        """The name in this part of a tensor of the model; None: the part does not hold the tensor."""
        raise NotImplementedError

    def outer_name(self, name: str) -> str:
        """The inverse of `inner_name`."""
        raise NotImplementedError

    def changes_with(self, names: Iterable[str]) -> bool:
        """Whether other values of these tensors of the part would change the inputs of the next part."""
        return any(name != FLAG for name in names)

    def run(self, numbers: Tensor, *, sparse: bool) -> Any:
        raise NotImplementedError

    def forward(self, numbers: Tensor) -> Any:
        return self.run(numbers, sparse=bool(self.sparse > 0.5))

    def release(self) -> None:
        """Free the tensors on the device; recorded inputs of the next part stay."""
        self._modules.clear()
        self._parameters.clear()

    @contextmanager
    def recording(self, nets: tuple[bool, ...]) -> Iterator[None]:
        """While open, inputs of the next part are recorded in these nets; False is the dense one."""
        self._recorded = nets
        try:
            yield
        finally:
            self._recorded = ()


class BlockPart(ModelPart):
    """One block of the sequence."""

    def __init__(
        self,
        model: nn.Module,
        sequence: BlockSequence,
        number: int,
        count: int,
        device: torch.device,
        host: torch.device,
    ) -> None:
        super().__init__(sequence, count, device, host)
        self.calls = sequence.blocks[number]
        self.steps = nn.ModuleList(
            copied(model.get_submodule(module_call.name), device, {}) for module_call in self.calls
        )
        self._constants: dict[int, Tensor] = {}

    def inner_name(self, name: str) -> str | None:
        for index, module_call in enumerate(self.calls):
            if name.startswith(f"{module_call.name}."):
                return f"steps.{index}.{name.removeprefix(f'{module_call.name}.')}"
        return None

    def outer_name(self, name: str) -> str:
        _, index, rest = name.split(".", 2)
        return f"{self.calls[int(index)].name}.{rest}"

    def run(self, numbers: Tensor, *, sparse: bool) -> Any:
        inputs = self.inputs[sparse]
        hidden = inputs.hidden.get(numbers, self.device)
        for module, module_call in zip(self.steps, self.calls, strict=True):
            values = (self._value(inputs.slots[slot], slot, numbers) for slot in module_call.slots)
            args, kwargs = unflat(module_call.spec, iter([hidden, *values]))
            hidden = module_call.hidden_of(module(*args, **kwargs))
        if sparse in self._recorded:
            if sparse not in self.next_inputs:
                empty = SampleTensor(self.count, self.calls[-1].dim_out, self.host)
                self.next_inputs[sparse] = PartInputs(empty, inputs.slots)
            self.next_inputs[sparse].hidden.put(numbers, hidden)
        return hidden

    def _value(self, value: Any, slot: int, numbers: Tensor) -> Any:
        if isinstance(value, SampleTensor):
            return value.get(numbers, self.device)
        if isinstance(value, Tensor):
            if slot not in self._constants:
                self._constants[slot] = value.to(self.device)
            return self._constants[slot]
        return deep_copy(value)  # an object such as a cache of keys: the block may write to it


def copied(module: nn.Module, device: torch.device, instead: Mapping[int, nn.Module]) -> nn.Module:
    """A copy of the module with its tensors on the device; tensors that are there already are shared.

    Args:
        instead: id of a module inside -> the module that stands in its place; it is not copied.
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
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(placed, requires_grad=tensor.requires_grad) if is_parameter else placed
    try:
        return deep_copy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"streaming: {type(module).__name__} cannot be copied ({error}).") from error


class _LastBlockReached(Exception):
    """The last block would begin."""


class _StandIn(nn.Module):
    """Stands in a block's place, and has the block's attributes for models that read them."""

    def __init__(self, block: nn.Module, index: int, called: Callable[[int, Any, Any], Any]) -> None:
        super().__init__()
        self._index, self._called = index, called
        self.__dict__["block"] = block  # no child: the part does not hold it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(self._index, args, kwargs)


class OutsidePart(ModelPart):
    """The model without its blocks: either up to the first one, or all of it with the last block's output put in.

    Args:
        pick: numbers of samples -> these as one batch of the model's inputs.
        stops: whether the pass stops where the last block would begin.
    """

    def __init__(
        self,
        model: nn.Module,
        sequence: BlockSequence,
        pick: Callable[[Sequence[int]], Any],
        count: int,
        device: torch.device,
        host: torch.device,
        *,
        stops: bool,
    ) -> None:
        super().__init__(sequence, count, device, host)
        self.pick, self.stops = pick, stops
        blocks = [model.get_submodule(module_call.name) for module_call in sequence.calls]
        stand_ins = {id(block): _StandIn(block, index, self._block_called) for index, block in enumerate(blocks)}
        self.model = copied(model, device, stand_ins)
        before = [m for name, m in model.named_modules(remove_duplicate=False) if name in sequence.before]
        self._tensors_before = {id(t) for m in before for t in (*m._parameters.values(), *m._buffers.values())}
        self._tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._numbers, self._runs_sparse = torch.zeros(0, dtype=torch.long), False
        self._recorded_slots: set[int] = set()

    def inner_name(self, name: str) -> str | None:
        return None if self.sequence.block_of(name) is not None else f"model.{name}"

    def outer_name(self, name: str) -> str:
        return name.removeprefix("model.")

    def changes_with(self, names: Iterable[str]) -> bool:
        outer = (self.outer_name(name) for name in names if name != FLAG)
        return any(id(self._tensors[name]) in self._tensors_before for name in outer)

    def run(self, numbers: Tensor, *, sparse: bool) -> Any:
        self._numbers, self._runs_sparse, self._recorded_slots = numbers, sparse, set()
        args, kwargs = as_arguments(moved(self.pick(numbers.tolist()), self.device))
        try:
            return self.model(*args, **kwargs)
        except _LastBlockReached:
            return None

    def _block_called(self, index: int, args: Any, kwargs: Any) -> Any:
        """The output of a stand-in: the last block's recorded one, and for blocks before it the hidden as it came.

        Raises:
            UsageError: arguments of another form than those that the sequence was found with.
        """
        calls = self.sequence.calls
        module_call, is_last = calls[index], index + 1 == len(calls)
        spec, leaves = flat((tuple(args), dict(kwargs)))
        if spec != module_call.spec:
            raise UsageError(
                f"streaming: {module_call.name} is called with other arguments for some samples (where some batches "
                "have a mask and others none, say): inputs of one kind are accepted."
            )
        if self.stops:
            if self._runs_sparse in self._recorded:
                self._record(index, module_call, leaves)
            if is_last:
                raise _LastBlockReached
        elif is_last:
            return module_call.output_of(self.inputs[self._runs_sparse].hidden.get(self._numbers, self.device))
        return module_call.output_of(leaves[0])

    def _record(self, index: int, module_call: ModuleCall, leaves: list[Any]) -> None:
        if self._runs_sparse not in self.next_inputs:
            hidden = SampleTensor(self.count, module_call.dim_in, self.host)
            slots = [None if dim is None else SampleTensor(self.count, dim, self.host) for dim in self.sequence.slots]
            self.next_inputs[self._runs_sparse] = PartInputs(hidden, slots)
        inputs = self.next_inputs[self._runs_sparse]
        if not index:
            inputs.hidden.put(self._numbers, leaves[0])
        for slot, leaf in zip(module_call.slots, leaves[1:], strict=True):
            if slot in self._recorded_slots:
                continue
            self._recorded_slots.add(slot)
            value = inputs.slots[slot]
            if isinstance(value, SampleTensor):
                value.put(self._numbers, leaf)
            elif value is None:
                inputs.slots[slot] = leaf.detach().to(self.host) if isinstance(leaf, Tensor) else leaf
            elif isinstance(leaf, Tensor) and not torch.equal(value, leaf.to(self.host)):
                raise UsageError(
                    f"streaming: an argument of {module_call.name} differs between batches, not by sample."
                )


def is_close(output: Tensor, wanted: Tensor) -> bool:
    """Whether an output of parts is that of the model, to the rounding of its dtype."""
    if output.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(output, wanted)
    scale = float(wanted.float().abs().nan_to_num(posinf=0.0).max()) if wanted.numel() else 0.0
    tolerance = 1e-4 if torch.finfo(wanted.dtype).eps < 1e-5 else 0.05
    return torch.allclose(output.float(), wanted.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def usable(device: str | torch.device) -> torch.device:
    """The device, where this machine has it.

    Raises:
        UsageError: it has not.
    """
    try:
        usable_device = torch.device(device)
        torch.empty(0, device=usable_device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"stream={str(device)!r}: this machine has no such device ({first_line(error)}).") from error
    return usable_device
