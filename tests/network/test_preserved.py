"""What a forward pass leaves in a model is undone, and a pass that writes into parameters is refused."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from allot.errors import UsageError
from allot.network.copies import deep_copy
from allot.network.preserved import preserved, refused_writes

SEEN_BY_HOOKS: list[torch.Tensor] = []


class Collector:
    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []

    def hook(self, module, args, output) -> None:
        self.outputs.append(output)


class Keeps(nn.Module):
    """Keeps what a pass computed, in every place that comes to mind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), nn.ModuleList([nn.ReLU()])
        self.log, self.by_name, self.ordered, self.names = [], {"deep": [[]]}, OrderedDict(a=1, b=2), set()
        self.recent, self.calls, self.cache = deque(maxlen=2), 0, Collector()
        self.register_buffer("mean", torch.zeros(2))
        self.total, self.counts = torch.zeros(1), np.zeros(3)
        self.generator = torch.Generator()

    def forward(self, x):
        y = self.layer(x)
        self.log.append(y)
        self.by_name["last"] = y
        self.by_name["deep"][0].append(y)
        self.ordered.move_to_end("a")
        self.names.add("called")
        self.recent.append(y)
        self.cache.outputs.append(y)
        self.last, self.calls = y, self.calls + 1
        self.mean += 1
        self.mean = self.mean * 2
        self.total.add_(1)
        self.counts[0] += 1
        torch.rand(1, generator=self.generator)
        self.inner.append(nn.Tanh())
        return y


def held(model: Keeps) -> list:
    values = (model.log, model.by_name, list(model.ordered), model.names, list(model.recent), model.cache.outputs)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()] + [m.training for m in model.modules()]
    others = model.calls, sorted(vars(model)), model.generator.get_state().tolist(), len(model.inner), flags
    return copy.deepcopy([*values, model.mean.tolist(), model.total.tolist(), model.counts.tolist(), *others])


def test_everything_that_a_pass_keeps_is_put_back():
    model = Keeps()
    before, mean = held(model), model.mean
    with preserved(model):
        model.eval().requires_grad_(False)
        model(torch.ones(2, 4))
    assert held(model) == before and model.mean is mean


def test_it_is_put_back_where_the_pass_raises():
    model = Keeps()
    before = held(model)
    twice = nn.Sequential(model, nn.Linear(5, 5))
    with pytest.raises(RuntimeError), preserved(twice):
        twice(torch.ones(2, 4))
    assert held(model) == before


def test_what_hooks_collect_is_put_back():
    model, collector, local = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Collector(), []

    def appends(module, args, output) -> None:
        local.append(output)

    def appends_to(collected, module, args, output) -> None:
        collected.append(output)

    with_arguments: list[torch.Tensor] = []
    model[0].register_forward_hook(appends)
    model[0].register_forward_hook(collector.hook)
    model[0].register_forward_hook(functools.partial(appends_to, with_arguments))
    model[1].register_forward_hook(lambda module, args, output: SEEN_BY_HOOKS.append(output))
    with preserved(model):
        model(torch.ones(2, 4))
        assert local and collector.outputs and with_arguments and SEEN_BY_HOOKS
    assert not (local or collector.outputs or with_arguments or SEEN_BY_HOOKS)


def test_what_a_model_kept_before_is_kept():
    model = Keeps()
    with torch.no_grad():
        model(torch.ones(2, 4))
    last, values = model.last, model.last.clone()
    with preserved(model):
        model.last.zero_()
        model(torch.zeros(2, 4))
    assert model.last is last and torch.equal(last, values) and len(model.log) == 1


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_arrays_that_cannot_be_written_and_tensors_of_any_type_are_no_trouble():
    model = nn.Linear(4, 4)
    model.table = np.zeros(3)
    model.table.flags.writeable = False
    model.eighths = torch.zeros(4).to(torch.float8_e4m3fn)
    model.whole = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    model.sparse, model.waves = torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.complex64).conj()
    model.unknown = torch.full((2,), float("nan"))
    with preserved(model):
        model.eighths = model.waves = None
        model.unknown.zero_()
    assert model.eighths is not None and model.waves is not None and bool(model.unknown.isnan().all())


def test_a_tensor_to_which_an_output_was_added_has_no_graph_afterwards():
    model = nn.Linear(4, 4)
    model.total = torch.zeros(4)
    with preserved(model):
        model.total += model(torch.ones(4))
    assert model.total.is_leaf and not model.total.requires_grad and not model.total.any()
    copy.deepcopy(model)


def test_hooks_classes_and_modules_are_put_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    first = model[0]
    with preserved(model):
        first.register_forward_hook(lambda *_: None)
        first.__class__ = type("Other", (nn.Linear,), {})
        model[0] = nn.Linear(4, 2)
    assert model[0] is first and type(first) is nn.Linear and not first._forward_hooks


def test_a_copy_holds_kept_tensors_without_their_graphs():
    model = Keeps()
    model(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    copied = deep_copy(model)
    assert torch.equal(copied.last, model.last) and copied.last.is_leaf and copied.log[0] is copied.last
    assert copied.layer.weight.requires_grad and copied.layer.weight is not model.layer.weight


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def pruned_by_torch() -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize("make", [old_weight_norm, lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), pruned_by_torch])
def test_a_layer_with_a_recomputed_weight_can_be_copied(make):
    layer, x = make(), torch.ones(2, 4)
    layer(x)
    layer.eval()
    assert torch.equal(deep_copy(layer)(x), layer(x))


# forward passes that write into parameters


class Writes(nn.Linear):
    def __init__(self, write) -> None:
        super().__init__(4, 4)
        self.write = write

    def forward(self, x):
        self.write(self)
        return super().forward(x)


def copies(layer) -> None:
    with torch.no_grad():
        layer.bias.copy_(layer.bias + 1)


def replaces(layer) -> None:
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.1)


WRITES = {
    "data in place": lambda layer: layer.weight.data.mul_(0.9),
    "one row": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "copy": copies,
    "other data": replaces,
    "initialisation": lambda layer: nn.init.zeros_(layer.weight),
    "several at once": lambda layer: torch._foreach_mul_([layer.weight.data, layer.bias.data], 2.0),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_pass_that_writes_into_parameters_is_refused_and_undone(case):
    model = nn.Sequential(Writes(WRITES[case]))
    before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(UsageError, match=r"forward writes into its parameter 0\.(weight|bias)"), refused_writes(model):
        model(torch.ones(2, 4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places


def test_a_write_is_undone_where_the_pass_raises():
    model = Writes(WRITES["data in place"])
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError), refused_writes(model):
        model(torch.ones(2, 5))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer.weight, "data", torch.renorm(layer.weight.data, 2, 0, 100.0)),
        lambda layer: layer.weight.data.clamp_(-100, 100),
        lambda layer: None,
    ],
)
def test_a_pass_that_leaves_the_values_is_accepted(write):
    model = Writes(write)
    place = model.weight.data_ptr()
    with refused_writes(model):
        model(torch.ones(2, 4))
    assert model.weight.data_ptr() == place
