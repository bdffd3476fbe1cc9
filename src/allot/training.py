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
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.adam import adam

from allot.errors import AllotError, UsageError, check_number, unknown
from allot.masks import call, masked
from allot.observe import hooked
from allot.run import Candidate, Evidence, Problem, scored
from allot.store import State

CACHED_BYTES = 64 * 2**20  # of teacher outputs; they are part of the saved state

Outputs = Callable[[Any], Any]


@dataclass(frozen=True)
class Training:
    """How weights are trained; frozen hyperparameters and functions of a state.

    Args:
        steps: batches, 1 or more.
        learning_rate: peak step of Adam, as a share of each tensor's root mean square.
        temperature: T of the KL loss, above 0.
        loss: "kl" on logits: over the last dimension of `[B, classes]` and `[B, T, classes]`, over dimension 1 of
            `[B, classes, H, W]`; or "mse": squared error over the mean square of the dense net's output.
        outputs: what of the model's output is compared: a function `output -> tensors` (a tensor, or a tuple, list or
            dict of them), or its place as text, "package.module:function". None: the output itself, or its `.logits`.
        blocks: names of modules, globs allowed, whose outputs are compared as well, by squared error.
        block_weight: of these terms, each.
    Raises:
        UsageError: a value out of its range.
    """

    steps: int = 250
    learning_rate: float = 0.05
    temperature: float = 2.0
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
        check_number("steps", self.steps, 1, whole=True)
        check_number("temperature", self.temperature, 1e-3)
        for name in ("learning_rate", "block_weight"):
            check_number(name, getattr(self, name), 0)
        if self.loss not in tuple(LOSSES):  # a list has no hash
            raise unknown("loss", str(self.loss), LOSSES)

    def begin(self, problem: Problem, candidate: Candidate) -> State:
        """The state before the first step: copies of what will change, in float32 where the model has less."""
        calibration = problem.inputs()
        tensors: dict[str, Tensor] = {}
        for name in trained(problem):
            value = candidate.tensors.get(name, problem.dense[name])
            tensors[name] = _wide(value).clone()
        for name in _statistics(problem.model):
            tensors[name] = candidate.tensors.get(name, problem.dense[name]).clone()
        _check_blocks(problem.model, self.blocks)
        first = calibration.positions(0)
        repeat = not self.blocks and _same(calibration.pick(first), calibration.pick(first))
        return {
            "step": 0,
            "steps": self.steps,
            "tensors": tensors,
            "mean": {name: torch.zeros_like(tensors[name]) for name in trained(problem)},
            "square": {name: torch.zeros_like(tensors[name]) for name in trained(problem)},
            "scale": {name: _scale(tensors[name]) for name in trained(problem)},
            "repeat": repeat,
            "teacher": [],
        }

    def select(self, problem: Problem, state: State, evidence: Evidence, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Layer -> mask of the `kept` best-scored of its current weights."""
        return {
            layer.name: problem.pattern.mask(
                layer, scored(problem, layer, state["tensors"][layer.name], evidence), kept[layer.name]
            )
            for layer in problem.scope
        }

    def loss_of(self, problem: Problem, state: State, tensors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """(L of the net with `tensors` in place on the state's next batch, samples pushed forward).

        Raises:
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
        with _watched(problem.model, self.blocks, blocks):
            try:
                output = call(problem.model, tensors, inputs, training=lambda module: isinstance(module, _BatchNorm))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    f"no batch statistics from {len(positions)} samples: {error}. Use a larger batch_size."
                ) from error
        loss = self._compared(self._read(output), teacher)
        for ours, theirs in zip(blocks, dense_blocks, strict=True):
            loss = loss + self.block_weight * _relative_error(ours, theirs, 1.0)
        if not loss.requires_grad:
            raise UsageError("the model's outputs carry no gradients: take no_grad and detach out of its forward.")
        return loss, len(positions) * (1 if known else 2) + probed

    def judge(self, problem: Problem, state: State, masks: Mapping[str, Tensor], k: int) -> tuple[float, int]:
        """(L of the sparse net in eval mode on batch k, samples pushed forward).

        Raises:
            AllotError: the loss is not finite.
        """
        inputs, samples = problem.inputs().batch(k)
        tensors = {
            name: (masked(value, masks[name]) if name in masks else value).to(problem.dense[name].dtype)
            for name, value in state["tensors"].items()
        }
        with torch.no_grad():
            teacher, student = (self._read(call(problem.model, given, inputs)) for given in ({}, tensors))
            loss = self._compared(student, teacher)
        check_finite(loss, state)
        return float(loss), 2 * samples

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
        with torch.enable_grad():
            loss, forward = self.loss_of(problem, state, leaves | buffers)
            check_finite(loss, state)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves, found, strict=True)
        gradients = {name: gradient.to(tensors[name].dtype) for name, gradient in pairs if gradient is not None}
        samples = len(problem.inputs().positions(state["step"]))
        return gradients, {"loss": float(loss.detach()), "forward": forward, "backward": samples}

    def update(self, state: State, gradients: Mapping[str, Tensor]) -> None:
        """One step of Adam on the state's tensors, in place."""
        t = state["step"]
        lr = self.learning_rate * warm_cosine(t, self.steps)
        for name, gradient in gradients.items():
            adam(
                [state["tensors"][name]],
                [gradient],
                [state["mean"][name]],
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
        outputs = self.outputs
        if isinstance(outputs, str):
            try:
                outputs = pkgutil.resolve_name(outputs)
            except (ImportError, AttributeError, ValueError) as error:
                raise UsageError(f"outputs={self.outputs!r}: {error}; package.module:function is accepted.") from error
            if not callable(outputs):
                raise UsageError(f"outputs={self.outputs!r} is no function: package.module:function is accepted.")
        found = _flat(outputs(output) if callable(outputs) else getattr(output, "logits", output), given=outputs)
        if self.loss == "kl" and any(tensor.dim() < 2 or tensor.shape[_classes(tensor)] < 2 for tensor in found):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in found)
            raise UsageError(f"the kl loss needs logits [B, classes] of two or more classes, not {shapes}: use mse.")
        return found

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
        pairs = zip(student, teacher, strict=True)
        return torch.stack([LOSSES[self.loss](ours, theirs, self.temperature) for ours, theirs in pairs]).sum()


@dataclass(frozen=True)
class Schedule:
    """When masks are selected again while weights train, and how much room the budget has on the way.

    In step t of T the budget is `Budget.widened(1 + (ramp - 1) (1 - t / (ramp_until T))^3)`, from ramp_until T on the
    budget itself. Masks change every `every` steps until step `freeze_at` T, the last one included.

    Args:
        every: steps, 1 or more.
        freeze_at: from 0 (masks are selected before the first step only) to 1, a share of the steps.
        ramp: how many times the budget may be used at first, 1 or more.
        ramp_until: share of the steps, from 0 to 1.
    Raises:
        UsageError: a value out of its range.
    """

    every: int = 5
    freeze_at: float = 0.8
    ramp: float = 1.0
    ramp_until: float = 0.6

    def __post_init__(self) -> None:
        check_number("every", self.every, 1, whole=True)
        check_number("ramp", self.ramp, 1)
        for name in ("freeze_at", "ramp_until"):
            check_number(name, getattr(self, name), 0, 1)

    def last(self, steps: int) -> int:
        """The step in which masks change for the last time."""
        return min(math.floor(self.freeze_at * steps), steps - 1)

    def due(self, t: int, steps: int) -> bool:
        """Whether masks are selected before step t."""
        return t == self.last(steps) or (t % self.every == 0 and t < self.last(steps))

    def factor(self, t: int, steps: int) -> float:
        """How many times the budget may be used in step t; it changes where masks do."""
        end = self.ramp_until * steps
        t = t - t % self.every if t < self.last(steps) else t
        return 1.0 if t >= min(end, self.last(steps)) else 1 + (self.ramp - 1) * (1 - t / end) ** 3


def warm_cosine(t: int, steps: int, warm: int = 10) -> float:
    """Factor on a learning rate in step t of `steps`: linear over the first `warm` steps, cosine to zero."""
    return min(1.0, (t + 1) / warm) * (1 + math.cos(math.pi * t / steps)) / 2


def trained(problem: Problem) -> list[str]:
    """Names of what is trained: every floating-point parameter, frozen ones included."""
    return [name for name, parameter in problem.model.named_parameters() if parameter.is_floating_point()]


def _scale(tensor: Tensor) -> float:
    """Root mean square, what steps are a share of; biases and the like may start at zero and have to move."""
    scale = float(tensor.square().mean().sqrt())
    return max(scale, 1e-3) if tensor.dim() < 2 or not scale else scale


def check_finite(loss: Tensor, state: State) -> None:
    """Raises:
    AllotError: the loss is nan or infinite.
    """
    if not bool(torch.isfinite(loss)):
        raise AllotError(f"the loss is {float(loss.detach())} in step {state['step']}: lower learning_rate.")


def _keep(state: State, teacher: list[Tensor], positions: list[int], samples: int) -> None:
    """Remember the teacher's outputs for these samples, where inputs repeat and there is room."""
    if state["repeat"] and not state["teacher"]:
        size = sum(tensor.numel() * tensor.element_size() for tensor in teacher) / len(positions) * samples
        state["repeat"] = size <= CACHED_BYTES and all(tensor.shape[:1] == (len(positions),) for tensor in teacher)
        if state["repeat"]:
            state["teacher"] = [tensor.new_zeros(samples, *tensor.shape[1:]) for tensor in teacher]
    for table, tensor in zip(state["teacher"], teacher, strict=False):
        table[positions] = tensor


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    dim = _classes(student)
    theirs, ours = ((_wide(z) / temperature).log_softmax(dim) for z in (teacher, student))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim).mean()


def _relative_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    scale = _wide(teacher).square().mean().clamp_min(1e-12)
    return (_wide(student) - _wide(teacher)).square().mean() / scale


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"kl": _kl, "mse": _relative_error}


def _classes(logits: Tensor) -> int:
    return 1 if logits.dim() == 4 else -1


def _flat(output: Any, given: Any) -> list[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        return [output]
    if given is not None and isinstance(output, tuple | list | Mapping) and output:
        parts = output.values() if isinstance(output, Mapping) else output
        return [tensor for part in parts for tensor in _flat(part, given)]
    raise UsageError(
        f"a model output of type {type(output).__name__} cannot be compared: give outputs, a function from it to "
        "floating-point tensors (--set options.METHOD.outputs=package.module:function)."
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, Mapping):
        return all(_same(left[key], right[key]) for key in left)
    return all(map(_same, left, right)) if isinstance(left, tuple) else bool(left == right)


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
