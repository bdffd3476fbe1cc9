"""Network-wise distillation: on calibration inputs the dense net teaches the sparse one by its outputs.

Shared by every method that trains weights. One step, with w the weights as stored (none is zero) and m their masks:

    z = net(w * m)                    batch norms normalise by the batch, everything else is in eval mode
    L = T^2 KL( softmax(z_dense / T) || softmax(z / T) )                 or the squared error, see `Training.loss`
    G = dL / d(w * m)                 at every entry: pruned weights learn too, and can come back
    w <- w - lr_t rms(w_0) Adam(G)    lr_t: ten steps of warm-up, then a cosine to zero

Steps are a share of each tensor's root mean square at the start (as in Adafactor, Shazeer and Stern 2018), so that the
same learning rate does for tensors, and models, of any scale.

All floating-point parameters are trained. The teacher is the same module with its own tensors, in eval mode; its
outputs are kept where the calibration data gives the same inputs again.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.adam import adam

from allot.errors import AllotError, UsageError, check_number, unknown
from allot.losses import LOSSES, Outputs, compared, compared_tensors, relative_error, wide
from allot.masks import call, masked
from allot.observe import hooked
from allot.run import Candidate, Problem
from allot.schedule import Schedule, warm_cosine
from allot.selection import Evidence, scored
from allot.store import State

Select = Callable[[Evidence, Mapping[str, int]], dict[str, Tensor]]
CACHED_BYTES = 64 * 2**20  # of teacher outputs; they are part of the saved state


@dataclass(frozen=True)
class Training:
    """How weights are trained; frozen hyperparameters and functions of a state.

    Args:
        steps: batches, 1 or more.
        learning_rate: peak step of Adam, as a share of each tensor's root mean square; of SGD, in absolute units.
        temperature: T of the KL loss, above 0.
        student_temperature: T_s, see `allot.losses`; None: as `temperature`.
        loss: "kl" on logits: over the last dimension of `[B, classes]` and `[B, T, classes]`, over dimension 1 of
            `[B, classes, H, W]` and more; or "mse": squared error over the mean square of the dense net's output.
        outputs: what of the model's output is compared: a function `output -> tensors` (a tensor, or a tuple, list or
            dict of them), or its place as text, "package.module:function" or "file.py:function". None: the output
            itself, or its `.logits`.
        blocks: names of modules, globs allowed, whose outputs are compared as well, by squared error.
        block_weight: of these terms, each.
        optimizer: "adam"; or "sgd" with momentum 0.9, as papers train.
    Raises:
        UsageError: a value out of its range.
    """

    steps: int = 250
    learning_rate: float = 0.05
    temperature: float = 2.0
    student_temperature: float | None = None
    loss: str = "kl"
    outputs: str | Outputs | None = None
    blocks: tuple[str, ...] = ()
    block_weight: float = 0.1
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        blocks: Any = self.blocks
        blocks = (blocks,) if isinstance(blocks, str) else blocks
        if not isinstance(blocks, list | tuple) or not all(isinstance(block, str) for block in blocks):
            raise UsageError(f"blocks={blocks!r}: names of modules are accepted, like [layer1, layer2].")
        object.__setattr__(self, "blocks", tuple(blocks))
        if not (self.outputs is None or isinstance(self.outputs, str) or callable(self.outputs)):
            raise UsageError(f"outputs={self.outputs!r}: a function, or package.module:function is accepted.")
        check_number("steps", self.steps, 1, whole=True)
        check_number("temperature", self.temperature, 1e-3)
        if self.student_temperature is not None:
            check_number("student_temperature", self.student_temperature, 1e-3)
        for name in ("learning_rate", "block_weight"):
            check_number(name, getattr(self, name), 0)
        if self.loss not in tuple(LOSSES):  # a list has no hash
            raise unknown("loss", str(self.loss), LOSSES)
        if self.optimizer not in ("adam", "sgd"):
            raise unknown("optimizer", str(self.optimizer), ("adam", "sgd"))

    def begin(self, problem: Problem, candidate: Candidate) -> State:
        """The state before the first step: copies of what will change, in float32 where the model has less."""
        tensors: dict[str, Tensor] = {}
        for name in trained(problem):
            value = candidate.tensors.get(name, problem.dense[name])
            tensors[name] = wide(value).clone()
        for name in _statistics(problem.model):
            tensors[name] = candidate.tensors.get(name, problem.dense[name]).clone()
        return {
            **self.reading(problem),
            "tensors": tensors,
            "mean": {name: torch.zeros_like(tensors[name]) for name in trained(problem)},
            "square": {name: torch.zeros_like(tensors[name]) for name in trained(problem)},
            "scale": {name: _scale(tensors[name]) for name in trained(problem)},
        }

    def reading(self, problem: Problem) -> State:
        """The part of the state that `loss_of` goes by: enough where no weights are trained."""
        _check_blocks(problem.model, self.blocks)
        repeat = not self.blocks and problem.inputs().repeats()
        return {"step": 0, "steps": self.steps, "repeat": repeat, "teacher": []}

    def select(self, problem: Problem, state: State, evidence: Evidence, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Layer -> mask of the `kept` best-scored of its current weights."""
        return {
            layer.name: problem.pattern.mask(
                layer, scored(problem, layer, state["tensors"][layer.name], evidence), kept[layer.name]
            )
            for layer in problem.scope
        }

    def loss_of(
        self, problem: Problem, state: State, tensors: Mapping[str, Tensor], then: Callable[[Tensor], Any]
    ) -> tuple[Any, int]:
        """(`then` of L of the net with `tensors` in place on the state's next batch, samples pushed forward).

        Args:
            then: takes the gradients, while the tensors are in place.
        Raises:
            AllotError: the loss is not finite.
            UsageError: outputs that the loss cannot read or that carry no gradients, or a batch too small for batch
                norm.
        """
        calibration = problem.inputs()
        positions = calibration.positions(state["step"])
        inputs = calibration.pick(positions)
        dense_blocks: list[Tensor] = []
        known = state["repeat"] and state["step"] >= calibration.batches
        probed = 0
        if known:
            teacher = [table[positions] for table in state["teacher"]]
        else:
            with torch.no_grad(), _watched(problem.model, self.blocks, dense_blocks):
                teacher = self._read(call(problem.model, {}, inputs))
            probed = self._probe(problem, state, teacher, positions)
            _keep(state, teacher, positions, len(calibration))
        blocks: list[Tensor] = []

        def compare(output: Any) -> Any:
            loss = self._compared(self._read(output), teacher)
            for ours, theirs in zip(blocks, dense_blocks, strict=True):
                loss = loss + self.block_weight * relative_error(ours, theirs)
            if not loss.requires_grad:
                raise UsageError("the model's outputs carry no gradients: take no_grad and detach out of its forward.")
            check_finite(loss, state["step"])
            return then(loss)

        with _watched(problem.model, self.blocks, blocks):
            try:
                found = call(problem.model, tensors, inputs, training=_is_norm, then=compare)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    f"no batch statistics from {len(positions)} samples: {error}. Use a larger batch_size."
                ) from error
        return found, len(positions) * (1 if known else 2) + probed

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
        inputs, samples = problem.inputs().batch(k)
        pushed = samples
        with torch.no_grad():
            if teacher is None:
                pushed += samples
                teacher = self._read(call(problem.model, {}, inputs))
            own = call(problem.model, tensors, inputs, training=_is_norm if batch_statistics else None)
            loss = self._compared(self._read(own), teacher)
        check_finite(loss, k)
        return float(loss), teacher, pushed

    def gradients(
        self, problem: Problem, state: State, masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float | int]]:
        """(G of every trained tensor at the masked weights, metrics of the step): see the top of this file.

        Raises:
            AllotError: the loss is not finite.
            UsageError: as `loss_of`.
        """
        dense, tensors = problem.dense, state["tensors"]
        leaves = {}
        for name in state["mean"]:
            value = masked(tensors[name], masks[name]) if name in masks else tensors[name]
            leaves[name] = value.to(dense[name].dtype).detach().requires_grad_()
        buffers = {name: value for name, value in tensors.items() if name not in leaves}

        def grad(loss: Tensor) -> tuple[float, tuple[Tensor | None, ...]]:
            return float(loss.detach()), torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)

        with torch.enable_grad():
            (loss, found), forward = self.loss_of(problem, state, leaves | buffers, grad)
        pairs = zip(leaves, found, strict=True)
        gradients = {name: gradient.to(tensors[name].dtype) for name, gradient in pairs if gradient is not None}
        samples = len(problem.inputs().positions(state["step"]))
        return gradients, {"loss": loss, "forward": forward, "backward": samples}

    def update(self, state: State, gradients: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """One step on the state's tensors, in place.

        Args:
            scale: factor on the loss. Adam does not see it in a gradient, so it is a factor on the step.
        """
        t = state["step"]
        lr = scale * self.learning_rate * warm_cosine(t, self.steps)
        for name, gradient in gradients.items():
            value, mean = state["tensors"][name], state["mean"][name]
            if self.optimizer == "sgd":
                mean.mul_(0.9).add_(gradient)
                value.sub_(lr * mean)
                continue
            adam(
                [value],
                [gradient],
                [mean],
                [state["square"][name]],
                [],
                [torch.tensor(float(t))],
                amsgrad=False,
                beta1=0.9,
                beta2=0.99,
                lr=lr * state["scale"][name],
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
        state["step"] = t + 1

    def tensors(self, problem: Problem, candidate: Candidate, state: State) -> dict[str, Tensor]:
        """The candidate's tensors after training, in the dtypes of the model; only what differs from it."""
        found = dict(candidate.tensors)
        for name, value in state["tensors"].items():
            value = value.to(problem.dense[name].dtype)
            if name in found or not torch.equal(value, problem.dense[name]):
                found[name] = value
        return found

    def _read(self, output: Any) -> list[Tensor]:
        return compared_tensors(output, self.outputs, self.loss)

    def _probe(self, problem: Problem, state: State, teacher: list[Tensor], batch: list[int]) -> int:
        """Keep no table of outputs whose first dimension counts the places of a sequence; samples pushed for that.

        Logits [B, classes] need no look: only in three dimensions or more may as many places as samples go unnoticed.
        """
        if state["step"] or not state["repeat"] or all(tensor.dim() < 3 for tensor in teacher):
            return 0
        few = batch[: min(2, len(batch) - 1)] or batch  # fewer than a batch
        with torch.no_grad():
            outputs = self._read(call(problem.model, {}, problem.inputs().pick(few)))
        state["repeat"] = all(tensor.shape[:1] == (len(few),) for tensor in outputs)
        return len(few)

    def _compared(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        T = self.temperature
        return compared(
            student, teacher, self.loss, T, T if self.student_temperature is None else self.student_temperature
        )


def distil(
    training: Training,
    schedule: Schedule,
    problem: Problem,
    candidate: Candidate,
    state: State,
    *,
    select: Select | None = None,
    scale: float = 1.0,
) -> dict[str, float | int]:
    """Metrics of one step that keeps what `candidate` allocates, in place: masks where they are due, then weights.

    Args:
        state: {"training": of `Training.begin`, "masks": layer -> mask, "squares": of `Evidence`}.
        select: (evidence, kept by layer) -> masks; None: the best-scored of the current weights.
        scale: as in `Training.update`.
    """
    own = state["training"]
    t, T = own["step"], training.steps
    evidence = Evidence(problem, candidate, state["squares"])
    if problem.scope.groups:
        state["masks"] = dict(candidate.masks)  # channels are selected once: a wider budget would move them all
    elif schedule.due(t, T):
        kept = problem.budget.widened(schedule.factor(t, T)).counts(candidate.allocation)
        state["masks"] = select(evidence, kept) if select else training.select(problem, own, evidence, kept)
    gradients, metrics = training.gradients(problem, own, state["masks"])
    training.update(own, gradients, scale=scale)
    return metrics | {"forward": metrics["forward"] + evidence.forward}


def trained(problem: Problem) -> list[str]:
    """Names of what is trained: every floating-point parameter, frozen ones included."""
    return [name for name, parameter in problem.model.named_parameters() if parameter.is_floating_point()]


def _scale(tensor: Tensor) -> float:
    """Root mean square, what steps are a share of; biases and the like may start at zero and have to move."""
    scale = float(tensor.square().mean().sqrt())
    return max(scale, 1e-3) if tensor.dim() < 2 or not scale else scale


def check_finite(loss: Tensor, step: int) -> None:
    """Raises:
    AllotError: the loss is nan or infinite.
    """
    if not bool(torch.isfinite(loss)):
        raise AllotError(f"the loss is {float(loss.detach())} in step {step}: lower learning_rate.")


def _keep(state: State, teacher: list[Tensor], positions: list[int], samples: int) -> None:
    """Remember the teacher's outputs for these samples, where inputs repeat and there is room."""
    if state["repeat"] and not state["teacher"]:
        size = sum(tensor.numel() * tensor.element_size() for tensor in teacher) / len(positions) * samples
        state["repeat"] = size <= CACHED_BYTES and all(tensor.shape[:1] == (len(positions),) for tensor in teacher)
        if state["repeat"]:
            state["teacher"] = [tensor.new_zeros(samples, *tensor.shape[1:]) for tensor in teacher]
    if any(table.shape[1:] != tensor.shape[1:] for table, tensor in zip(state["teacher"], teacher, strict=False)):
        state |= {"repeat": False, "teacher": []}  # samples of several shapes
    for table, tensor in zip(state["teacher"], teacher, strict=False):
        table[positions] = tensor


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)


def _statistics(model: nn.Module) -> Iterator[str]:
    own = dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
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
        if isinstance(first, Tensor) and first.is_floating_point():
            seen.append(first)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in blocks):
                stack.enter_context(hooked(module, hook))
        yield
