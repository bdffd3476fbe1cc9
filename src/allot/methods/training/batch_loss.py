"""The loss of the sparse net against the dense one on a batch of calibration inputs, and its gradients.

A batch may be in pieces: micro-batches that follow one another, and shares of several processes. What each adds to the
loss and to its gradients is summed up, so that they are those of the whole batch; of batch norms see
`allot.network.batch_norms`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import AllotError, UsageError, check_number, unknown
from allot.methods.training.losses import LOSSES, Outputs, compared, compared_tensors, relative_error, size
from allot.methods.training.teacher import keep, recalled
from allot.network.batch_norms import Norms, is_batch_norm
from allot.network.call import call
from allot.network.checkpointing import is_second_run
from allot.network.hooks import hooked
from allot.network.masking import Masking
from allot.processes import all_reduce, all_reduce_number, any_process, single_process, world_size
from allot.run.calibration import cut
from allot.run.problem import Problem
from allot.run.store import State

Answers = tuple[list[Tensor], list[Tensor]]  # what is compared of the outputs, and of blocks
SCALES = 2.0**16, 200  # of the loss in fp16: the first one, and after how many finite steps it doubles


@dataclass(frozen=True)
class Distance:
    """How outputs are compared; frozen hyperparameters and functions of a state {"step", "repeat", "teacher"}.

    Args:
        temperature: T of the KL loss, above 0.
        student_temperature: T_s, see `allot.methods.training.losses`; None: as `temperature`.
        loss: "kl" on logits: over the last dimension of `[B, classes]` and `[B, T, classes]`, over dimension 1 of
            `[B, classes, H, W]` and more; or "mse": squared error over the mean square of the dense net's output.
        outputs: what of the model's output is compared: a function `output -> tensors` (a tensor, or a tuple, list or
            dict of them), or its place as text, "package.module:function" or "file.py:function". None: the output
            itself, or its `.logits`.
        blocks: names of modules, globs allowed, whose outputs are compared as well, by squared error.
        block_weight: of these terms, each.
    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 2.0
    student_temperature: float | None = None
    loss: str = "kl"
    outputs: str | Outputs | None = None
    blocks: tuple[str, ...] = ()
    block_weight: float = 0.1

    def __post_init__(self) -> None:
        blocks: Any = self.blocks
        blocks = (blocks,) if isinstance(blocks, str) else blocks
        if not isinstance(blocks, list | tuple) or not all(isinstance(block, str) for block in blocks):
            raise UsageError(f"blocks={blocks!r}: names of modules are accepted, like [layer1, layer2].")
        object.__setattr__(self, "blocks", tuple(blocks))
        if not (self.outputs is None or isinstance(self.outputs, str) or callable(self.outputs)):
            raise UsageError(f"outputs={self.outputs!r}: a function, or package.module:function is accepted.")
        check_number("temperature", self.temperature, 1e-3)
        if self.student_temperature is not None:
            check_number("student_temperature", self.student_temperature, 1e-3)
        check_number("block_weight", self.block_weight, 0)
        if self.loss not in tuple(LOSSES):  # a list has no hash
            raise unknown("loss", str(self.loss), LOSSES)

    def reading(self, problem: Problem) -> State:
        """The part of a state that `loss_of` goes by."""
        _check_blocks(problem.model, self.blocks)
        repeat = not self.blocks and not any_process(not problem.inputs().repeats())
        return {"step": 0, "repeat": repeat, "teacher": []}

    def loss_of(
        self, problem: Problem, state: State, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> tuple[float, dict[str, Tensor], int]:
        """(L of the net with `tensors` in place on the state's next batch, its gradients, samples pushed forward).

        Args:
            tensors: of those that require gradients, dL / d tensor is returned, by name; without those that L does
                not depend on.
            masks: of tensors that are masked where the model uses them; gradients are at every entry. Not for
                compiled models.
        Raises:
            AllotError: the loss is not finite.
            UsageError: outputs that the loss cannot read or that carry no gradients, or a batch too small for batch
                norm.
        """
        calibration = problem.inputs()
        positions = calibration.positions(state["step"])
        own = calibration.share(positions)
        inputs = calibration.pick(own)
        pieces = problem.compute.pieces(len(own))
        teacher, wholes, forward = self._taught(problem, state, inputs, positions, pieces)
        leaves = {name: value.detach().requires_grad_() for name, value in tensors.items() if value.requires_grad}
        known = {name: (leaves[name], mask) for name, mask in (masks or {}).items() if name in leaves}
        masking = Masking(known, recompute=not problem.compute.checkpoint) if known else None
        placed = {**tensors, **leaves, **(masking.placed if masking else {})}
        batch = _Batch(inputs, pieces, teacher, wholes, placed, leaves, masking)
        try:
            learn = partial(self._learned, problem, state, batch)
            loss = _in_range(problem, state, batch, learn) if problem.compute.amp == "fp16" else learn()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"no batch statistics from {len(positions)} samples: {error}. Use a larger batch_size."
            ) from error
        if len(pieces) > 1:
            forward += len(positions) * (any(map(is_batch_norm, problem.model.modules())) + bool(self.blocks))
        if masking and any_process(masking.missed):
            raise Unseen
        if world_size() > 1:  # a weight that no sample of this process reaches may be reached elsewhere
            for leaf in leaves.values():
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return all_reduce_number(loss), dict(zip(found, all_reduce(list(found.values())), strict=True)), forward

    def _learned(self, problem: Problem, state: State, batch: _Batch) -> float:
        """What this process's pieces add to L; their gradients add up in the leaves."""
        model, parts, known, losses = problem.model, len(batch.pieces), None, 0.0
        how: dict[str, Any] = {"compute": problem.compute, "masking": batch.masking}
        if parts > 1 and any(map(is_batch_norm, model.modules())):
            with torch.no_grad():
                whole = Norms()
                call(model, batch.placed, batch.inputs, training=is_batch_norm, norms=whole, **how)
            known = whole.seen
        counted = {n: v.clone() for n, v in batch.placed.items() if parts > 1 and n.endswith("num_batches_tracked")}
        for piece, (outputs, dense_blocks) in zip(batch.pieces, batch.teacher, strict=True):
            part = cut(batch.inputs, *piece) if parts > 1 else batch.inputs
            if self.blocks and parts > 1:
                _, dense_blocks = self._answers(problem, part)
            blocks: list[Tensor] = []
            grad = partial(self._gradients, state, batch.learning, outputs, blocks, dense_blocks, batch.wholes)
            with torch.enable_grad(), _watched(model, self.blocks, blocks):
                norms = None if known is None else Norms(known)
                losses += call(model, batch.placed, part, training=is_batch_norm, norms=norms, **how, then=grad)
        for name, count in counted.items():  # the whole batch counts, not its pieces
            batch.placed[name].copy_(count)
        return losses

    def _gradients(
        self,
        state: State,
        leaves: list[Tensor],
        teacher: list[Tensor],
        blocks: list[Tensor],
        dense_blocks: list[Tensor],
        wholes: list[float] | None,
        output: Any,
    ) -> float:
        """What a piece of a batch adds to L; its gradients are added to those of the leaves, in place."""
        loss = self._compared(self._read(output), teacher, wholes and wholes[: len(teacher)])
        of_blocks = wholes[len(teacher) :] if wholes else [None] * len(blocks)
        for ours, theirs, whole in zip(blocks, dense_blocks, of_blocks, strict=True):
            loss = loss + self.block_weight * relative_error(ours, theirs, whole)
        if not loss.requires_grad:
            raise UsageError("the model's outputs carry no gradients: take no_grad and detach out of its forward.")
        check_finite(loss, state["step"])
        if leaves:
            torch.autograd.backward(loss * state.get("loss_scale", 1.0), inputs=leaves)
        return float(loss.detach())

    def _taught(
        self, problem: Problem, state: State, inputs: Any, positions: list[int], pieces: list[tuple[int, int]]
    ) -> tuple[list[Answers], list[float] | None, int]:
        """What the dense net answers to each piece, the whole batch's sizes by tensor (`compared`), samples pushed."""
        own = problem.inputs().share(positions)
        pushed = 0
        if tables := recalled(problem, state):
            device = problem.inputs().device
            answers: list[Answers] = [
                ([table[own[start:stop]].to(device) for table in tables], []) for start, stop in pieces
            ]
        else:
            parts = [cut(inputs, *piece) for piece in pieces] if len(pieces) > 1 else [inputs]
            answers = [self._answers(problem, part) for part in parts]
            probed = self._probe(problem, state, answers[0][0], own, pieces[0][1])
            keep(problem, state, [said for said, _ in answers], pieces, positions)
            pushed = len(positions) + probed
        forward = len(positions) + pushed
        if len(pieces) == world_size() == 1:
            return answers, None, forward
        sizes = torch.tensor(
            [[size(t, self.loss) for t in outputs] + [size(t, "mse") for t in blocks] for outputs, blocks in answers],
            dtype=torch.float64,
        )
        if len(pieces) > 1:
            answers = [(outputs, []) for outputs, _ in answers]  # blocks are large: they are looked at once more
        return answers, all_reduce([sizes.sum(0)])[0].tolist(), forward

    def _answers(self, problem: Problem, inputs: Any) -> Answers:
        blocks: list[Tensor] = []
        with torch.no_grad(), _watched(problem.model, self.blocks, blocks):
            return self._read(call(problem.model, {}, inputs, compute=problem.compute)), blocks

    def judge(
        self,
        problem: Problem,
        tensors: Mapping[str, Tensor],
        k: int,
        teacher: list[Tensor] | None = None,
        *,
        batch_statistics: bool = False,
    ) -> tuple[float, list[Tensor], int]:
        """(L of the net with `tensors` in place, the dense net's outputs, samples pushed) on batch k, in eval mode.

        Args:
            teacher: the dense net's outputs, where they are known.
            batch_statistics: whether batch norms of the net with `tensors` normalise by the batch.
        Raises:
            AllotError: the loss is not finite.
        """
        with single_process(), torch.no_grad():  # allocations are tried by one process each
            inputs, samples = problem.inputs().batch(k)
            pushed = samples
            if teacher is None:
                pushed += samples
                teacher = self._read(call(problem.model, {}, inputs))
            own = call(problem.model, tensors, inputs, training=is_batch_norm if batch_statistics else None)
            loss = self._compared(self._read(own), teacher)
        check_finite(loss, k)
        return float(loss), teacher, pushed

    def _read(self, output: Any) -> list[Tensor]:
        return compared_tensors(output, self.outputs, self.loss)

    def _probe(self, problem: Problem, state: State, teacher: list[Tensor], batch: list[int], piece: int) -> int:
        """Keep no table of outputs whose first dimension counts the places of a sequence; samples pushed for that.

        Logits [B, classes] need no look: only in three dimensions or more may as many places as samples go unnoticed.
        """
        if state["step"] or not state["repeat"] or all(tensor.dim() < 3 for tensor in teacher):
            return 0
        few = batch[: 2 if piece != 2 else 1]  # another number than there are in a piece
        with torch.no_grad():
            outputs = self._read(call(problem.model, {}, problem.inputs().pick(few)))
        state["repeat"] = not any_process(any(tensor.shape[:1] != (len(few),) for tensor in outputs))
        return len(few) * world_size()

    def _compared(self, student: list[Tensor], teacher: list[Tensor], wholes: list[float] | None = None) -> Tensor:
        T = self.temperature
        T_s = T if self.student_temperature is None else self.student_temperature
        return compared(student, teacher, self.loss, T, T_s, wholes)


class Unseen(Exception):
    """The model uses a weight in a way that no mask reaches, like a function of its own with gradients of its own."""


@dataclass(frozen=True)
class _Batch:
    """This process's share of a batch, in pieces, and what it is pushed through."""

    inputs: Any
    pieces: list[tuple[int, int]]
    teacher: list[Answers]  # of each piece
    wholes: list[float] | None
    placed: dict[str, Tensor]
    leaves: dict[str, Tensor]  # those of them that learn; their gradients add up in place
    masking: Masking | None

    @property
    def learning(self) -> list[Tensor]:
        """All that gradients are wanted of."""
        return [*self.leaves.values(), *(self.masking.placed.values() if self.masking else ())]


def _in_range(problem: Problem, state: State, batch: _Batch, learn: Callable[[], float]) -> float:
    """What `learn` gives, with a factor on the loss that keeps its gradients within fp16; they are divided by it.

    Where one overflows, the batch is done again with half the factor, so that no step is lost; the factor is part of
    the state, and doubles after `SCALES[1]` finite steps.

    Raises:
        AllotError: gradients are not finite even without a factor.
    """
    state.setdefault("loss_scale", SCALES[0])
    state.setdefault("finite", 0)
    running = {name: batch.placed[name] for name in statistics(problem.model) if name in batch.placed}
    before = {name: tensor.clone() for name, tensor in running.items()}
    while True:
        loss = learn()
        found = [leaf.grad for leaf in batch.leaves.values() if leaf.grad is not None]
        finite = [bool(gradient.isfinite().all()) for gradient in found]
        if not any_process(not all(finite)):
            for gradient in found:
                gradient.div_(state["loss_scale"])
            state["finite"] += 1
            if state["finite"] % SCALES[1] == 0:
                state["loss_scale"] *= 2
            return loss
        state |= {"loss_scale": state["loss_scale"] / 2, "finite": 0}
        if state["loss_scale"] < 1:
            raise AllotError(f"gradients overflow fp16 in step {state['step']}: use amp=bf16, or none.")
        for name, tensor in running.items():
            tensor.copy_(before[name])
        for leaf in batch.leaves.values():
            leaf.grad = None


def check_finite(loss: Tensor, step: int) -> None:
    """Raises:
    AllotError: the loss is nan or infinite.
    """
    if not bool(torch.isfinite(loss)):
        raise AllotError(f"the loss is {float(loss.detach())} in step {step}: lower learning_rate.")


def statistics(model: nn.Module) -> Iterator[str]:
    """Names of the buffers of batch norms."""
    own = dict(model.named_buffers())
    for name, module in model.named_modules():
        if is_batch_norm(module):
            yield from (buffer for buffer, _ in module.named_buffers(prefix=name, recurse=False) if buffer in own)


def _check_blocks(model: nn.Module, blocks: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in blocks:
        if not fnmatch.filter(names, pattern):
            raise unknown("module in blocks", pattern, names)


@contextmanager
def _watched(model: nn.Module, blocks: tuple[str, ...], seen: list[Tensor]) -> Iterator[None]:
    """While open, outputs of the modules that match are appended to `seen`, in the order in which they come."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor) and first.is_floating_point() and not is_second_run():
            seen.append(first)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in blocks):
                stack.enter_context(hooked(module, hook))
        yield
