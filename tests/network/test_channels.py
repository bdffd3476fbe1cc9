"""Plans of channels: the slim net is the masked net, and as large as was said beforehand."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.network.channels import ChannelPlan, FewerHeads, slimmed
from allot.network.layers import Group
from allot.pruning.setup import make_problem
from allot.run.patterns import Channels
from allot.run.problem import Problem
from network.coupling.nets import NETS, filled, net, picture

PLANS = 13  # a net; 208 in all


@functools.cache
def problem(name: str) -> Problem:
    return make_problem(net(name), Budget.parse("macs=50%"), Channels(), example=picture())


def drawn(groups: tuple[Group, ...], seed: int) -> dict[str, list[int]]:
    """Some channels of every group; in the first plan one of each, in the second all."""
    draw = random.Random(seed)
    count = {0: lambda total: 1, 1: lambda total: total}.get(seed, lambda total: draw.randint(1, total))
    return {group.name: draw.sample(range(group.total), count(group.total)) for group in groups}


def planned(name: str, seed: int) -> tuple[ChannelPlan, dict[str, int]]:
    groups = problem(name).scope.groups
    plan = ChannelPlan.of(problem(name).model, groups, drawn(groups, seed))
    return plan, {group: len(kept) for group, kept in plan.kept.items()}


def counted(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """(weights, MACs) of convs, linear layers and attention, from what goes through them."""
    layers: dict[int, int] = {}
    macs = 0

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal macs
        x = inputs[0]
        if isinstance(module, nn.Linear):
            layers[id(module.weight)] = module.in_features * module.out_features
            macs += x.numel() // x.shape[-1] * module.in_features * module.out_features
        elif isinstance(module, nn.ConvTranspose2d):
            each = module.out_channels // module.groups * math.prod(module.kernel_size)
            layers[id(module.weight)] = module.in_channels * each
            macs += x.numel() * each
        elif isinstance(module, nn.Conv2d):
            each = module.in_channels // module.groups * math.prod(module.kernel_size)
            layers[id(module.weight)] = module.out_channels * each
            macs += output.numel() * each
        elif isinstance(module, FewerHeads):
            width, tokens = module.embed_dim, x.numel() // x.shape[-1]
            layers[id(module)] = 3 * width * module.num_heads * module.head_dim
            macs += tokens * layers[id(module)]  # of self-attention, as nets.py has it

    handles = [module.register_forward_hook(watch) for module in model.modules()]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return sum(layers.values()), macs


def distance(model: nn.Module, slim: nn.Module, plan: ChannelPlan, example: Tensor) -> float:
    zeroed = {name: p.detach() * plan.mask(name, p.shape) for name, p in model.named_parameters()}
    with torch.no_grad():
        return (torch.func.functional_call(model, zeroed, (example,)) - slim(example)).abs().max().item()


@pytest.mark.parametrize("name", NETS)
def test_the_slim_net_gives_what_the_masked_net_gives(name):
    model, example = net(name), picture(3, seed=1)
    for seed in range(PLANS):
        plan, _ = planned(name, seed)
        assert distance(model, slimmed(model, plan), plan, example) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_they_agree_to_the_last_digits_in_float64(name):
    model, example = net(name).double(), picture(2, seed=2).double()
    for seed in (0, 5, 6):
        plan, _ = planned(name, seed)
        assert distance(model, slimmed(model, plan), plan, example) < 1e-10


@pytest.mark.parametrize("name", NETS)
def test_weights_and_macs_are_those_that_were_predicted(name):
    model, budget = net(name), problem(name).budget
    for seed in range(PLANS):
        plan, kept = planned(name, seed)
        weights, macs = counted(slimmed(model, plan), picture())
        assert (budget.cost("params", kept), budget.cost("macs", kept)) == (weights, macs)


@pytest.mark.parametrize("name", NETS)
def test_every_tensor_has_the_size_that_was_predicted(name):
    model, budget = net(name), problem(name).budget
    for seed in range(PLANS):
        plan, kept = planned(name, seed)
        slim = slimmed(model, plan)
        parameters = dict(slim.named_parameters())
        assert budget.sizes(kept) == {layer: parameters[layer].numel() for layer in budget.sizes(kept)}
        held = {id(t): t.numel() * t.element_size() for t in slim.state_dict(keep_vars=True).values()}
        assert budget.cost("bytes", kept) - budget.header == sum(held.values())


@pytest.mark.parametrize("name", NETS)
def test_a_plan_comes_back_from_json_and_cuts_a_fresh_model_alike(name):
    plan, _ = planned(name, 4)
    again = ChannelPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    left, right = slimmed(net(name), plan), slimmed(net(name), again)
    assert str(left) == str(right)
    state = right.state_dict()
    assert list(left.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in left.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_the_slim_net_keeps_names_modes_and_ties_and_leaves_the_model(name):
    model = net(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    list(model.children())[-1].train()
    plan, _ = planned(name, 3)
    slim = slimmed(model, plan)
    assert [n for n, _ in slim.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert slim.state_dict().keys() == before.keys()
    assert [m.training for m in slim.children()] == [m.training for m in model.children()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_the_slim_net_can_be_trained(name):
    slim = slimmed(net(name), planned(name, 2)[0]).train()
    slim(picture(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())


def test_layers_say_their_new_sizes():
    groups = problem("squeeze-excite").scope.groups
    plan = ChannelPlan.of(problem("squeeze-excite").model, groups, {"stem": [1, 2, 5], "squeeze": [0], "mix": [3, 4]})
    slim = slimmed(net("squeeze-excite"), plan)
    assert (slim.stem.in_channels, slim.stem.out_channels, slim.norm.num_features) == (3, 3, 3)
    assert (slim.mix.in_channels, slim.mix.out_channels, slim.fc.in_features) == (3, 2, 2)


def test_what_the_plan_keeps_is_what_the_tensors_hold():
    model = net("resnet")
    groups = problem("resnet").scope.groups
    plan = ChannelPlan.of(model, groups, {group.name: [4, 0, 2] for group in groups})
    slim = slimmed(model, plan)
    assert plan.kept == {group.name: (0, 2, 4) for group in groups}
    expected = model.layer1.conv1.weight[[0, 2, 4]][:, [0, 2, 4]]
    assert torch.equal(slim.layer1.conv1.weight, expected)
    assert torch.equal(slim.fc.weight, model.fc.weight[:, [0, 2, 4]])


def test_tied_weights_stay_one_tensor():
    slim = slimmed(net("tied weights"), planned("tied weights", 3)[0])
    assert slim.first.weight is slim.second.weight


def test_a_frozen_parameter_stays_frozen():
    model = net("flattened")
    model.conv1.weight.requires_grad_(False)
    slim = slimmed(model, planned("flattened", 0)[0])
    assert [n for n, p in slim.named_parameters() if not p.requires_grad] == ["conv1.weight"]


# what is no plan


@pytest.mark.parametrize(
    "kept", [{}, {"wide": [0]}, {"wide": [0], "mix": [0], "up": [0], "down": [0]}], ids=["none", "few", "more"]
)
def test_a_plan_for_other_groups_is_refused(kept):
    with pytest.raises(UsageError, match="other groups"):
        ChannelPlan.of(net("gated halves"), problem("gated halves").scope.groups, kept)


@pytest.mark.parametrize("channels", [[], [8], [-1], [0, 99]])
def test_a_group_keeps_at_least_one_of_its_own_channels(channels):
    kept = {"wide": [0], "mix": [0], "up": channels}
    with pytest.raises(UsageError, match="up: channels"):
        ChannelPlan.of(net("gated halves"), problem("gated halves").scope.groups, kept)


@pytest.mark.parametrize("other", ["vit", "mobilenet"])
def test_a_plan_does_not_cut_another_model(other):
    with pytest.raises(UsageError, match="the plan"):
        slimmed(net(other), planned("resnet", 0)[0] if other == "vit" else grown("mobilenet"))


def grown(name: str) -> ChannelPlan:
    """A plan that keeps more than there is."""
    plan = planned(name, 3)[0].to_json()
    plan["tensors"]["fc.weight"] = {"1": [0, 99]}
    return ChannelPlan.from_json(plan)


def test_the_plan_of_everything_cuts_nothing():
    plan, _ = planned("resnet", 1)
    assert plan.tensors == {}


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"groups": {}},
        {"groups": {"a": {"kept": "x", "total": 1}}, "tensors": {}, "attributes": {}},
        {"groups": {}, "tensors": {"a": {"x": [1]}}, "attributes": {}},
    ],
)
def test_what_is_no_plan_is_refused(content):
    with pytest.raises(UsageError, match="no plan of channels"):
        ChannelPlan.from_json(content)


# fewer heads

B, T, S, E, H = 2, 4, 5, 12, 3


def attentions(**options: Any) -> tuple[nn.MultiheadAttention, FewerHeads]:
    """Attention as it was made, off its fused path, and the same as what computes with fewer heads."""
    attention = filled(nn.MultiheadAttention(E, H, **options))
    return attention, FewerHeads(attention)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocked(*shape: int) -> Tensor:
    """A bool mask that leaves at least the first place of every row."""
    mask = tensor(*shape, seed=5) > 0
    mask[..., 0] = False
    return mask


def close(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return left is right
    return left.shape == right.shape and torch.allclose(left, right, atol=1e-6)


MASKS = {
    "no mask": None,
    "bool": blocked(T, S),
    "float": tensor(T, S, seed=3),
    "bool per head": blocked(B * H, T, S),
    "float per head": tensor(B * H, T, S, seed=4),
}
PADDING = {"no padding": None, "bool padding": blocked(B, S), "float padding": tensor(B, S, seed=6)}


@pytest.mark.parametrize(
    ("mask", "padding"),
    [(m, p) for m, p in itertools.product(MASKS, PADDING) if m.split()[0] == p.split()[0] or "no" in (m[:2], p[:2])],
)
@pytest.mark.parametrize("first", [True, False], ids=["batch first", "tokens first"])
def test_all_heads_compute_what_torch_computes(mask, padding, first):
    theirs, ours = attentions(batch_first=first)
    q, k, v = tensor(B, T, E), tensor(B, S, E, seed=1), tensor(B, S, E, seed=2)
    if not first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for need, average in ((False, True), (True, True), (True, False)):
        options = {"attn_mask": MASKS[mask], "key_padding_mask": PADDING[padding]}
        options |= {"need_weights": need, "average_attn_weights": average}
        for left, right in zip(ours(q, k, v, **options), theirs(q, k, v, **options), strict=True):
            assert close(left, right)


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "tokens first"])
@pytest.mark.parametrize("mask", ["no mask", "bool", "float", "one a head"])
def test_all_heads_compute_what_torch_computes_without_a_batch(mask, first):
    theirs, ours = attentions(batch_first=first)
    q, k, v = tensor(T, E), tensor(S, E, seed=1), tensor(S, E, seed=2)
    options = {"attn_mask": blocked(H, T, S) if mask == "one a head" else MASKS[mask]}
    options |= {"key_padding_mask": blocked(S) if mask != "float" else None}
    for average in (True, False):
        for left, right in zip(
            ours(q, k, v, average_attn_weights=average, **options),
            theirs(q, k, v, average_attn_weights=average, **options),
            strict=True,
        ):
            assert close(left, right)


@pytest.mark.parametrize("need", [True, False])
def test_all_heads_compute_what_torch_computes_with_a_causal_mask(need):
    theirs, ours = attentions(batch_first=True)
    x = tensor(B, T, E)
    options = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(T), "is_causal": True, "need_weights": need}
    assert close(ours(x, x, x, **options)[0], theirs(x, x, x, **options)[0])


def test_all_heads_compute_what_torch_computes_without_biases():
    theirs, ours = attentions(batch_first=True, bias=False)
    x = tensor(B, T, E)
    assert close(ours(x, x, x)[0], theirs(x, x, x)[0])
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_all_heads_drop_shares_in_training_only():
    _, ours = attentions(batch_first=True, dropout=0.5)
    x = tensor(B, T, E)
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    ours.train()
    assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


def test_gradients_of_all_heads_are_those_of_torch():
    theirs, ours = attentions(batch_first=True)
    x = tensor(B, T, E)
    expected = torch.autograd.grad(theirs(x, x, x)[0].square().sum(), list(theirs.parameters()))
    found = torch.autograd.grad(ours(x, x, x)[0].square().sum(), list(ours.parameters()))
    assert all(torch.allclose(f, e, atol=1e-5) for f, e in zip(found, expected, strict=True))


def test_fewer_heads_keep_names_and_say_their_number():
    slim = slimmed(net("vit"), planned("vit", 0)[0])
    attention = slim.blocks[0].attention
    assert isinstance(attention, FewerHeads) and attention.num_heads == 1
    assert attention.in_proj_weight.shape == (9, 12) and attention.out_proj.weight.shape == (12, 3)
    assert (attention.out_proj.in_features, attention.out_proj.out_features) == (3, 12)


def test_fewer_linear_heads_say_their_number():
    slim = slimmed(net("vit of linears"), planned("vit of linears", 0)[0])
    attention = slim.blocks[1].attention
    assert attention.num_heads == 1 and attention.qkv.out_features == 12 and attention.proj.in_features == 4
