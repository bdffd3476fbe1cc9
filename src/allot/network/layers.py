"""Which tensors of a model may be pruned, and how each of them is a matrix.

Weights keep the shapes of their modules. `Layer.matrix` shows any of them as `[rows, cols]`: one row an output
channel; along a row kernel positions run slowest and input channels fastest, so that N:M groups lie along inputs.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from allot.errors import InvalidBudget, UsageError, unknown
from allot.network.arguments import check_type, typed
from allot.network.kinds import EXPERTS, FROZEN, STACK, UNDECIDED, kind_of, reason_to_skip


@dataclass(frozen=True)
class Layer:
    """One prunable tensor.

    Attributes:
        name: name of the parameter in `model.named_parameters()`, the first one where weights are tied.
        shape: of the parameter, as its module stores it.
        kind: "linear" `[out, in]`, "linear_transposed" `[in, out]`, "conv" `[out, in/groups, *kernel]`,
            "conv_transposed" `[in, out/groups, *kernel]`, "attention_in" `[out, in]`, "attention_out" `[out, in]`,
            "recurrent" `[gates * hidden, in]`, "lookup" `[entries, width]`, "experts" `[experts, out, in]`,
            "experts_transposed" `[experts, in, out]`.
        groups: of the convolution.
        macs: dense multiply-accumulates in one forward pass of the example; None until measured.
        normalised: whether its output goes straight into a batch norm; False until measured.
        aliases: other names of the same tensor.
        min_kept, max_kept: fewest and most weights that rules and floor allow.
        min_per_row: how many weights every row keeps at least.

    >>> layer = Layer("conv.weight", (8, 4, 3, 3), "conv")
    >>> layer.total, layer.rows, layer.inputs
    (288, 8, 4)
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    groups: int = 1
    macs: int | None = None
    normalised: bool = False
    aliases: tuple[str, ...] = ()
    min_kept: int = 1
    max_kept: int = -1
    min_per_row: int = 0

    def __post_init__(self) -> None:
        if self.max_kept < 0:
            object.__setattr__(self, "max_kept", self.total)

    @property
    def total(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Output channels, of all experts."""
        if self.kind == "conv_transposed":
            return self.shape[1] * self.groups
        if self.kind in EXPERTS:
            return self.total // self.inputs
        return self.shape[1] if self.kind == "linear_transposed" else self.shape[0]

    @property
    def output_dim(self) -> int:
        """Which dimension of the module's output holds the rows, counted from the end."""
        return 1 - len(self.shape)

    @property
    def inputs(self) -> int:
        """Input channels that one output channel sees."""
        if self.kind == "conv_transposed":
            return self.shape[0] // self.groups
        if self.kind == "experts":
            return self.shape[2]
        return self.shape[0] if self.kind == "linear_transposed" else self.shape[1]

    def matrix(self, tensor: Shaped[Tensor, ...]) -> Shaped[Tensor, "rows cols"]:
        """`tensor`, shaped like the weight, as `[rows, cols]`; input channels run fastest along a row."""
        if self.kind == "linear_transposed":
            return tensor.t()
        if self.kind == "conv":
            return tensor.movedim(1, -1).reshape(self.rows, -1)
        if self.kind == "conv_transposed":
            split = tensor.unflatten(0, (self.groups, self.inputs))  # [g, in/g, out/g, *kernel]
            return split.movedim(1, -1).reshape(self.rows, -1)
        if self.kind in EXPERTS:
            return (tensor if self.kind == "experts" else tensor.transpose(1, 2)).reshape(self.rows, -1)
        return tensor

    def unmatrix(self, matrix: Shaped[Tensor, "rows cols"]) -> Shaped[Tensor, ...]:
        """The inverse of `matrix`: `[rows, cols]` to the shape of the weight."""
        if self.kind == "linear_transposed":
            return matrix.t().contiguous()
        if self.kind == "conv":
            return matrix.reshape(self.rows, *self.shape[2:], self.inputs).movedim(-1, 1).contiguous()
        if self.kind == "conv_transposed":
            split = matrix.reshape(self.groups, self.shape[1], *self.shape[2:], self.inputs)
            return split.movedim(-1, 1).reshape(self.shape).contiguous()
        if self.kind in EXPERTS:
            split = matrix.unflatten(0, (self.shape[0], -1))  # [experts, out, in]
            return (split if self.kind == "experts" else split.transpose(1, 2)).contiguous()
        return matrix


@dataclass(frozen=True)
class Rules:
    """The user's rules for single layers.

    A pattern is a glob over the name of a parameter or of its module (`layer1.*`, `fc`), or a regular expression
    after `re:` that has to match one of these names whole.

    Attributes:
        include: only layers that match one of these are in scope; empty means all but lookup tables (embeddings).
        exclude: layers that match one of these are left dense.
        min_density, max_density: pattern -> bound in [0, 1]; where several match, the last one counts.
        floor: lower bound for every layer: weights per layer (`1`), weights per output row (`"2/row"`) or a share
            of the layer (`"5%"`).

    >>> Rules(max_density={"fc": 0.5}, floor="5%").bounds(200, ["fc.weight", "fc"])  # fewest and most weights
    (10, 100)
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_density: Mapping[str, float] = field(default_factory=dict)
    max_density: Mapping[str, float] = field(default_factory=dict)
    floor: int | str = 1

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            if isinstance(rule := getattr(self, name), str):
                raise UsageError(f"the rule {rule!r} stands alone: a tuple of patterns is accepted, like ({rule!r},).")
            check_type(name, rule, Sequence[str])
        for name in ("min_density", "max_density"):
            check_type(name, getattr(self, name), Mapping[str, object])
        for pattern, value in (*self.min_density.items(), *self.max_density.items()):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
                raise InvalidBudget(f"density bound {pattern}={value!r}: a number from 0 to 1 is accepted.")
        for pattern in self.patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise UsageError(f"{pattern!r} is not a regular expression: {error}.") from error
        floor = str(self.floor)
        if not re.fullmatch(r"\d+(/row)?|\d+(\.\d+)?%", floor) or (floor.endswith("%") and float(floor[:-1]) > 100):
            accepted = 'weights per layer (1), per row ("1/row") or a share ("5%")'
            raise InvalidBudget(f"floor={self.floor!r}: {accepted} is accepted.")

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns; each has to match at least one layer."""
        return (*self.include, *self.exclude, *self.min_density, *self.max_density)

    def bounded(self, layer: Layer, names: Iterable[str]) -> Layer:
        by_row = str(self.floor).endswith("/row")
        per_row = min(int(str(self.floor)[:-4]), layer.total // layer.rows) if by_row else 0
        least, most = self.bounds(layer.total, names)
        return replace(layer, min_kept=max(least, per_row * layer.rows), max_kept=most, min_per_row=per_row)

    def bounds(self, total: int, names: Iterable[str]) -> tuple[int, int]:
        """Fewest and most of `total` weights (channels) that a layer (group) with one of these names may keep."""
        low = [value for pattern, value in self.min_density.items() if matches(pattern, names)] or [0.0]
        high = [value for pattern, value in self.max_density.items() if matches(pattern, names)] or [1.0]
        floor = str(self.floor)
        kept = 0
        if floor.endswith("%"):
            kept = math.ceil(float(floor[:-1]) / 100 * total - 1e-9)
        elif not floor.endswith("/row"):
            kept = min(int(floor), total)
        return max(kept, math.ceil(low[-1] * total - 1e-9)), math.floor(high[-1] * total + 1e-9)


@dataclass(frozen=True)
class Scope:
    """Which tensors may be pruned, and why the others may not.

    Attributes:
        layers: every prunable tensor once, in the model's order.
        skipped: parameter name -> the reason it stays dense; for channels, group -> the reason it stays whole.
        groups: coupled channels, where channels are pruned and not single weights.
        undecided: weights of 3 dimensions, each in both forms of a stack of experts: `allot.network.macs.measured`
            finds out which form the model uses, if any. Until then they are in `skipped`.
        macs: of the whole model, out of scope included; None until measured.

    >>> scope = Scope.of(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    >>> [layer.name for layer in scope], scope.skipped["1.weight"]
    (['0.weight'], 'normalisation (BatchNorm1d)')
    """

    layers: tuple[Layer, ...]
    skipped: Mapping[str, str]
    groups: tuple[Group, ...] = ()
    undecided: tuple[Layer, ...] = ()
    macs: int | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise unknown("layer", name, [layer.name for layer in self.layers])

    def without(self, reasons: Mapping[str, str]) -> Scope:
        """The scope without these layers, which stay dense for the reasons given."""
        left = {layer.name: reasons[layer.name] for layer in self.layers if layer.name in reasons}
        layers = tuple(layer for layer in self.layers if layer.name not in left)
        return replace(self, layers=layers, skipped={**self.skipped, **left})

    @classmethod
    @typed
    def of(cls, model: nn.Module, rules: Rules | None = None, *, shapes_only: bool = False) -> Scope:
        """Every parameter of `model`, as a `Layer` or with the reason why it stays dense.

        Args:
            shapes_only: whether parameters may have shapes and no values, as those on the meta device.
        Raises:
            UsageError: a pattern that no layer matches, or parameters that hold no values yet.
        """
        rules = rules or Rules()
        places = places_by_parameter(model)
        layers: list[Layer] = []
        undecided: list[Layer] = []
        skipped: dict[str, str] = {}
        matched: set[str] = set()
        prunable: list[str] = []
        frozen = frozen_beside_trained(model)
        for name, holders in places.items():
            parameter = holders[0].parameter
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            if lazy or (parameter.is_meta and not shapes_only):
                raise UsageError(f"{name} holds no values yet: load weights or run one batch through the model first.")
            names = [n for p in holders for n in (p.name, p.module_name)]
            included = any(matches(pattern, names) for pattern in rules.include)
            place = max(holders, key=lambda place: place.certainty)  # the first one of those
            if not place.kind or (place.kind == "lookup" and not included):
                skipped[name] = holders[0].reason_to_skip()
                continue
            prunable.append(name)
            matched.update(pattern for pattern in rules.patterns if matches(pattern, names))
            if rules.include and not included:
                skipped[name] = "no include rule matches it"
            elif name in frozen and not included:
                skipped[name] = FROZEN
            elif excluding := [pattern for pattern in rules.exclude if matches(pattern, names)]:
                skipped[name] = f"excluded by rule {excluding[0]!r}"
            else:
                groups = getattr(place.module, "groups", 1) if place.kind.startswith("conv") else 1
                aliases = tuple(p.name for p in holders[1:])
                layer = Layer(name, tuple(parameter.shape), place.kind, groups, aliases=aliases)
                if place.kind == STACK:
                    skipped[name] = f"{place.reason_to_skip()} {UNDECIDED}"
                    undecided.extend(rules.bounded(replace(layer, kind=kind), names) for kind in EXPERTS)
                else:
                    layers.append(rules.bounded(layer, names))
        if unmatched := [pattern for pattern in rules.patterns if pattern not in matched]:
            shown = ", ".join(prunable[:6]) + (f" and {len(prunable) - 6} more" if len(prunable) > 6 else "")
            raise UsageError(f"rule {unmatched[0]!r} matches no prunable layer; there are {shown}.")
        return cls(tuple(layers), skipped, undecided=tuple(undecided))


@dataclass(frozen=True)
class Place:
    """A place where a parameter is held by a module; `kind` as `kind_of` finds it."""

    name: str
    module_name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    kind: str

    @property
    def certainty(self) -> int:
        """How sure it is that the parameter is multiplied with inputs here."""
        return 0 if not self.kind else 1 if self.kind in ("lookup", STACK) else 2

    def reason_to_skip(self) -> str:
        """Why the parameter stays dense here."""
        return reason_to_skip(self.module, self.attribute, self.parameter)


def places_by_parameter(model: nn.Module) -> dict[str, list[Place]]:
    """First name of each parameter -> all places that hold it, in the model's order."""
    by_tensor: dict[int, list[Place]] = {}
    output_projections = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{module_name}.{attribute}" if module_name else attribute
                kind = kind_of(module, attribute, parameter)
                kind = "attention_out" if kind == "linear" and id(module) in output_projections else kind
                place = Place(name, module_name, module, attribute, parameter, kind)
                by_tensor.setdefault(id(parameter), []).append(place)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {first[key]: sorted(places, key=lambda place: place.name != first[key]) for key, places in by_tensor.items()}


def frozen_beside_trained(model: nn.Module) -> set[str]:
    """Names of the parameters without `requires_grad`, where some of the weights that could be pruned have it."""
    places = [place for holders in places_by_parameter(model).values() for place in holders]
    if not any(place.certainty == 2 and place.parameter.requires_grad for place in places):
        return set()
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a rule's pattern matches one of these names."""
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def plain_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's state dict with each tensor once, and {tied name: the name that is kept}.

    Tied names share one tensor object, as for `named_parameters`: two views of one memory are two tensors. Tensors in a
    sparse layout, like the edges of a graph, are left out: a safetensors file cannot hold them.
    """
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and value.layout is torch.strided:
            stored = first.setdefault(id(value), name)
            if stored == name:
                state[name] = value.detach()
            else:
                aliases[name] = stored
    return state, aliases


@dataclass(frozen=True)
class Member:
    """Where the channels of a group lie in one dimension of one tensor.

    Attributes:
        tensor: name of the parameter or buffer.
        reads: whether these are the columns by which a layer reads the channels.
        places: one tuple a channel: its positions along `dim`; all of one length.
    """

    tensor: str
    dim: int
    reads: bool
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Channels that are removed one by one, each from all members at once.

    Attributes:
        name: of the first module that writes them; attention heads are `MODULE.heads`.
        members: every tensor that holds them.
        attributes: module -> {attribute: how much of it goes with one channel}, where shapes do not say it all.
        min_kept, max_kept: fewest and most channels that rules and floor allow.
        layers: the names by which rules can mean the group.
    """

    name: str
    members: tuple[Member, ...]
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    min_kept: int = 1
    max_kept: int = -1
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_kept < 0:
            object.__setattr__(self, "max_kept", self.total)

    @property
    def total(self) -> int:
        """Number of channels (of heads)."""
        return len(self.members[0].places)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises by the statistics of a batch."""
    return isinstance(module, _BatchNorm)
