"""Watched inputs against patches cut by hand, watched outputs against modules edited by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.hooks import Moments, biases_of, watched_outputs
from allot.network.input_squares import Squares, input_norms, watched_squares
from allot.network.layers import Rules, Scope


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squares_of(model: nn.Module, *args, rules: Rules | None = None, **kwargs) -> dict[str, Tensor]:
    sums: Squares = {}
    scope = Scope.of(model, rules)
    with watched_squares(model, scope, sums), torch.no_grad():
        model(*args, **kwargs)
    seen = {name: input_norms(scope[name], squares).square().float() for name, squares in sums.items()}
    for layer in scope:
        assert layer.name not in seen or (seen[layer.name].shape == layer.shape and not seen[layer.name].requires_grad)
    return seen


def conv_squares(model: nn.Module, x: Tensor) -> Tensor:
    """One weight at a time: the sum of the squares of every input entry that it meets, by index arithmetic."""
    dims = x.dim() - 2
    pads = model._reversed_padding_repeated_twice if isinstance(model.padding, str) else None
    if pads is None:
        pads = [p for p in reversed(model.padding) for _ in range(2)]
    mode = {"zeros": "constant"}.get(model.padding_mode, model.padding_mode)
    padded = F.pad(x, pads, mode=mode)
    squares = torch.zeros(model.weight.shape)
    outs = [
        (padded.shape[2 + d] - model.dilation[d] * (model.kernel_size[d] - 1) - 1) // model.stride[d] + 1
        for d in range(dims)
    ]
    per_group_out, per_group_in = model.out_channels // model.groups, model.in_channels // model.groups
    for place in itertools.product(*map(range, squares.shape)):
        o, i, *kernel = place
        channel = (o // per_group_out) * per_group_in + i
        for position in itertools.product(*map(range, outs)):
            at = tuple(position[d] * model.stride[d] + kernel[d] * model.dilation[d] for d in range(dims))
            squares[place] += padded[(slice(None), channel, *at)].square().sum()
    return squares


def transposed_squares(model: nn.Module, x: Tensor) -> Tensor:
    dims = x.dim() - 2
    squares = torch.zeros(model.weight.shape)
    out = model(x).shape[2:]
    for place in itertools.product(*map(range, squares.shape)):
        i, _, *kernel = place
        for position in itertools.product(*map(range, x.shape[2:])):
            at = [position[d] * model.stride[d] + kernel[d] * model.dilation[d] - model.padding[d] for d in range(dims)]
            if all(0 <= a < size for a, size in zip(at, out, strict=True)):  # the padding is cut off
                squares[place] += x[(slice(None), i, *position)].square().sum()
    return squares


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(3, 4, 3, stride=2),
        lambda: nn.Conv1d(2, 2, 3, padding="same", dilation=2),
        lambda: nn.Conv2d(2, 3, (3, 2), padding=1),
        lambda: nn.Conv2d(4, 4, 3, groups=2, stride=(2, 1), dilation=(1, 2), padding=2),
        lambda: nn.Conv2d(3, 6, 3, groups=3),
        lambda: nn.Conv2d(2, 2, 1, stride=2, bias=False),
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv3d(2, 2, (1, 2, 2), padding=(0, 1, 0)),
    ],
)
def test_inputs_of_a_convolution_are_the_entries_of_its_patches(make):
    model = make()
    x = rand(
        2, model.in_channels, *([6] if model.weight.dim() == 3 else [5, 4] if model.weight.dim() == 4 else [2, 3, 3])
    )
    assert torch.allclose(squares_of(model, x)["weight"], conv_squares(model, x), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_inputs_of_any_2d_convolution_are_the_entries_of_its_patches(data):
    groups = data.draw(st.sampled_from([1, 2]))
    pick = lambda low, high: (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))  # noqa: E731
    model = nn.Conv2d(2, 2, pick(1, 3), stride=pick(1, 2), dilation=pick(1, 2), padding=pick(0, 2), groups=groups)
    x = rand(1, 2, 5, 6, seed=data.draw(st.integers(0, 99)))
    assert torch.allclose(squares_of(model, x)["weight"], conv_squares(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvTranspose1d(3, 4, 3, stride=2),
        lambda: nn.ConvTranspose2d(2, 3, 3, padding=1),
        lambda: nn.ConvTranspose2d(4, 4, (3, 2), groups=2, stride=2, padding=1, output_padding=1, dilation=(1, 2)),
    ],
)
def test_inputs_of_a_transposed_convolution_leave_out_what_is_cut_off(make):
    model = make()
    x = rand(2, model.in_channels, *([5] if model.weight.dim() == 3 else [4, 3]))
    assert torch.allclose(squares_of(model, x)["weight"], transposed_squares(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 3, 2, 4), (4,)])
def test_inputs_of_a_linear_are_its_columns_over_all_positions(shape):
    model, x = nn.Linear(4, 3), rand(*shape)
    expected = x.reshape(-1, 4).square().sum(0).expand(3, 4)
    assert torch.allclose(squares_of(model, x)["weight"], expected)


def test_inputs_of_a_transformers_conv1d_are_its_rows():
    model, x = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 4), rand(2, 5, 4)
    expected = x.reshape(-1, 4).square().sum(0)[:, None].expand(4, 3)
    assert torch.allclose(squares_of(model, x)["weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_are_summed_in_single_precision_at_least(dtype):
    model, x = nn.Conv2d(2, 3, 3).to(dtype), rand(1, 2, 5, 5).to(dtype)
    expected = conv_squares(nn.Conv2d(2, 3, 3), x.float())
    assert torch.allclose(squares_of(model, x)["weight"], expected, rtol=1e-3)


def test_two_passes_add_up_and_inference_mode_is_no_obstacle():
    model, x = nn.Conv2d(2, 3, 3), rand(2, 2, 5, 5)
    (layer,) = scope = Scope.of(model)
    sums: Squares = {}
    with watched_squares(model, scope, sums), torch.inference_mode():
        model(x[:1])
        model(x[1:])
    found = input_norms(layer, sums["weight"]).square().float()
    assert torch.allclose(found, squares_of(model, x)["weight"], rtol=1e-5)


def by_hand(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], Tensor]:
    """Inputs of the q, k and v projections, and what the output projection gets; `[T, B, E]`."""
    weights = (
        [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        if module.in_proj_weight is None
        else list(module.in_proj_weight.chunk(3))
    )
    biases = [0.0] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.chunk(3))
    inputs = [query, key, value]
    q, k, v = (x @ w.t() + b for x, w, b in zip(inputs, weights, biases, strict=True))
    heads, width = module.num_heads, module.head_dim
    q, k, v = (x.unflatten(-1, (heads, width)).permute(1, 2, 0, 3) for x in (q, k, v))  # [B, H, T, E/H]
    attended = (q @ k.transpose(-1, -2) / math.sqrt(width)).softmax(-1) @ v
    return inputs, attended.permute(2, 0, 1, 3).flatten(-2)


def columns(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).square().sum(0)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 6, "vdim": 5}, {"kdim": 6, "vdim": 5, "bias": False}]
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_inputs_of_an_attention_are_query_key_value_and_what_was_attended(options, mode):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, **options).train(mode == "train")
    q, k, v = rand(3, 2, 8), rand(5, 2, options.get("kdim", 8), seed=1), rand(5, 2, options.get("vdim", 8), seed=2)
    seen = squares_of(model, q, key=k, value=v)
    with torch.no_grad():
        inputs, attended = by_hand(model, q, k, v)
    assert torch.allclose(seen["out_proj.weight"], columns(attended).expand(8, 8), rtol=1e-4)
    if "kdim" in options:
        for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), inputs, strict=True):
            assert torch.allclose(seen[name], columns(x).expand(8, -1), rtol=1e-5)
    else:
        expected = torch.cat([columns(x).expand(8, -1) for x in inputs])
        assert torch.allclose(seen["in_proj_weight"], expected, rtol=1e-5)


def test_inputs_of_an_encoder_layer_are_all_seen_in_eval_mode():
    """Where nothing watches, eval mode takes a fused path that calls none of these modules."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = rand(2, 3, 8)
    seen = squares_of(model, x)
    with torch.no_grad():
        middle = model.norm1(x + model.self_attn(x, x, x)[0])
        hidden = model.linear1(middle).relu()
    assert seen.keys() == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert torch.allclose(seen["linear1.weight"], columns(middle).expand(16, 8), rtol=1e-4)
    assert torch.allclose(seen["linear2.weight"], columns(hidden).expand(8, 16), rtol=1e-4)
    assert torch.allclose(seen["self_attn.in_proj_weight"], columns(x).expand(24, 8), rtol=1e-4)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.alias = self.layer

    def forward(self, x):
        return self.alias(self.layer(x))


def test_a_module_under_two_names_is_seen_once_a_use():
    model, x = Reused(), rand(3, 4)
    expected = columns(x) + columns(model.layer(x).detach())
    assert torch.allclose(squares_of(model, x)["layer.weight"], expected.expand(4, 4), rtol=1e-5)


def test_a_tied_weight_gathers_the_inputs_of_every_use():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), rand(3, 4)
    model[1].weight = model[0].weight
    expected = columns(x) + columns(model[0](x).detach())
    assert torch.allclose(squares_of(model, x)["0.weight"], expected.expand(4, 4), rtol=1e-5)


def test_a_weight_tied_to_a_parameter_of_an_unknown_module_is_seen_at_its_layer():
    class Holder(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return {"shape": x.shape}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.holder = Holder(self.layer.weight)

        def forward(self, x):
            self.holder(x)
            return self.layer(x)

    x = rand(3, 4)
    assert torch.allclose(squares_of(Model(), x)["layer.weight"], columns(x).expand(4, 4))


def test_a_layer_that_is_not_linear_in_its_weight_is_refused_by_name():
    class Standardised(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / self.weight.norm(), self.bias)

    with pytest.raises(UsageError, match=r"0\.weight: Standardised is not linear in its weight"):
        squares_of(nn.Sequential(Standardised(4, 4)), rand(3, 4))


# Outputs


def outputs_of(model: nn.Module, visit, *args) -> Tensor:
    with watched_outputs(model, Scope.of(model), visit), torch.no_grad():
        return model(*args)


def same(moments: Moments, values: Tensor) -> bool:
    """Whether `moments` are those of `values` `[..., C]`."""
    flat = values.detach().reshape(-1, values.shape[-1]).double()
    return (
        bool((moments.count == len(flat)).all())
        and torch.allclose(moments.mean, flat.mean(0), atol=1e-6)
        and torch.allclose(moments.variance, flat.var(0, unbiased=False), rtol=1e-4, atol=1e-6)
    )


PLAIN = {
    "linear": (lambda: nn.Linear(4, 5), (6, 4), lambda y: y),
    "linear on tokens": (lambda: nn.Linear(4, 5), (2, 3, 4), lambda y: y),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), lambda y: y.movedim(1, -1)),
    "conv on one image": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5), lambda y: y.movedim(0, -1)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 5), lambda y: y.movedim(1, -1)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), lambda y: y.movedim(1, -1)),
}


@pytest.mark.parametrize("case", PLAIN)
def test_moments_are_those_of_the_output(case):
    make, shape, last = PLAIN[case]
    model, x, seen = make(), rand(*shape), []
    given = outputs_of(model, lambda layer, moments: seen.append(moments), x)
    assert torch.equal(given, model(x).detach())
    assert len(seen) == 1 and same(seen[0], last(given))


@pytest.mark.parametrize("case", PLAIN)
def test_an_answer_scales_rows_and_shifts_the_bias(case):
    make, shape, _ = PLAIN[case]
    model, x = make(), rand(*shape)
    (layer,) = Scope.of(model)
    scale, shift = rand(layer.rows, seed=1).double(), rand(layer.rows, seed=2).double()
    given = outputs_of(model, lambda layer, moments: (scale, shift), x)
    with torch.no_grad():
        model.weight.copy_(layer.unmatrix(layer.matrix(model.weight) * scale.float()[:, None]))
        model.bias.mul_(scale).add_(shift)
    assert torch.allclose(given, model(x), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_answer_edits_the_projections_of_an_attention(options, mode):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, **options).train(mode == "train")
    torch.nn.init.normal_(model.in_proj_bias)
    args = (rand(3, 2, 8), rand(5, 2, options.get("kdim", 8), seed=1), rand(5, 2, options.get("vdim", 8), seed=2))
    answers = {
        layer.name: (rand(layer.rows, seed=3).double(), rand(layer.rows, seed=4).double()) for layer in Scope.of(model)
    }
    seen = {}

    def visit(layer, moments):
        seen[layer.name] = moments
        return answers[layer.name]

    given, _ = outputs_of(model, visit, *args)
    with torch.no_grad():
        names = ["in_proj_weight"] if not options else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        for i, name in enumerate(names):
            weight, bias = getattr(model, name), model.in_proj_bias.chunk(len(names))[i]
            parts = weight.chunk(3) if not options else [weight]
            inputs = args if not options else [args[i]]
            projected = [x @ w.t() for x, w in zip(inputs, parts, strict=True)]
            before = torch.cat([x.reshape(-1, x.shape[-1]).mean(0) for x in projected])
            assert torch.allclose(seen[name].mean.float(), before + bias, atol=1e-5)
            scale, shift = (value.float() for value in answers[name])
            weight.mul_(scale[:, None])
            bias.mul_(scale).add_(shift)
        scale, shift = (value.float() for value in answers["out_proj.weight"])
        halfway, _ = model(*args)
        assert same(seen["out_proj.weight"], halfway)
        model.out_proj.weight.mul_(scale[:, None])
        model.out_proj.bias.mul_(scale).add_(shift)
        expected, _ = model(*args)
    assert torch.allclose(given, expected, atol=1e-4)


def test_outputs_of_an_encoder_layer_are_all_seen_in_eval_mode():
    model, seen = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), []
    outputs_of(model, lambda layer, moments: seen.append(layer.name), rand(2, 3, 8))
    assert seen == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]


def test_tied_layers_and_shared_modules_are_left_alone():
    model, seen = Reused(), []
    outputs_of(model, lambda layer, moments: seen.append(layer.name), rand(3, 4))
    assert seen == []


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_of_a_layer_is_found(bias):
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 6, bias=bias),
            "conv": nn.ConvTranspose2d(4, 6, 3, bias=bias),
            "one": nn.MultiheadAttention(4, 2, bias=bias),
            "three": nn.MultiheadAttention(4, 2, bias=bias, kdim=3),
        }
    )
    bound = biases_of(model, Scope.of(model))
    found = {layer.name: bound.get(layer.name) for layer in Scope.of(model)}
    expected = {
        "linear.weight": ("linear.bias", slice(0, 6)),
        "conv.weight": ("conv.bias", slice(0, 6)),
        "one.in_proj_weight": ("one.in_proj_bias", slice(0, 12)),
        "one.out_proj.weight": ("one.out_proj.bias", slice(0, 4)),
        "three.q_proj_weight": ("three.in_proj_bias", slice(0, 4)),
        "three.k_proj_weight": ("three.in_proj_bias", slice(4, 8)),
        "three.v_proj_weight": ("three.in_proj_bias", slice(8, 12)),
        "three.out_proj.weight": ("three.out_proj.bias", slice(0, 4)),
    }
    assert found == (expected if bias else dict.fromkeys(expected))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.floats(-1e4, 1e4))
def test_pooled_moments_are_those_of_everything_at_once(sizes, offset):
    values = rand(sum(sizes), 3).double() + offset
    parts = [Moments.of(part) for part in values.split(sizes)]
    pooled = parts[0]
    for part in parts[1:]:
        pooled = pooled + part
    whole = Moments.of(values)
    assert torch.equal(pooled.count, whole.count)
    assert torch.allclose(pooled.mean, whole.mean)
    assert torch.allclose(pooled.variance, whole.variance, rtol=1e-6, atol=1e-9)
    again = Moments(**pooled.to_state())
    assert torch.equal(again.mean, pooled.mean)


def watched_sums(model: nn.Module, scope: Scope, visit: Callable[..., object]) -> AbstractContextManager[None]:
    """`watched_squares` with sums that call `visit`."""

    class Sums(dict):
        def setdefault(self, name, default=None):
            visit(name, default)
            return super().setdefault(name, default)

    return watched_squares(model, scope, Sums())


@pytest.mark.parametrize("watch", [watched_sums, watched_outputs])
def test_watching_leaves_nothing_behind_even_when_the_forward_raises(watch):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    for x in (rand(2, 3, 8), rand(2, 3, 9)):
        try:
            with watch(model, Scope.of(model), lambda layer, seen: None):
                model(x)
        except (RuntimeError, AssertionError):
            assert x.shape[-1] == 9
    with pytest.raises(ZeroDivisionError), watch(model, Scope.of(model), lambda layer, seen: 1 // 0):
        model(rand(2, 3, 8))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
