"""Small models of every kind, and the one way in which a method of `METHODS` is run here, whatever its role."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot import methods
from allot.budget.budget import Budget
from allot.methods.layerwise.blocks import size_of
from allot.methods.layerwise.streamed import Streamed
from allot.methods.layerwise.streamed_block import ModelPart
from allot.methods.training.selection import Selection
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.patterns import Channels, Unstructured
from allot.run.problem import Candidate, Method, Problem
from allot.run.store import Log, State


def convolutions(*, norm: bool = True, reverse: bool = False) -> nn.Module:
    """3x3, depthwise, grouped, 1x1 and linear; `reverse` registers the same layers in the opposite order."""
    return _filled(Convolutions(norm=norm, reverse=reverse))


def chain() -> nn.Module:
    """Linear layers alone."""
    return _filled(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)))


def attention() -> nn.Module:
    """Attention with a residual, and a layer norm."""
    return _filled(Attention())


def tied() -> nn.Module:
    """Two linear layers with one weight, and a third."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return _filled(model)


def recurrent() -> nn.Module:
    """An LSTM, the experts of a mixture, and linear layers around them."""
    return _filled(Recurrent())


def single() -> nn.Module:
    """A layer with one weight among others."""
    return _filled(nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1), nn.Linear(1, 7)))


def convolutions_in_blocks(*, norm: bool = True, reverse: bool = False) -> nn.Module:
    """As `convolutions`; three of its layers are blocks that run one after another."""
    return _filled(ConvolutionsInBlocks(norm=norm, reverse=reverse))


def attention_in_blocks() -> nn.Module:
    """As `attention`, with two blocks."""
    return _filled(AttentionInBlocks())


def recurrent_in_blocks() -> nn.Module:
    """An LSTM and experts, one after the other."""
    return _filled(nn.Sequential(Steps(), Experts(), Steps()))


def tied_in_blocks() -> nn.Module:
    """As `tied`; the two layers with one weight are a block."""
    first = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    first[2].weight = first[0].weight
    return _filled(nn.Sequential(first, nn.Sequential(nn.Linear(6, 3))))


class Convolutions(nn.Module):
    def __init__(self, *, norm: bool, reverse: bool) -> None:
        super().__init__()

        def normed(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norm else nn.Identity()

        parts: dict[str, Callable[[], nn.Module]] = {
            "full": lambda: nn.Conv2d(3, 8, 3, padding=1, bias=not norm),
            "norm1": lambda: normed(8),
            "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False),
            "norm2": lambda: normed(8),
            "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
            "pointwise": lambda: nn.Conv2d(6, 9, 1),
            "norm3": lambda: normed(9),
            "out": lambda: nn.Linear(9, 5),
        }
        for name in reversed(parts) if reverse else parts:
            self.add_module(name, parts[name]())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.full(x)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        x = torch.relu(self.norm3(self.pointwise(torch.relu(self.grouped(x)))))
        return self.out(x.mean((2, 3)))


class ConvolutionsInBlocks(nn.Module):
    def __init__(self, *, norm: bool, reverse: bool) -> None:
        super().__init__()

        def block(conv: nn.Module, channels: int) -> nn.Module:
            return Normed(conv, nn.BatchNorm2d(channels) if norm else nn.Identity(), reverse=reverse)

        depthwise = block(nn.Conv2d(8, 8, 3, groups=8, bias=False), 8)
        grouped, pointwise = block(nn.Conv2d(8, 6, 3, groups=2), 6), block(nn.Conv2d(6, 9, 1), 9)
        parts = {
            "first": block(nn.Conv2d(3, 8, 3, padding=1, bias=not norm), 8),
            "blocks": nn.ModuleList([depthwise, grouped, pointwise]),
            "out": nn.Linear(9, 5),
        }
        for name in reversed(parts) if reverse else parts:
            self.add_module(name, parts[name])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((2, 3)))


class Normed(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module, *, reverse: bool) -> None:
        super().__init__()
        parts = {"conv": conv, "norm": norm}
        for name in reversed(parts) if reverse else parts:
            self.add_module(name, parts[name])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class AttentionInBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(1))


class AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.out(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.experts = nn.Parameter(torch.empty(3, 5, 6))
        self.router, self.out = nn.Linear(5, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(torch.relu(self.into(x)))[0].mean(1)
        y = torch.bmm(h.expand(3, -1, -1), self.experts) * self.router(h).softmax(-1).t()[..., None]
        return self.out(torch.relu(y.sum(0)))


class Steps(nn.Module):
    """A recurrent layer as a block."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(x)[0]


class Experts(nn.Module):
    """Experts, all of which are used, as a block."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.empty(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.bmm(x.flatten(0, 1).expand(3, -1, -1), self.experts)
        return x + torch.relu(y.sum(0)).view(x.shape)


def _filled(model: nn.Module) -> nn.Module:
    """`model` in eval mode with values that depend on names and shapes alone."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
                if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
                    tensor.abs_().add_(0.5)
    return model.eval()


def _changed(change: Callable[[Tensor], Any], make: Callable[[], nn.Module] = convolutions) -> Callable[[], nn.Module]:
    def changed() -> nn.Module:
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    change(parameter)
        return model

    return changed


def _outlier(weight: Tensor) -> None:
    weight.view(-1)[0] = 1e6


def _dead_rows(weight: Tensor) -> None:
    weight[: len(weight) // 2] = 0


FEW = {
    "steps": 6,
    "first": 6,
    "max_steps": 18,
    "passes": 2,
    "rounds": 6,
    "generations": 2,
    "population": 4,
    "parents": 2,
    "crossovers": 2,
    "mutants": 2,
}


def short(method: Method) -> Method:
    """A method that trains, with fewer steps: 6, two passes over the samples of a case; small populations."""
    changed: dict[str, Any] = {}
    for option in fields(method):
        value = getattr(method, option.name)
        if option.name in FEW and isinstance(value, int):
            changed[option.name] = min(value, FEW[option.name])
        elif is_dataclass(value) or hasattr(value, "role"):
            changed[option.name] = short(value)
        elif isinstance(value, tuple) and value and all(hasattr(part, "role") for part in value):
            changed[option.name] = tuple(map(short, value))
        elif option.name == "starts":
            changed["starts"] = tuple((name, short(start)) for name, start in value)
    return replace(method, **changed)


def by_blocks(method: Method) -> Method:
    """The method as a run has it: one that needs blocks is streamed."""
    return Streamed(method, torch.device("cpu")) if getattr(method, "by_blocks", None) == "needed" else method


ON_CHANNELS = " on channels"
# every method for what it can allocate, repairs that allocate nothing for both; what needs blocks as it is run on them
METHODS = {
    name + suffix: by_blocks(short(method))
    for suffix, shared in (("", "weights"), (ON_CHANNELS, "channels"))
    for name, method in methods.METHODS.items()
    if shared in getattr(method, "allocates", ("weights", "channels") if method.role == "repair" else ("weights",))
}


def needs_blocks(name: str) -> bool:
    return isinstance(METHODS.get(name), Streamed)


@dataclass(frozen=True)
class Case:
    """A net and the shape of its inputs; `in_blocks`: a net like it for methods that need blocks, None: the same."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    in_blocks: Callable[[], nn.Module] | None = None

    def model(self, name: str) -> nn.Module:
        """The net that a method of this name is run on."""
        return self.in_blocks() if self.in_blocks and needs_blocks(name) else self.make()

    def inputs(self, samples: int = 20) -> Tensor:
        return torch.randn(samples, *self.shape, generator=torch.Generator().manual_seed(7))


PICTURE = (3, 7, 7)


def _of_pictures(change: Callable[[Tensor], Any] = lambda weight: None, *, norm: bool = True) -> Case:
    make, in_blocks = (_changed(change, partial(net, norm=norm)) for net in (convolutions, convolutions_in_blocks))
    return Case(make, PICTURE, in_blocks)


CASES = {
    "with batch norm": _of_pictures(),
    "without batch norm": _of_pictures(norm=False),
    "linear chain": Case(chain, (6,)),
    "attention": Case(attention, (5, 8), attention_in_blocks),
    "tied weights": Case(tied, (6,), tied_in_blocks),
    "a layer with one weight": Case(single, (6,)),
    "recurrent, and experts": Case(recurrent, (5, 4), recurrent_in_blocks),
    "zero weights": _of_pictures(torch.zero_),
    "zero weights without batch norm": _of_pictures(torch.zero_, norm=False),
    "equal weights": _of_pictures(lambda weight: weight.fill_(0.5)),
    "weights above 1": _of_pictures(lambda weight: weight.mul_(30)),
    "tiny weights": Case(_changed(lambda weight: weight.mul_(1e-12), chain), (6,)),
    "one huge outlier": _of_pictures(_outlier),
    "dead channels": _of_pictures(_dead_rows, norm=False),
}


WITHOUT_CHANNELS = ("tied weights", "a layer with one weight", "recurrent, and experts")  # that could go


def problem_of(
    case: str = "with batch norm",
    budget: str = "sparsity=0.7",
    *,
    batch_size: int = 8,
    model: nn.Module | None = None,
    name: str = "",
) -> Problem:
    """What a method of this name is run on, weights or channels."""
    inputs = CASES[case].inputs()
    calibration = Calibration.of(inputs, batch_size=batch_size)
    budget = budget_of(name, case, budget)
    made = CASES[case].model(name) if model is None else model
    return make_problem(made, Budget.parse(budget), pattern_of(name), calibration=calibration)


def shared_problem(case: str = "with batch norm", budget: str = "sparsity=0.7", *, name: str) -> Problem:
    """`problem_of`, made once for all methods on weights and once for all on channels, and so for those on blocks."""
    kind = next(other for other in METHODS if kind_of(other) == kind_of(name))
    return _shared_problem(case, budget_of(name, case, budget), kind)


def kind_of(name: str) -> tuple[bool, bool]:
    return name.endswith(ON_CHANNELS), needs_blocks(name)


@cache
def _shared_problem(case: str, budget: str, kind: str) -> Problem:
    return problem_of(case, budget, name=kind)


def budget_of(name: str, case: str, budget: str = "sparsity=0.7") -> str:
    """The budget, or a looser one where one head of two is all that can go."""
    few = name.endswith(ON_CHANNELS) and case == "attention"
    return re.sub(r"=0\.7$|=3[03]%$", lambda asked: "=0.4" if asked[0][1] == "0" else "=60%", budget) if few else budget


def pattern_of(name: str) -> Unstructured | Channels:
    return Channels() if name.endswith(ON_CHANNELS) else Unstructured()


def fitting(name: str, case: str) -> None:
    """Leaves a test of a method on channels where the case has none."""
    if name.endswith(ON_CHANNELS) and case in WITHOUT_CHANNELS:
        pytest.skip("no channels can go")


def before(name: str, problem: Problem) -> Candidate:
    """What a method of this name gets: nothing for an allocator, selected weights for a repair."""
    candidate = Candidate.dense(problem)
    if METHODS[name].role == "allocate":
        return candidate
    return drive(Selection(), problem, drive(METHODS["uniform"], problem, candidate))


def run(name: str, problem: Problem, *, log: Log | None = None) -> Candidate:
    """The candidate after the method, weights selected."""
    with untouched(problem):
        return _selected(problem, drive(METHODS[name], problem, before(name, problem), log=log))


@contextmanager
def untouched(problem: Problem) -> Iterator[None]:
    """Names the method that edits the model of a shared problem, before the next method runs on it."""
    tensors = {key: bits(value) for key, value in problem.model.state_dict().items()}
    yield
    assert {key: bits(value) for key, value in problem.model.state_dict().items()} == tensors


def _selected(problem: Problem, candidate: Candidate) -> Candidate:
    return candidate if candidate.masks else drive(Selection(), problem, candidate)


@dataclass(frozen=True)
class Run:
    """A run of a method, and what was seen on the way.

    Attributes:
        given, given_before: the candidate that the method got, and a copy of it from before the run.
        effective_before: its effective tensors from before the run, as bytes.
        result: what the method returned.
        candidate: the same with weights selected.
        pushed: samples that went forward and backward through the model, see `counted`.
    """

    problem: Problem
    given: Candidate
    given_before: Candidate
    effective_before: dict[str, bytes]
    result: Candidate
    candidate: Candidate
    log: Log
    metrics: list[dict[str, Any]]
    states: list[State]  # the keys alone, with those of the dicts inside
    pushed: dict[str, int]


@cache
def finished_run(name: str, case: str = "with batch norm") -> Run:
    """The run of a method on a case, made once for all tests that look at it."""
    torch.manual_seed(1)
    problem = shared_problem(case, name=name)
    given = before(name, problem)
    copied = copy.deepcopy(Candidate(given.allocation, given.masks, given.tensors, given.channels))
    effective = {key: bits(value) for key, value in given.effective(problem).items()}
    metrics: list[dict[str, Any]] = []
    watched, log = Watched(METHODS[name]), Log()
    with untouched(problem), counted(problem, by_parts=needs_blocks(name)) as pushed:
        result = drive(watched, problem, given, log=log, on_step=lambda progress: metrics.append(progress.metrics))
    candidate = _selected(problem, result)
    return Run(problem, given, copied, effective, result, candidate, log, metrics, watched.states, pushed)


@contextmanager
def counted(problem: Problem, *, by_parts: bool) -> Iterator[dict[str, int]]:
    """Counts samples that go forward and backward through the model; filled on leaving.

    Args:
        by_parts: counts passes through its parts instead, each as the fraction of the model that the part is.
    """
    pushed, sums = {"forward": 0, "backward": 0}, {"forward": 0, "backward": 0}

    def size(module: nn.Module) -> int:
        return size_of(module) - module.sparse.nbytes if isinstance(module, ModelPart) else 1

    def went(module: nn.Module, args: Any) -> None:
        if isinstance(module, ModelPart) is by_parts and getattr(module, "count", 0) != 2:  # 2: blocks are looked for
            sums["forward"] += len(args[0]) * size(module)

    def gives(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, ModelPart) is by_parts and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(came_back, size(module)))

    def came_back(bytes_of_part: int, gradient: Tensor) -> None:
        sums["backward"] += len(gradient) * bytes_of_part

    if by_parts:
        register = nn.modules.module
        hooks = [register.register_module_forward_pre_hook(went), register.register_module_forward_hook(gives)]
    else:
        hooks = [problem.model.register_forward_pre_hook(went), problem.model.register_forward_hook(gives)]
    try:
        yield pushed
    finally:
        for hook in hooks:
            hook.remove()
        pushed |= {key: total // (size_of(problem.model) if by_parts else 1) for key, total in sums.items()}


@dataclass
class Watched:
    """A method whose states are written down, their keys alone."""

    method: Method
    states: list[State] = field(default_factory=list)

    def __getattr__(self, option: str) -> Any:
        return getattr(self.method, option)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return self._seen(self.method.init(problem, candidate))

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Any:
        metrics = self.method.step(problem, candidate, state)
        self._seen(state)
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return self.method.finish(problem, candidate, state)

    def _seen(self, state: State) -> State:
        self.states.append(
            {key: dict.fromkeys(value) if isinstance(value, dict) else None for key, value in state.items()}
        )
        return state


def nothing_more_fits(problem: Problem, kept: Mapping[str, int]) -> None:
    """Every limit and bound holds, and one more weight, or channel, would break a limit."""
    bound = problem.budget
    assert bound.meets(kept) and all(row["met"] for row in bound.rows(kept))
    for term in bound.terms:
        assert term.lower <= kept[term.name] <= term.upper
        assert kept[term.name] == term.upper or not bound.fits({**kept, term.name: kept[term.name] + 1})


def without_data(problem: Problem) -> Problem:
    return replace(problem, calibration=None)


def parts(name: str) -> dict[str, Any]:
    """Arguments of `prune` for a chain around this method."""
    chain: dict[str, Any] = {"pattern": pattern_of(name)}
    if METHODS[name].role == "allocate":
        return chain | {"allocate": METHODS[name], "repair": "none"}
    return chain | {"allocate": "uniform", "repair": [METHODS[name]]}


def same(left: Candidate, right: Candidate) -> bool:
    """Bit for bit."""
    return (
        dict(left.allocation) == dict(right.allocation)
        and _equal(left.masks, right.masks)
        and left.channels == right.channels
        and _equal(left.tensors, right.tensors)
    )


def _equal(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(bits(left[name]) == bits(right[name]) for name in left)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
