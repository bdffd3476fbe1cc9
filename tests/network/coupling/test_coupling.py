"""Which channels go together, and that finding out leaves the model as it was."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.network.channels import ChannelPlan, slimmed
from allot.network.coupling.find import find_groups
from allot.network.layers import Group
from allot.pruning.setup import make_problem
from allot.run.patterns import Channels
from network.coupling.nets import (
    NETS,
    PICTURE,
    Answer,
    Answering,
    Block,
    ByName,
    Record,
    Residual,
    conv,
    filled,
    net,
    picture,
)


class Made(nn.Module):
    """Parts by name, and what is done with them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.does = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


def made(forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> nn.Module:
    return filled(Made(forward, **parts))


def totals(model: nn.Module, example: Any = None) -> dict[str, int]:
    groups, _ = find_groups(model, picture() if example is None else example)
    assert len({group.name for group in groups}) == len(groups)
    return {group.name: group.total for group in groups}


def tensors(group: Group, *, reads: bool | None = None) -> set[tuple[str, int]]:
    return {(m.tensor, m.dim) for m in group.members if reads is None or m.reads is reads}


def found(model: nn.Module, name: str, example: Any = None) -> Group:
    groups, _ = find_groups(model, picture() if example is None else example)
    return next(group for group in groups if group.name == name)


def wrong(model: nn.Module, example: Any = None, plans: int = 30) -> int:
    """How many of some random plans give, cut, anything but what zeroing gives."""
    example = picture() if example is None else example
    groups, _ = find_groups(model, example)
    draw, failed = random.Random(0), 0
    for _ in range(plans if groups else 0):
        kept = {g.name: draw.sample(range(g.total), draw.randint(1, g.total)) for g in groups}
        plan = ChannelPlan.of(model, groups, kept)
        zeroed = {n: p.detach() * plan.mask(n, p.shape) for n, p in model.named_parameters()}
        with torch.no_grad():
            theirs = torch.func.functional_call(model, zeroed, (example,))
            try:
                failed += not torch.allclose(slimmed(model, plan)(example), theirs, atol=1e-5)
            except (RuntimeError, ValueError):
                failed += 1
    return failed


# groups


GROUPS = {
    "resnet": {"stem": 6, "layer1.conv1": 6, "layer2.conv1": 8, "layer2.conv2": 8},
    "mobilenet": {"stem": 4, "block1.expand": 10, "block2.expand": 12, "block2.project": 6},
    "densenet": {"stem": 6, "conv1": 4, "conv2": 5},
    "inception": {"one": 4, "three": 6, "deep": 7, "pooled": 5, "mix": 8},
    "squeeze-excite": {"stem": 8, "squeeze": 4, "mix": 6},
    "vit": {"blocks.0.attention.heads": 4, "blocks.0.up": 10, "blocks.1.attention.heads": 4, "blocks.1.up": 10},
    "vit of linears": {
        "blocks.0.attention.heads": 3, "blocks.0.up": 10, "blocks.1.attention.heads": 3, "blocks.1.up": 10,
    },
    "grouped conv": {"stem": 4, "grouped": 6, "mix": 6},
    "flattened": {"conv1": 5, "conv2": 6, "hidden": 7},
    "gated halves": {"wide": 6, "mix": 5, "up": 8},
    "tied weights": {"into": 6, "first": 6, "mix": 7},
    "biases without norms": {"conv1": 7, "conv2": 6, "conv3": 4},
    "transposed": {"down": 6, "up": 8, "again": 4},
    "instance norm": {"conv1": 6, "conv2": 8},
    "applied twice": {"conv1": 6, "conv2": 6, "head": 5},
    "scaled branch": {"stem": 6, "up": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_groups_are_named_after_their_first_writer_and_hold_every_channel(name):
    assert totals(net(name)) == GROUPS[name]


def test_a_residual_is_one_group_of_everything_that_writes_or_scales_it():
    group = found(net("resnet"), "stem")
    norms = {(f"{n}.{t}", 0) for n in ("norm", "layer1.bn2") for t in ("weight", "bias", "running_mean", "running_var")}
    assert tensors(group, reads=False) == norms | {("stem.weight", 0), ("layer1.conv2.weight", 0)}
    assert tensors(group, reads=True) == {
        ("layer1.conv1.weight", 1), ("layer2.conv1.weight", 1), ("layer2.shortcut.0.weight", 1),
    }  # fmt: skip
    assert group.layers == ("stem", "layer1.conv2")


def test_a_depthwise_conv_goes_with_the_channels_it_reads():
    group = found(net("mobilenet"), "block2.expand")
    assert ("block2.depthwise.weight", 0) in tensors(group, reads=False)
    assert tensors(group, reads=True) == {("block2.project.weight", 1)}


def test_channels_of_a_concatenation_lie_behind_each_other_in_what_reads_it():
    group = found(net("inception"), "pooled")
    at = next(m.places for m in group.members if m.tensor == "mix.weight")
    assert at == tuple((11 + i,) for i in range(5))


def test_a_flattened_channel_is_a_run_of_columns():
    at = next(m.places for m in found(net("flattened"), "conv2").members if m.tensor == "hidden.weight")
    assert at == tuple(tuple(range(9 * i, 9 * i + 9)) for i in range(6))


def test_halves_that_multiply_each_other_go_in_pairs():
    at = next(m.places for m in found(net("gated halves"), "wide").members if m.tensor == "wide.weight")
    assert at == tuple((i, i + 6) for i in range(6))


def test_a_head_is_its_rows_of_queries_keys_and_values_and_its_columns_behind():
    group = found(net("vit"), "blocks.0.attention.heads")
    rows = next(m.places for m in group.members if m.tensor.endswith("in_proj_weight"))
    assert rows[1] == (3, 4, 5, 15, 16, 17, 27, 28, 29)
    assert next(m.places for m in group.members if m.reads)[1] == (3, 4, 5)
    assert group.attributes == {"blocks.0.attention": {"num_heads": 1}}


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "grouped conv", "gated halves"])
def test_groups_do_not_depend_on_the_order_of_registration(name):
    model, turned = net(name), net(name)
    for module in turned.modules():
        if isinstance(module, nn.Sequential):
            continue  # runs in this order
        module._modules = dict(reversed(module._modules.items()))
        module._parameters = dict(reversed(module._parameters.items()))
    groups, _ = find_groups(model, picture())
    again, _ = find_groups(turned, picture())
    assert [(g.name, g.layers, set(g.members)) for g in groups] == [(g.name, g.layers, set(g.members)) for g in again]


def test_a_norm_over_a_concatenation_is_cut_by_the_group_that_writes_each_part():
    group = found(net("densenet"), "conv1")
    at = {m.tensor: m.places for m in group.members}
    assert at["norm2.weight"] == at["norm3.running_var"] == tuple((6 + i,) for i in range(4))


# what stays whole


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def between(part: nn.Module, inside: int = 6, out: int = 6) -> nn.Module:
    """`part` between two convs."""
    return made(
        lambda self, x: self.last(F.relu(self.part(self.first(x)))),
        first=conv(3, inside, bias=True), part=part, last=conv(out, 4, 1, bias=True),
    )  # fmt: skip


WHOLE = {
    "the classifier's output": (lambda: net("resnet"), "fc", "output"),
    "what a layer norm normalises": (lambda: net("vit"), "patches", "normalises channels together"),
    "what a group norm over several normalises": (
        lambda: between(nn.GroupNorm(2, 6)), "first", "normalises channels together",
    ),
    "what is normalised by its neighbours": (lambda: between(nn.LocalResponseNorm(3)), "first", ""),
    "a depthwise conv that doubles its channels": (
        lambda: between(conv(4, 8, groups=4), 4, 8), "part", "several output channels for each input channel",
    ),
    "what a parametrized conv writes": (
        lambda: between(nn.utils.parametrizations.weight_norm(conv(6, 6))), "first", "parametrized",
    ),
    "what is viewed at a size in the code": (
        lambda: made(lambda s, x: s.fc(s.a(x).view(-1, 6, 64).mean(2)), a=conv(3, 6), fc=nn.Linear(6, 5)), "a", "",
    ),
    "what a softmax runs over": (lambda: between(nn.Softmax(1)), "first", ""),
    "what is split at sizes in the code": (
        lambda: made(
            lambda s, x: sum(mean(part).sum(1) for part in s.b(s.a(x)).split([3, 5], 1)), a=conv(3, 6), b=conv(6, 8),
        ),
        "b",
        "",
    ),
    "what an unknown layer reads": (
        lambda: made(
            lambda s, x: s.out(s.lstm(s.a(x).flatten(2).transpose(1, 2))[0][:, 0]),
            a=conv(3, 6), lstm=nn.LSTM(6, 5, batch_first=True), out=nn.Linear(5, 4),
        ),
        "a",
        "cannot make smaller",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_what_cannot_go_stays_whole_and_says_why(what):
    make, name, reason = WHOLE[what]
    groups, skipped = find_groups(make(), picture())
    assert name not in {group.name for group in groups}
    assert reason in skipped[name] and len(skipped[name]) > 10


@pytest.mark.parametrize("what", WHOLE)
def test_what_is_found_beside_what_stays_whole_can_go(what):
    assert wrong(WHOLE[what][0](), plans=6) == 0


def test_other_groups_go_on_where_one_fails():
    model = made(
        lambda s, x: s.out(mean(F.relu(s.deep(s.first(x).softmax(1))))),
        first=conv(3, 6), deep=conv(6, 7, bias=True), out=nn.Linear(7, 5),
    )  # fmt: skip
    assert totals(model) == {"deep": 7}


def test_other_groups_of_a_sequential_go_on_where_the_first_fails():
    model = filled(nn.Sequential(conv(3, 6), nn.Softmax(1), conv(6, 5), nn.ReLU(), conv(5, 4), nn.ReLU(), conv(4, 3)))
    assert totals(model) == {"2": 5, "4": 4}


def test_heads_of_another_layout_than_assumed_are_found_out():
    class Interleaved(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = 4, nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
            return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = made(lambda s, x: s.out(x + s.a(x)), a=Interleaved(), out=nn.Linear(8, 3))
    groups, skipped = find_groups(model, torch.randn(1, 5, 8))
    assert not groups and "a.heads" in skipped


@pytest.mark.parametrize(
    "options", [{"kdim": 6, "vdim": 6}, {"add_bias_kv": True}], ids=lambda options: next(iter(options))
)
def test_attention_that_holds_more_than_heads_stays_whole(options):
    memory = torch.randn(1, 4, options.get("kdim", 8))
    model = made(
        lambda s, x: s.a(x, memory, memory)[0], a=nn.MultiheadAttention(8, 2, batch_first=True, **options)
    )  # fmt: skip
    assert totals(model, torch.randn(1, 5, 8)) == {}


def test_a_model_that_cannot_be_traced_is_refused():
    attention = nn.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=True)
    with pytest.raises(UsageError, match="cannot be traced"):
        find_groups(made(lambda s, x: s.a(x, x, x)[0], a=attention), torch.randn(1, 5, 8))


# wrong couplings


def picked(pick: Callable[[Tensor], Tensor]) -> nn.Module:
    """A net that picks channels by their number."""
    return made(
        lambda s, x: (lambda y: s.out(mean(s.b(y) * pick(y).sigmoid())))(F.relu(s.a(x))),
        a=conv(3, 6, bias=True), b=conv(6, 6, bias=True), out=nn.Linear(6, 5),
    )  # fmt: skip


PICKS = {
    "the first": lambda y: y[:, :1],
    "pairs": lambda y: (y[:, ::2] * y[:, 1::2]).mean(1, keepdim=True),
    "turned by one": lambda y: y.roll(1, 1),
    "the largest": lambda y: y.amax(1, keepdim=True),
    "their mean": lambda y: y.mean(1, keepdim=True),
}


@pytest.mark.parametrize("pick", PICKS)
def test_channels_that_are_picked_by_number_go_right_or_not_at_all(pick):
    assert wrong(picked(PICKS[pick])) == 0


def test_channels_that_are_repeated_go_right_or_not_at_all():
    assert wrong(picked(lambda y: y[:, ::2].repeat_interleave(2, 1))) == 0


def test_a_channel_ahead_of_one_that_is_picked_by_number_does_not_go():
    assert wrong(picked(lambda y: y[:, 1:2])) == 0


def test_channels_that_are_mirrored_go_right_or_not_at_all():
    model = made(lambda s, x: (lambda y: s.out(y + y.flip(1)))(s.a(x)), a=conv(3, 8, bias=True), out=conv(8, 3, 1))
    assert wrong(model) == 0


def test_a_slice_from_the_end_is_followed_in_no_time():
    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)  # seconds; memory is gone after a minute
    try:
        assert wrong(picked(lambda y: y[:, -1:]), plans=5) == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_channels_that_a_transposed_conv_of_groups_reads_go_evenly():
    assert wrong(between(nn.ConvTranspose2d(8, 8, 3, groups=2, padding=1), 8, 8)) == 0


def test_channels_that_a_depthwise_transposed_conv_reads_go_right():
    model = between(nn.ConvTranspose2d(6, 6, 3, groups=6, padding=1))
    assert totals(model) == {"first": 6} and wrong(model) == 0


def test_channels_that_are_shuffled_go_right_or_not_at_all():
    model = made(
        lambda s, x: s.out(s.b(F.channel_shuffle(F.relu(s.a(x)), 2))),
        a=conv(3, 8, bias=True), b=conv(8, 8, groups=2), out=conv(8, 3, 1),
    )  # fmt: skip
    assert wrong(model) == 0


def joined(norm: nn.Module) -> nn.Module:
    return made(
        lambda s, x: s.out(F.relu(s.norm(torch.cat((s.a(x), s.b(x)), 1)))),
        a=conv(3, 4, bias=True), b=conv(3, 6, bias=True), norm=norm, out=conv(10, 3, 1),
    )  # fmt: skip


def test_a_batch_norm_without_tensors_over_a_concatenation_goes_right():
    model = joined(nn.BatchNorm2d(10, affine=False, track_running_stats=False))
    assert totals(model) == {"a": 4, "b": 6} and wrong(model) == 0


def test_an_instance_norm_over_a_concatenation_loses_channels_with_either_part():
    model = joined(nn.InstanceNorm2d(10))
    assert totals(model) == {"a": 4, "b": 6} and wrong(model) == 0


def test_a_group_norm_of_one_channel_each_loses_channels():
    model = between(nn.GroupNorm(6, 6))
    assert totals(model) == {"first": 6} and wrong(model) == 0


def test_a_transformer_encoder_of_torch_loses_heads_and_hidden_units():
    layer = nn.TransformerEncoderLayer(8, 4, 10, batch_first=True)
    model = made(lambda s, x: s.out(s.body(x).mean(1)), body=nn.TransformerEncoder(layer, 2), out=nn.Linear(8, 3))
    example = torch.randn(1, 5, 8)
    assert totals(model, example) == {
        "body.layers.0.self_attn.heads": 4, "body.layers.0.linear1": 10,
        "body.layers.1.self_attn.heads": 4, "body.layers.1.linear1": 10,
    }  # fmt: skip
    assert wrong(model, example, plans=5) == 0


# the model is left alone


def snapshot(model: nn.Module) -> Any:
    held = {n: (id(t), t.detach().clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    grads = {n: (id(p.grad), p.grad) for n, p in model.named_parameters()}
    modules = {
        n: (id(m), m.training, *map(dict, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)))
        for n, m in model.named_modules()
    }
    return held, grads, modules


def unchanged(model: nn.Module, before: Any) -> bool:
    after = snapshot(model)
    return (
        before[0].keys() == after[0].keys()
        and all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(
            before[0].values(), after[0].values(), strict=True))
        and before[1] == after[1]
        and before[2] == after[2]
    )  # fmt: skip


@pytest.mark.parametrize("state", ["as it was made", "frozen", "partly frozen", "training", "mixed modes", "hooked"])
@pytest.mark.parametrize("name", ["resnet", "vit", "tied weights"])
def test_the_model_is_left_as_it_was_and_its_state_makes_no_difference(name, state):
    model = net(name)
    if state in ("frozen", "partly frozen"):
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(state == "partly frozen" and i % 2 == 0)
    elif state in ("training", "mixed modes"):
        for i, module in enumerate(model.modules()):
            module.training = state == "training" or i % 2 == 0
    elif state == "hooked":
        list(model.children())[1].register_forward_hook(lambda module, inputs, output: None)
        model.zero_grad()
        model(picture(2)).sum().backward()
    before = snapshot(model)
    assert totals(model) == GROUPS[name]
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["resnet", "vit of linears", "vit"])
def test_the_generator_of_the_caller_is_left_as_it_was(name):
    model, before = net(name), torch.get_rng_state()
    find_groups(model, picture())
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
def test_it_does_not_matter_whether_gradients_are_on(around):
    with around():
        assert totals(net("resnet")) == GROUPS["resnet"]


def test_inputs_may_come_as_a_dict_or_a_tuple():
    example = {"left": picture(), "right": picture()[:, :2]}
    assert totals(filled(ByName()), example) == totals(filled(ByName()), tuple(example.values())) == {"left": 6}


ANSWERS = {
    "a dict": lambda y: {"logits": y, "count": 3},
    "a tuple": lambda y: (y, None, y.argmax(-1)),
    "a list in a dict": lambda y: {"heads": [y[:, :2], y[:, 2:]]},
    "a dataclass that is a mapping": lambda y: Answer(y, (y * 2,)),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_outputs_may_be_wrapped(answer):
    model = filled(Answering(ANSWERS[answer]))
    assert totals(model) == {f"body.{name}": total for name, total in GROUPS["resnet"].items()}


def test_outputs_may_be_a_plain_dataclass():
    assert totals(filled(Answering(Record))) == {f"body.{name}": total for name, total in GROUPS["resnet"].items()}


def test_a_model_without_gradients_to_follow_is_refused():
    with pytest.raises(UsageError, match="detach"):
        find_groups(filled(Answering(lambda y: y.detach())), picture())


def test_a_model_that_cannot_be_copied_is_refused():
    model = net("resnet")
    model.lock = (i for i in range(3))
    with pytest.raises(UsageError, match="ResNet cannot be copied"):
        find_groups(model, picture())


def test_a_model_in_float64_or_one_that_insists_on_float32_is_followed():
    model = made(lambda s, x: s.out(mean(F.relu(s.a(x.float())))), a=conv(3, 6, bias=True), out=nn.Linear(6, 5))
    assert totals(model) == {"a": 6}
    assert totals(net("resnet").double(), picture().double()) == GROUPS["resnet"]


# the traps of Torch-Pruning


def test_trap_1_places_in_the_groups_of_a_grouped_conv_go_together():
    groups, _ = find_groups(net("grouped conv"), picture())
    at = {group.name: {m.tensor: m.places for m in group.members} for group in groups}
    assert at["stem"]["stem.weight"] == tuple((i, i + 4) for i in range(4))
    assert at["stem"]["grouped.weight"] == tuple((i,) for i in range(4))
    assert at["grouped"]["grouped.weight"] == tuple((i, i + 6) for i in range(6))
    assert wrong(net("grouped conv")) == 0


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_trap_2_groups_of_a_conv_never_come_to_differ_in_size(kept):
    model = net("grouped conv")
    groups, _ = find_groups(model, picture())
    slim = slimmed(model, ChannelPlan.of(model, groups, {group.name: range(kept) for group in groups}))
    assert (slim.grouped.in_channels, slim.grouped.out_channels, slim.grouped.groups) == (2 * kept, 2 * kept, 2)
    assert slim(picture()).shape == (1, 5)


@pytest.mark.parametrize("times", [2, 3])
def test_trap_3_a_depthwise_conv_that_multiplies_channels_stays_whole(times):
    groups, skipped = find_groups(between(conv(4, 4 * times, groups=4), 4, 4 * times), picture())
    assert not groups
    assert "several output channels" in skipped["first"] and "several output channels" in skipped["part"]


def test_trap_4_frozen_parameters_are_traced_and_stay_frozen_when_cut():
    model = net("resnet")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.fc.weight.requires_grad_()
    groups, _ = find_groups(model, picture())
    slim = slimmed(model, ChannelPlan.of(model, groups, {group.name: (0, 1) for group in groups}))
    assert [n for n, p in slim.named_parameters() if p.requires_grad] == ["fc.weight"]


def test_trap_5_modes_stay_and_no_grad_does_not_matter():
    model = net("resnet").train()
    model.norm.eval()
    with torch.no_grad():
        assert totals(model) == GROUPS["resnet"]
    assert [n for n, m in model.named_modules() if not m.training] == ["norm"]


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_trap_6_a_batch_is_never_unpacked_into_arguments(samples):
    seen = []
    model = made(
        lambda s, x: seen.append(x.shape) or s.out(mean(F.relu(s.a(x)))), a=conv(3, 6), out=nn.Linear(6, 5),
    )  # fmt: skip
    assert totals(model, picture(samples)) == {"a": 6}
    assert set(seen) == {(samples, *PICTURE)}


def test_trap_7_a_plan_that_is_used_again_removes_no_more():
    model = net("resnet")
    groups, _ = find_groups(model, picture())
    plan = ChannelPlan.of(model, groups, {group.name: (1, 3, 4) for group in groups})
    first, second = slimmed(model, plan), slimmed(model, plan)
    assert plan == ChannelPlan.of(model, groups, plan.kept)
    assert torch.equal(first(picture()), second(picture()))


def test_trap_8_models_that_are_traced_after_each_other_know_nothing_of_each_other():
    first, again = net("grouped conv"), net("grouped conv")
    alone = find_groups(again, picture())
    find_groups(first, picture())
    find_groups(net("vit"), picture())
    assert find_groups(again, picture()) == find_groups(first, picture()) == alone


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_trap_9_parameters_of_no_layer_are_cut_along_the_dimension_that_holds_channels(shape):
    model = made(
        lambda s, x: s.out(mean(s.scale * s.a(x))), a=conv(3, 6, bias=True), out=nn.Linear(6, 5),
        scale=nn.Parameter(torch.zeros(shape)),
    )  # fmt: skip
    assert ("scale", shape.index(6)) in tensors(found(model, "a"), reads=False)
    assert wrong(model, plans=5) == 0


def test_trap_10_a_coupled_group_has_one_count_only():
    model = net("resnet")
    groups, _ = find_groups(model, picture())
    held = [(m.tensor, m.dim, at) for group in groups for m in group.members for where in m.places for at in where]
    assert len(held) == len(set(held))  # no place belongs to two groups
    with pytest.raises(UsageError, match=r"layer1\.conv2"):
        ChannelPlan.of(model, groups, {group.name: (0,) for group in groups} | {"layer1.conv2": (0, 1)})


def test_trap_11_a_parametrized_conv_stays_whole_and_so_does_what_it_reads():
    groups, skipped = find_groups(between(nn.utils.parametrizations.weight_norm(conv(6, 6))), picture())
    assert not groups and "remove the parametrization" in skipped["first"]


def test_trap_12_parameters_of_the_slim_net_are_new_and_the_old_ones_go_on_being_trained():
    model = net("resnet")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    groups, _ = find_groups(model, picture())
    slim = slimmed(model, ChannelPlan.of(model, groups, {group.name: (0, 1) for group in groups}))
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(p.untyped_storage().data_ptr() not in memory and p.is_leaf for p in slim.parameters())
    before = copy.deepcopy(slim.state_dict())
    model(picture(2)).sum().backward()
    optimiser.step()
    assert all(torch.equal(before[name], value) for name, value in slim.state_dict().items())
    assert all(p.grad is None for p in slim.parameters())


def test_trap_13_macs_are_those_of_layers_alone_not_of_norms_and_pools():
    model = nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), conv(4, 5), nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    ).eval()  # fmt: skip
    budget = make_problem(model, Budget.parse("macs=50%"), Channels(), example=picture()).budget
    assert budget.cost("macs", {"0": 4, "4": 5}) == 3 * 4 * 9 * 64 + 4 * 5 * 9 * 16 + 5 * 2


def test_blocks_and_residuals_may_be_the_model_itself():
    assert totals(filled(Residual(3, 6))) == {"conv1": 6}
    example = torch.randn(1, 5, 8)
    block = filled(Block(8, 6, nn.MultiheadAttention(8, 2, batch_first=True)))
    assert totals(block, example) == {"attention.heads": 2, "up": 6}
