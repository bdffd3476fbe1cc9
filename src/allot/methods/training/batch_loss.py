"""The loss of the sparse net against the dense one, its teacher, on a batch of calibration inputs, and its gradients.

A batch may be in pieces: micro-batches that follow one another, and shares of several processes. Losses and gradients
of all pieces add up to those of the whole batch; for batch norms see `allot.network.batch_norms`.

The teacher's answers are kept from pass to pass where inputs repeat: tables `[samples, ...]` on the CPU, which the
first pass over the samples fills.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import NotFinite, UsageError, check_number, unknown
from allot.methods.training.losses import compared, relative_error, size
from allot.network.applied_masks import Masking
from allot.network.batch_norms import Norms
from allot.network.call import call
from allot.network.checkpointing import is_second_run
from allot.network.hooks import hooked
from allot.network.layers import is_batch_norm
from allot.processes import all_gather_object, all_reduce, all_reduce_number, any_process, single_process, world_size
from allot.run.calibration import cut
from allot.run.outputs import Comparison, Outputs, Reading
from allot.run.problem import Problem
from allot.run.store import State

Answers = tuple[list[Tensor], list[Tensor]]  # the tensors that are compared, of the outputs and of blocks
Kept = dict[str, list[Tensor]] | None  # batch -> the dense net's outputs on it; None: outputs are not kept
SCALES = 2.0**16, 200  # of the loss in fp16: the first one, and after how many finite steps it doubles


@dataclass(frozen=True)
class Distance:
    """How outputs are compared; frozen hyperparameters and functions of a state.

    Args:
        temperature: T of the KL loss, above 0.
        student_temperature: T_s, see `allot.methods.training.losses`; None: as `temperature`.
        loss: "kl" on logits or probabilities: over the last dimension of `[B, classes]` and `[B, T, classes]`, over
            dimension 1 of `[B, classes, H, W]` and more; or "mse": squared error over the mean square of the dense
            net's output. None: as the run compares outputs (`allot.run.outputs.Comparison`).
        outputs: which tensors of the model's output are compared, as in `Comparison`; None: those of the run.
        blocks: names of modules, globs allowed, whose outputs are compared as well, by squared error.
        block_weight: of these terms, each.
    Raises:
        UsageError: a value out of its range.
    State:
        repeat: whether the teacher's answers are kept.
        teacher: these, `[samples, ...]` for each tensor that is compared; none before the first pass began.
        loss_scale: in fp16, the current factor on the loss.
        finite: in fp16, how many steps in a row had finite gradients.
    """

    temperature: float = 2.0
    student_temperature: float | None = None
    loss: str | None = None
    outputs: str | Outputs | None = None
    blocks: tuple[str, ...] = ()
    block_weight: float = 0.1

    def __post_init__(self) -> None:
        blocks: Any = self.blocks
        blocks = (blocks,) if isinstance(blocks, str) else blocks
        if not isinstance(blocks, list | tuple) or not all(isinstance(block, str) for block in blocks):
            raise UsageError(f"blocks={blocks!r}: names of modules are accepted, like [layer1, layer2].")
        object.__setattr__(self, "blocks", tuple(blocks))
        Comparison(self.outputs, self.loss)  # checks both
        check_number("temperature", self.temperature, 1e-3)
        if self.student_temperature is not None:
            check_number("student_temperature", self.student_temperature, 1e-3)
        check_number("block_weight", self.block_weight, 0)

    def reading(self, problem: Problem) -> State:
        """The part of a state that `loss_of` reads."""
        names = [name for name, _ in problem.model.named_modules() if name]
        for pattern in self.blocks:
            if not fnmatch.filter(names, pattern):
                raise unknown("module in blocks", pattern, names)
        repeat = not self.blocks and not any_process(not problem.inputs().repeats())
        return {"step": 0, "repeat": repeat, "teacher": []}

    def loss_of(
        self, problem: Problem, state: State, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> tuple[float, dict[str, Tensor], int]:
        """(L of the net with `tensors` in place on the state's next batch, its gradients, samples pushed forward).

        Args:
            tensors: dL / d tensor is returned, by name, of the tensors that require gradients and that L depends on.
            masks: of tensors that are masked where the model uses them; gradients are at every entry. Not for
                compiled models.
        Raises:
            NotFinite: the loss is not finite.
            UsageError: outputs that the loss cannot read or that carry no gradients, or a batch too small for batch
                norm.
        """
        calibration = problem.inputs()
        positions = calibration.positions(state["step"])
        share = calibration.share(positions)
        inputs = calibration.pick(share)
        pieces = problem.compute.pieces(len(share))
        teacher, wholes, forward = self._teacher_answers(problem, state, inputs, positions, pieces)
        leaves = {name: value.detach().requires_grad_() for name, value in tensors.items() if value.requires_grad}
        pairs = {name: (leaves[name], mask) for name, mask in (masks or {}).items() if name in leaves}
        masking = Masking(pairs, recompute=not problem.compute.checkpoint) if pairs else None
        placed = {**tensors, **leaves, **(masking.placed if masking else {})}
        batch = _Batch(self._reading(problem), inputs, pieces, teacher, wholes, placed, leaves, masking)
        try:
            learn = partial(self._loss_of_pieces, problem, state, batch)
            loss = _within_fp16(problem, state, batch, learn) if problem.compute.amp == "fp16" else learn()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"no batch statistics from {len(positions)} samples: {error}. {calibration.for_more}."
            ) from error
        if len(pieces) > 1:
            forward += len(positions) * (any(map(problem.in_train_mode, problem.model.modules())) + bool(self.blocks))
        if masking and any_process(masking.missed):
            raise Unseen
        if world_size() > 1:  # a weight that no sample of this process reaches may be reached elsewhere
            for leaf in leaves.values():
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return all_reduce_number(loss), dict(zip(gradients, all_reduce(list(gradients.values())), strict=True)), forward

    def _loss_of_pieces(self, problem: Problem, state: State, batch: _Batch) -> float:
        """The part of L of this process's pieces; their gradients add up in the leaves."""
        model, parts, batch_moments, loss = problem.model, len(batch.pieces), None, 0.0
        how: dict[str, Any] = {"compute": problem.compute, "masking": batch.masking}
        if parts > 1 and any(map(problem.in_train_mode, model.modules())):
            with torch.no_grad():
                whole = Norms()
                call(model, batch.placed, batch.inputs, training=problem.in_train_mode, norms=whole, **how)
            batch_moments = whole.seen
        counted = {n: v.clone() for n, v in batch.placed.items() if parts > 1 and n.endswith("num_batches_tracked")}
        for piece, answers in zip(batch.pieces, batch.teacher, strict=True):
            part = cut(batch.inputs, *piece) if parts > 1 else batch.inputs
            if self.blocks and parts > 1:
                answers = answers[0], self._answers_to(problem, part)[1]
            blocks: list[Tensor] = []
            grad = partial(self._backward, state, batch, answers, blocks)
            with torch.enable_grad(), _block_outputs(model, self.blocks, blocks):
                norms = None if batch_moments is None else Norms(batch_moments)
                loss += call(model, batch.placed, part, training=problem.in_train_mode, norms=norms, **how, then=grad)
        for name, count in counted.items():  # the whole batch counts, not its pieces
            batch.placed[name].copy_(count)
        return loss

    def _backward(self, state: State, batch: _Batch, answers: Answers, blocks: list[Tensor], output: Any) -> float:
        """The part of L of one piece of a batch; its gradients are added to those of the leaves, in place."""
        teacher, dense_blocks = answers
        loss = self._compared(batch.reading, output, teacher, batch.wholes and batch.wholes[: len(teacher)])
        of_blocks = batch.wholes[len(teacher) :] if batch.wholes else [None] * len(blocks)
        for ours, theirs, whole in zip(blocks, dense_blocks, of_blocks, strict=True):
            loss = loss + self.block_weight * relative_error(ours, theirs, whole)
        if not loss.requires_grad:
            raise UsageError("the model's outputs carry no gradients: take no_grad and detach out of its forward.")
        check_finite(loss, state["step"])
        if batch.learning:
            torch.autograd.backward(loss * state.get("loss_scale", 1.0), inputs=batch.learning)
        return float(loss.detach())

    def _teacher_answers(
        self, problem: Problem, state: State, inputs: Any, positions: list[int], pieces: list[tuple[int, int]]
    ) -> tuple[list[Answers], list[float] | None, int]:
        """The dense net's answers to each piece, the whole batch's sizes by tensor (`compared`), samples pushed."""
        share = problem.inputs().share(positions)
        forward = len(positions)
        if tables := _full_tables(problem, state):
            device = problem.inputs().device
            answers: list[Answers] = [
                ([table[share[start:stop]].to(device) for table in tables], []) for start, stop in pieces
            ]
        else:
            parts = [cut(inputs, *piece) for piece in pieces] if len(pieces) > 1 else [inputs]
            answers = [self._answers_to(problem, part) for part in parts]
            forward += len(positions) + self._probe(problem, state, answers[0][0], share, pieces[0][1])
            _fill_tables(problem, state, [outputs for outputs, _ in answers], pieces, positions)
        if len(pieces) == world_size() == 1:
            return answers, None, forward
        loss = self._reading(problem).loss
        sizes = torch.tensor(
            [[size(t, loss) for t in outputs] + [size(t, "mse") for t in blocks] for outputs, blocks in answers],
            dtype=torch.float64,
        )
        if len(pieces) > 1:
            answers = [(outputs, []) for outputs, _ in answers]  # blocks are large: they are run once more
        return answers, all_reduce([sizes.sum(0)])[0].tolist(), forward

    def _answers_to(self, problem: Problem, inputs: Any) -> Answers:
        reading, blocks = self._reading(problem), list[Tensor]()
        with torch.no_grad(), _block_outputs(problem.model, self.blocks, blocks):
            return reading.tensors(call(problem.model, {}, inputs, compute=problem.compute)), blocks

    def judge(
        self, problem: Problem, tensors: Mapping[str, Tensor], k: int, answers: Kept, *, batch_statistics: bool = False
    ) -> tuple[float, int]:
        """(L of the net with `tensors` in place on batch k, in eval mode; samples pushed).

        Args:
            answers: kept from call to call, and filled here.
            batch_statistics: whether batch norms of the net with `tensors` normalise by the batch.
        Raises:
            NotFinite: the loss is not finite.
        """
        with single_process(), torch.no_grad():  # allocations are tried by one process each
            inputs, samples = problem.inputs().batch(k)
            reading, pushed = self._reading(problem), samples
            teacher = None if answers is None else answers.get(str(k))
            if teacher is None:
                pushed += samples
                teacher = reading.tensors(call(problem.model, {}, inputs))
            if answers is not None:
                answers[str(k)] = teacher
            output = call(problem.model, tensors, inputs, training=problem.in_train_mode if batch_statistics else None)
            loss = self._compared(reading, output, teacher)
        check_finite(loss, k)
        return float(loss), pushed

    def _reading(self, problem: Problem) -> Reading:
        return problem.reading(Comparison(self.outputs, self.loss))

    def _probe(self, problem: Problem, state: State, teacher: list[Tensor], batch: list[int], piece: int) -> int:
        """Keep no table of outputs whose first dimension counts the places of a sequence; samples pushed to find out.

        Logits [B, classes] need no probe: only in three dimensions or more may as many places as samples go unnoticed.
        """
        if state["step"] or not state["repeat"] or all(tensor.dim() < 3 for tensor in teacher):
            return 0
        few = batch[: 2 if piece != 2 else 1]  # another number than there are in a piece
        with torch.no_grad():
            outputs = self._reading(problem).tensors(call(problem.model, {}, problem.inputs().pick(few)))
        state["repeat"] = not any_process(any(tensor.shape[:1] != (len(few),) for tensor in outputs))
        return len(few) * world_size()

    def _compared(
        self, reading: Reading, output: Any, teacher: list[Tensor], wholes: list[float] | None = None
    ) -> Tensor:
        T = self.temperature
        T_s = T if self.student_temperature is None else self.student_temperature
        return compared(reading.tensors(output), teacher, reading.loss, T, T_s, wholes)


class Unseen(Exception):
    """The model uses a weight in a way that no mask reaches, like a function of its own with gradients of its own."""


@dataclass(frozen=True)
class _Batch:
    """This process's share of a batch, in pieces, and the tensors of the net that it is pushed through."""

    reading: Reading
    inputs: Any
    pieces: list[tuple[int, int]]
    teacher: list[Answers]  # of each piece
    wholes: list[float] | None
    placed: dict[str, Tensor]
    leaves: dict[str, Tensor]  # the tensors among `placed` that learn; their gradients add up in place
    masking: Masking | None

    @property
    def learning(self) -> list[Tensor]:
        return [*self.leaves.values(), *(self.masking.placed.values() if self.masking else ())]


def _within_fp16(problem: Problem, state: State, batch: _Batch, learn: Callable[[], float]) -> float:
    """The loss that `learn` returns, a factor keeping its gradients within fp16; they are divided by the factor.

    Where one overflows, the batch is done again with half the factor, so that no step is lost; the factor is part of
    the state, and doubles after `SCALES[1]` finite steps.

    Raises:
        NotFinite: gradients are not finite even without a factor.
    """
    state.setdefault("loss_scale", SCALES[0])
    state.setdefault("finite", 0)
    running = {name: batch.placed[name] for name in statistics(problem.model) if name in batch.placed}
    before = {name: tensor.clone() for name, tensor in running.items()}
    while True:
        loss = learn()
        gradients = [leaf.grad for leaf in batch.leaves.values() if leaf.grad is not None]
        finite = [bool(gradient.isfinite().all()) for gradient in gradients]
        if not any_process(not all(finite)):
            for gradient in gradients:
                gradient.div_(state["loss_scale"])
            state["finite"] += 1
            if state["finite"] % SCALES[1] == 0:
                state["loss_scale"] *= 2
            return loss
        state |= {"loss_scale": state["loss_scale"] / 2, "finite": 0}
        if state["loss_scale"] < 1:
            raise NotFinite(f"gradients overflow fp16 in step {state['step']}: use amp=bf16, or none.")
        for name, tensor in running.items():
            tensor.copy_(before[name])
        for leaf in batch.leaves.values():
            leaf.grad = None


def _full_tables(problem: Problem, state: State) -> list[Tensor] | None:
    """The tables of the teacher's answers, where they hold all samples."""
    if not state["repeat"] or state["step"] < problem.inputs().batches:
        return None
    state["teacher"] = [table.cpu() for table in state["teacher"]]  # a state that was loaded may be on a device
    return list(state["teacher"])


def _fill_tables(
    problem: Problem, state: State, answers: list[list[Tensor]], pieces: list[tuple[int, int]], positions: list[int]
) -> None:
    """Keep the answers to these samples, where inputs repeat and the tables fit into `Compute.cached` bytes.

    Args:
        answers: outputs by piece of this process's share of the batch.
    """
    count = len(problem.inputs())
    if state["repeat"] and not state["teacher"]:
        sample_bytes = sum(t.numel() * t.element_size() for outputs in answers for t in outputs) / pieces[-1][1]
        by_sample = all(
            t.shape[:1] == (stop - start,)
            for outputs, (start, stop) in zip(answers, pieces, strict=True)
            for t in outputs
        )
        state["repeat"] = not any_process(sample_bytes * count > problem.compute.cached or not by_sample)
    if not state["repeat"]:
        return
    answers = [[tensor.cpu() for tensor in outputs] for outputs in answers]
    if world_size() > 1:
        answers = [outputs for share in all_gather_object(answers) for outputs in share]
    if not state["teacher"]:
        state["teacher"] = [tensor.new_zeros(count, *tensor.shape[1:]) for tensor in answers[0]]
    shapes = [table.shape[1:] for table in state["teacher"]]
    if any([tensor.shape[1:] for tensor in outputs] != shapes for outputs in answers):
        state |= {"repeat": False, "teacher": []}  # samples of several shapes
        return
    for table, parts in zip(state["teacher"], zip(*answers, strict=True), strict=True):
        table[positions] = torch.cat(parts)


def check_finite(loss: Tensor, step: int) -> None:
    """Raises:
    NotFinite: the loss is nan or infinite.
    """
    if not bool(torch.isfinite(loss)):
        raise NotFinite(f"the loss is {float(loss.detach())} in step {step}: lower learning_rate.")


def statistics(model: nn.Module) -> Iterator[str]:
    """Names of the buffers of batch norms."""
    buffers = dict(model.named_buffers())
    for name, module in model.named_modules():
        if is_batch_norm(module):
            yield from (buffer for buffer, _ in module.named_buffers(prefix=name, recurse=False) if buffer in buffers)


@contextmanager
def _block_outputs(model: nn.Module, blocks: tuple[str, ...], seen: list[Tensor]) -> Iterator[None]:
    """While open, outputs of the modules that match are appended to `seen`, in the order in which they come."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor) and first.is_floating_point() and not is_second_run():
            seen.append(first)

    matching = (m for name, m in model.named_modules() if any(fnmatch.fnmatchcase(name, p) for p in blocks))
    with hooked((module, hook) for module in matching):
        yield
