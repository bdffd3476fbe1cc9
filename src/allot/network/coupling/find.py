"""Which channels of a model have to be removed together: traced, then proven on numbers.

Torch-Pruning follows autograd's graph from layer to layer and gives the index mappings between layers; nothing else of
it is used. Then a channel of a layer is a node, nodes that have to be removed together are joined (union-find), and
each connected set is one channel of a `Group`. Joined are

    channels that the trace maps onto each other          residuals, concatenations, depthwise convs, chunks, flattening
    channels of a grouped conv with one place in its groups        every group keeps the same places, so sizes stay even
    positions of one tensor under several names           tied weights
    rows of queries, keys and values, and columns of the projection behind them, of one attention head

A trace can be wrong, so it is only a proposal (`allot.network.coupling.proof`). Groups that fail the proof stay whole,
with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from allot.errors import UsageError
from allot.network.call import modes
from allot.network.channels import copied
from allot.network.coupling.heads import heads_of
from allot.network.coupling.proof import split_proven
from allot.network.layers import Group, Member
from allot.network.trees import as_arguments, tensors_in

FOLLOWED = 3_000_000  # channels followed from one layer; with more, the trace runs in circles


def find_groups(model: nn.Module, example: Any) -> tuple[tuple[Group, ...], dict[str, str]]:
    """(groups of channels that can be removed, {name of a group that cannot: reason}); `model` is left as it was.

    Args:
        example: a batch of inputs, as for `allot.network.call.call`.
    Raises:
        UsageError: the model cannot be copied, or gives no gradients to follow.
    """
    probe = copied(model)
    heads = list(heads_of(probe))
    in_heads = {(member.tensor, member.dim) for group in heads for member in group.members}
    modules = _modules_in_order(probe, example)
    traced, skipped = _trace_groups(probe, example, modules)
    groups = [g for g in traced if not any((m.tensor, m.dim) in in_heads for m in g.members)]
    order = {name: i for i, name in enumerate(modules)}
    groups = sorted((*groups, *heads), key=lambda group: order[_module_of(group.name)])
    passed, failed = split_proven(probe, example, groups)
    reason = (
        "removing channels here does not give what zeroing them gives: the model uses them in a way unknown to allot"
    )
    return tuple(passed), skipped | dict.fromkeys(failed, reason)


def _module_of(name: str) -> str:
    return "" if name == "heads" else name.removesuffix(".heads").partition(":")[0]


# the trace

Node = tuple[str, str, int]  # module, "out" or "in", channel


@dataclass
class _Union:
    """Union-find over nodes."""

    parent: dict[Any, Any]

    def find(self, node: Any) -> Any:
        root = node
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[node] != root:
            self.parent[node], node = root, self.parent[node]
        return root

    def join(self, one: Any, other: Any) -> None:
        self.parent[self.find(one)] = self.find(other)


def _modules_in_order(probe: nn.Module, example: Any) -> dict[str, nn.Module]:
    """Every module by name, in the order in which a forward pass reaches them, not in that of registration."""
    names = {module: name for name, module in probe.named_modules()}
    reached: dict[str, nn.Module] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        reached.setdefault(names[module], module)

    handles = [module.register_forward_pre_hook(note) for module in names]
    args, kwargs = as_arguments(example)
    with torch.no_grad(), modes(probe, lambda module: False):
        probe(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return reached | {name: module for module, name in names.items() if name not in reached}


def _trace_groups(
    probe: nn.Module, example: Any, modules: Mapping[str, nn.Module]
) -> tuple[list[Group], dict[str, str]]:
    graph = _dependency_graph(probe, example)
    names = {id(module): name for name, module in probe.named_modules()}
    parameters = {id(parameter): name for name, parameter in probe.named_parameters()}
    first = {id(tensor): name for name, tensor in (*probe.named_parameters(), *probe.named_buffers())}
    dims = {id(parameter): dim for parameter, dim in graph.unwrapped_parameters}
    union, reasons = _Union({}), {}
    sizes: dict[tuple[str, str], int] = {}
    widest = max((max(tensor.shape, default=1) for tensor in probe.parameters()), default=1)
    for name, module in modules.items():
        if not _writes_channels(module) or module not in graph.module2node or (name, "out") in sizes:
            continue
        pruner = graph.get_pruner_of_module(module)
        total = pruner.get_out_channels(module)
        followed = 0
        for node, handler, links in _follow(graph, module, pruner.prune_out_channels, total):
            followed += len(links)
            if followed > FOLLOWED or not links:
                reasons[name, "out"] = "hangs together with more than can be followed"
                break
            target = node.module
            if id(target) in parameters:
                where = (parameters[id(target)], f"dim {dims.get(id(target), -1)}")
            elif id(target) in names:
                reads = _writes_channels(target) and not _depthwise(target)
                reads = reads and handler == graph.get_pruner_of_module(target).prune_in_channels
                where = (names[id(target)], "in" if reads else "out")
                if not _can_be_cut(target):
                    reasons[where] = f"reaches {where[0]} ({type(target).__name__}), which {_why_not_cut(target)}"
            else:
                continue  # additions, concatenations and the like hold no tensors
            if not all(0 <= channel < widest for channel, _ in links):
                reasons[name, "out"] = "is read from an end that the trace does not know"
                break
            sizes[where] = max(sizes.get(where, 0), 1 + max((channel for channel, _ in links), default=0))
            for channel, root in links:
                union.join((*where, channel), (name, "out", root))
        sizes[name, "out"] = total
    return _groups_of_nodes(union, modules, sizes, reasons, first)


def _dependency_graph(probe: nn.Module, example: Any) -> Any:
    import torch_pruning  # a second to import

    args, kwargs = as_arguments(example)
    for parameter in probe.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()

    def forward(model: nn.Module, _: Any) -> list[Tensor]:
        outputs = [tensor for tensor in tensors_in(model(*args, **kwargs)) if tensor.requires_grad]
        if not outputs:
            raise UsageError("the model's outputs carry no gradients: take no_grad and detach out of its forward.")
        return outputs

    with modes(probe, lambda module: False), torch.enable_grad():
        try:
            return torch_pruning.DependencyGraph().build_dependency(probe, (example,), forward, verbose=False)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"the channels of this model cannot be traced: {error}") from error


def _follow(graph: Any, module: nn.Module, remove: Any, total: int) -> Iterator[tuple[Any, Any, list[tuple[int, int]]]]:
    """(node, its pruning function, pairs of its channel and the root's channel) for every node coupled to `module`.

    No pairs where the trace fails.
    """
    from torch_pruning._helpers import _HybridIndex

    pending = [(graph.module2node[module], remove, [_HybridIndex(i, i) for i in range(total)])]
    seen = set()
    while pending:
        node, handler, links = pending.pop()
        key = (id(node), handler, tuple(links))
        if key in seen or not links:
            continue
        seen.add(key)
        yield node, handler, [(link.idx, link.root_idx) for link in links]
        for dependency in node.dependencies:
            if dependency.is_triggered_by(handler):
                mapped = links
                try:
                    for mapping in dependency.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                except (ArithmeticError, LookupError, TypeError, ValueError):
                    yield node, handler, []
                    return
                pending.append((dependency.target, dependency.handler, mapped))


# from nodes to groups


def _groups_of_nodes(
    union: _Union,
    modules: Mapping[str, nn.Module],
    sizes: Mapping[tuple[str, str], int],
    unknown: Mapping[tuple[str, str], str],
    first: Mapping[int, str],
) -> tuple[list[Group], dict[str, str]]:
    cells: dict[tuple[str, int, int], list[Node]] = {}  # position in a tensor -> the channels that hold it
    reads: dict[tuple[str, int], bool] = {}
    for (name, side), size in sizes.items():
        for tensor, dim, position in _tensors_of(modules.get(name), name, side, first):
            reads[tensor, dim] = side == "in"
            for channel in range(size):
                cells.setdefault((tensor, dim, position(channel)), []).append((name, side, channel))
        if _is_bare_norm(modules.get(name)):
            reads[_BARE + name, 0] = False
            for channel in range(size):
                cells.setdefault((_BARE + name, 0, channel), []).append((name, side, channel))
        if isinstance(module := modules.get(name), _ConvNd) and not _depthwise(module):
            each = (module.out_channels if side == "out" else module.in_channels) // module.groups
            for channel in range(each, size):
                union.join((name, side, channel), (name, side, channel % each))
    for nodes in cells.values():
        for node in nodes[1:]:
            union.join(node, nodes[0])
    units: dict[Node, dict[tuple[str, int], list[int]]] = {}
    for (tensor, dim, at), nodes in cells.items():
        units.setdefault(union.find(nodes[0]), {}).setdefault((tensor, dim), []).append(at)
    reasons: dict[Node, str] = {}
    for (name, side), why in unknown.items():
        reasons.update({union.find((name, side, channel)): why for channel in range(sizes[name, side])})
    kinds: dict[Any, list[Node]] = {}
    for root, positions in units.items():
        kinds.setdefault(tuple(sorted((key, len(at)) for key, at in positions.items())), []).append(root)
    order = {name: i for i, name in enumerate(modules)}
    groups: list[Group] = []
    skipped: dict[str, str] = {}
    writers: dict[tuple[str, int], list[str]] = {}
    for name, side in sorted(sizes, key=lambda where: order.get(where[0], -1)):
        if side == "out" and _writes_channels(modules.get(name)):
            for tensor, dim, _ in _tensors_of(modules[name], name, side, first):
                writers.setdefault((tensor, dim), []).append(name)
    owners_of = {
        kind: sorted({n for k, _ in kind for n in writers.get(k, ())}, key=lambda n: order[n]) for kind in kinds
    }
    for kind in sorted((k for k in kinds if owners_of[k]), key=lambda k: (order[owners_of[k][0]], k)):
        roots, owners = kinds[kind], owners_of[kind]
        roots.sort(key=lambda root: min(min(at) for at in units[root].values()))
        number_before = sum(owners[0] == other.partition(":")[0] for other in (*(g.name for g in groups), *skipped))
        name = f"{owners[0]}:{number_before + 1}" if number_before else owners[0]
        if why := next((reasons[root] for root in roots if root in reasons), ""):
            skipped[name] = why
        elif not any(reads[key] for key, _ in kind):
            skipped[name] = "what it writes is read by no layer: it is the model's output"
        elif len(roots) == 1:
            skipped[name] = "its channels cannot part: only one set of them hangs together"
        else:
            members = tuple(
                Member(t, d, reads[t, d], tuple(tuple(sorted(units[root][t, d])) for root in roots))
                for (t, d), _ in kind
                if not t.startswith(_BARE)
            )
            bare = {t.removeprefix(_BARE): each for (t, _), each in kind if t.startswith(_BARE)}
            attributes = {n: dict.fromkeys(_size_attributes(modules[n]), each) for n, each in bare.items()}
            groups.append(Group(name, members, attributes, layers=tuple(owners)))
    return groups, skipped


def _tensors_of(
    module: nn.Module | None, name: str, side: str, first: Mapping[int, str]
) -> Iterator[tuple[str, int, Callable[[int], int]]]:
    """(tensor, dimension, channel -> position) of each tensor that holds a module's channels."""

    def identity(channel: int) -> int:
        return channel

    if module is None:  # a parameter that is used directly
        yield name, int(side.removeprefix("dim ")), identity
        return
    dims: dict[str, int] = {}
    each = 0  # channels of the dimension that all groups of a conv share
    if isinstance(module, _ConvNd | nn.Linear):
        transposed = isinstance(module, _ConvTransposeNd)
        shared = (side == "out") == transposed and not _depthwise(module)
        if shared and isinstance(module, _ConvNd):
            each = (module.out_channels if transposed else module.in_channels) // module.groups
        dims = {"weight": int(shared)} | ({"bias": 0} if side == "out" else {})
    elif isinstance(module, nn.Embedding):
        dims = {"weight": 1}
    elif _can_be_cut(module):
        dims = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
    for attribute, dim in dims.items():
        tensor = module._parameters.get(attribute, module._buffers.get(attribute))
        if tensor is not None and tensor.dim():
            yield first[id(tensor)], dim, (lambda channel: channel % each) if each and dim else identity


def _writes_channels(module: nn.Module | None) -> bool:
    return isinstance(module, _ConvNd | nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def _depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels == module.out_channels
    )


_BARE = "channels of "  # stands before the name of a norm where a tensor's name would


def _is_bare_norm(module: nn.Module | None) -> bool:
    """Whether a norm per channel holds no tensor whose size is its number of channels."""
    if not isinstance(module, _NormBase | nn.GroupNorm):
        return False
    return module._parameters.get("weight") is None and module._buffers.get("running_mean") is None


def _size_attributes(module: nn.Module) -> tuple[str, ...]:
    """The attributes of such a norm that hold its number of channels."""
    return ("num_groups", "num_channels") if isinstance(module, nn.GroupNorm) else ("num_features",)


def _can_be_cut(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd | nn.Linear) and "weight" not in module._parameters:
        return False
    if isinstance(module, _ConvNd) and module.groups > 1 and module.groups in (module.in_channels, module.out_channels):
        return _depthwise(module)  # a depthwise conv with several outputs per channel is not supported
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == module.num_channels
    return isinstance(module, _ConvNd | nn.Linear | _NormBase | nn.PReLU | nn.Embedding | nn.GroupNorm)


def _why_not_cut(module: nn.Module) -> str:
    if (
        isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.LocalResponseNorm)
        or "norm" in type(module).__name__.lower()
    ):
        return "normalises channels together: fewer of them would change the others"
    if isinstance(module, _ConvNd | nn.Linear) and "weight" not in module._parameters:
        return "is parametrized: remove the parametrization first"
    if isinstance(module, _ConvNd):
        return "has several output channels for each input channel"
    return "allot cannot make smaller"
