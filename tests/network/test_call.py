"""`call`: the model computes with other tensors and is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.applied_masks import masked, masked_values
from allot.network.call import call
from allot.network.trees import as_arguments


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Named(nn.Module):
    def forward(self, a, b):
        return a - b


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_named_tensors_take_the_place_of_the_models_own():
    model, x = net().eval(), rand(5, 4)
    weight, bias = rand(2, 4), rand(2)
    before = state_of(model)
    given = call(model, {"3.weight": weight, "3.bias": bias}, x)
    assert torch.equal(given, torch.nn.functional.linear(model[:3](x), weight, bias))
    assert same(model, before)


def test_gradients_reach_the_tensors_passed_in_and_not_the_model():
    model = net()
    weight = rand(2, 4).requires_grad_()
    call(model, {"3.weight": weight}, rand(5, 4)).sum().backward()
    assert weight.grad is not None and model[3].weight.grad is None


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown tensor '3\.weigth': did you mean '3\.weight'"):
        call(net(), {"3.weigth": rand(2, 4)}, rand(5, 4))


def test_a_wrong_shape_is_refused_by_name():
    with pytest.raises(UsageError, match=r"3\.weight has shape \[4, 2\]; the model has \[2, 4\]"):
        call(net(), {"3.weight": rand(4, 2)}, rand(5, 4))


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_one_name_of_a_tied_weight_changes_every_use(name):
    model, x, weight = Tied(), rand(3, 4), rand(4, 4)
    expected = x @ weight.t() @ weight.t()
    assert torch.allclose(call(model, {name: weight}, x), expected)
    assert torch.allclose(call(model, {"first.weight": weight, "second.weight": weight}, x), expected)
    assert model.first.weight is model.second.weight


def test_two_values_for_one_tied_weight_are_refused():
    with pytest.raises(UsageError, match=r"first\.weight and second\.weight are one tied weight"):
        call(Tied(), {"first.weight": rand(4, 4), "second.weight": rand(4, 4)}, rand(3, 4))


def test_nothing_runs_in_train_mode_unless_it_is_said():
    model = net().train()
    model[1].eval()
    modes = [part.training for part in model.modules()]
    seen = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append([part.training for part in model.modules()]))
    call(model, {}, rand(5, 4))
    call(model, {}, rand(5, 4), training=lambda module: isinstance(module, nn.BatchNorm1d))
    assert seen == [[False] * 5, [False, False, True, False, False]]
    assert [part.training for part in model.modules()] == modes


def test_train_mode_is_restored_when_the_forward_or_the_choice_raises():
    model = net().train()
    model[2].eval()
    modes = [part.training for part in model.modules()]
    before = state_of(model)
    with pytest.raises(RuntimeError):
        call(model, {"3.weight": rand(2, 4)}, rand(5, 3))
    with pytest.raises(ZeroDivisionError):
        call(model, {}, rand(5, 4), training=lambda module: bool(1 // 0))
    assert [part.training for part in model.modules()] == modes
    assert same(model, before)


def test_statistics_are_updated_in_the_buffers_passed_in_only():
    model, x = net(), rand(5, 4)
    before = state_of(model)
    passed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    call(model, passed, x, training=lambda module: isinstance(module, nn.BatchNorm1d))
    assert same(model, before)
    expected = 0.1 * model[0](x).detach().mean(0)
    assert torch.allclose(passed["1.running_mean"], expected, atol=1e-6)
    assert int(passed["1.num_batches_tracked"]) == 1


def test_a_tuple_is_several_arguments_and_a_dict_is_names():
    a, b = rand(2), torch.ones(2)
    assert torch.equal(call(Named(), {}, (a, b)), a - b)
    assert torch.equal(call(Named(), {}, {"b": b, "a": a}), a - b)
    assert as_arguments([a, b]) == (([a, b],), {})


def test_masked_weights_are_plus_zero_whatever_they_were():
    weight = torch.tensor([-1.0, float("nan"), float("inf"), -2.0])
    zeros = masked(weight, torch.tensor([False, False, False, True]))
    assert zeros.tolist() == [0.0, 0.0, 0.0, -2.0] and not torch.signbit(zeros[:3]).any()
    assert masked(weight.half(), torch.ones(4, dtype=torch.bool)).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_masked_values_are_those_of_masked_to_the_bit_in_any_layout(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(4, 6, 3, 2, generator=draw).to(dtype)
    tensor[0, 0, 0] = -0.0
    tensor[1, 0, 0] = float("nan")
    mask = torch.rand(tensor.shape, generator=draw) < 0.5
    for ours in (tensor, tensor.to(memory_format=torch.channels_last), tensor.transpose(0, 1)):
        chosen = mask if ours.shape == mask.shape else mask.transpose(0, 1)
        found, wanted = masked_values(ours, chosen), masked(ours, chosen)
        assert found.dtype == dtype and found.stride() == wanted.stride()
        assert bits_of(found) == bits_of(wanted)


def bits_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_name_under_which_a_module_is_shared_is_a_name_too():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(shared, shared)
    zero = torch.zeros(2, 2)
    assert torch.equal(call(model, {"1.weight": zero}, torch.ones(1, 2)), torch.zeros(1, 2))
