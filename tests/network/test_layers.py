"""Which tensors are in scope, and that every other one has a reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from allot.budget.budget import Term
from allot.errors import BudgetError, UsageError
from allot.network.layers import Layer, Rules, Scope


class Wrapper(nn.Module):
    """Holds a model under another name, like DataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))


class MyLinear(nn.Linear):
    pass


class Experts(nn.Module):
    """Says how its stacks are stored, as the fused experts of transformers do."""

    is_transposed, num_experts = False, 3

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 8, 4))
        self.down = nn.Parameter(torch.zeros(3, 4, 8))
        self.down_bias = nn.Parameter(torch.zeros(3, 4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.blocks = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4), self.first])})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight


class Stacked(nn.Linear):
    """A linear layer of several experts: no matrix."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(3, 4, 4))


def conv1d_of_transformers() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def zero_size() -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(0, 4))
    return layer


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3)).requires_grad_(False)


# what is made -> kinds of its layers by name
PRUNABLE = {
    "linear": (lambda: nn.Linear(4, 6), {"weight": "linear"}),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), {"weight": "conv"}),
    "conv 2d": (lambda: nn.Conv2d(4, 6, (3, 1)), {"weight": "conv"}),
    "conv 3d": (lambda: nn.Conv3d(4, 6, 3), {"weight": "conv"}),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), {"weight": "conv"}),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), {"weight": "conv"}),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), {"weight": "conv_transposed"}),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": "conv_transposed"}),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 3), {"weight": "conv_transposed"}),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        {"in_proj_weight": "attention_in", "out_proj.weight": "attention_out"},
    ),
    "attention with other widths": (
        lambda: nn.MultiheadAttention(4, 2, kdim=6, vdim=8, bias=False, add_bias_kv=True),
        {
            "q_proj_weight": "attention_in",
            "k_proj_weight": "attention_in",
            "v_proj_weight": "attention_in",
            "out_proj.weight": "attention_out",
        },
    ),
    "transformers Conv1D": (conv1d_of_transformers, {"weight": "linear_transposed"}),
    "subclass": (lambda: MyLinear(4, 6), {"weight": "linear"}),
    "half": (lambda: nn.Linear(4, 6).half(), {"weight": "linear"}),
    "bfloat16": (lambda: nn.Conv2d(4, 6, 3).bfloat16(), {"weight": "conv"}),
    "double": (lambda: nn.Linear(4, 6).double(), {"weight": "linear"}),
    "frozen": (frozen, {"0.weight": "linear", "1.weight": "conv"}),
    "one weight": (lambda: nn.Linear(1, 1), {"weight": "linear"}),
    "wrapped": (lambda: Wrapper(nn.DataParallel(nn.Linear(4, 4))), {"module.module.weight": "linear"}),
    "shared module": (Twice, {"first.weight": "linear", "blocks.a.0.weight": "linear"}),
    "embedding tied to a linear": (Tied, {"table.weight": "linear"}),
    "lstm": (
        lambda: nn.LSTM(4, 4, bidirectional=True, proj_size=2),
        {f"weight_{part}_l0{direction}": "recurrent" for direction in ("", "_reverse") for part in ("ih", "hh", "hr")},
    ),
    "gru cell": (lambda: nn.GRUCell(4, 4), {"weight_ih": "recurrent", "weight_hh": "recurrent"}),
    "experts of transformers": (Experts, {"up": "experts", "down": "experts"}),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        {
            "self_attn.in_proj_weight": "attention_in",
            "self_attn.out_proj.weight": "attention_out",
            "linear1.weight": "linear",
            "linear2.weight": "linear",
        },
    ),
}
# what is made -> (name of a skipped parameter, a word of the reason)
SKIPPED = {
    "bias": (lambda: nn.Linear(4, 4), "bias", "^bias$"),
    "bias of an attention": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "^bias$"),
    "embedding": (lambda: nn.Embedding(4, 4), "weight", "lookup table"),
    "batch norm": (lambda: nn.BatchNorm2d(4), "weight", "normalisation .BatchNorm2d."),
    "layer norm": (lambda: nn.LayerNorm((4, 4)), "weight", "normalisation"),
    "bias of an lstm": (lambda: nn.LSTM(4, 4), "bias_ih_l0", "^bias$"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "weight", "of Bilinear: not the weight of a layer"),
    "raw weight": (Raw, "weight", "of Raw: not the weight of a layer"),
    "raw token": (Raw, "class_token", "of Raw: not the weight of a layer"),
    "int8": (integers, "weight", "int8 values"),
    "float8": (
        lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn),
        "weight",
        "float8_e4m3fn values",
    ),
    "zero size": (zero_size, "weight", "empty"),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        "parametrizations.weight.original",
        "remove the parametrization",
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        "parametrizations.weight.original1",
        "remove the parametrization",
    ),
    "old weight norm": (old_weight_norm, "weight_v", "remove the parametrization"),
    "linear that is no matrix": (Stacked, "weight", "of Stacked: not the weight of a layer"),
    "three dimensions": (Stacked, "weight", r"knows without inputs \(3 dimensions\)$"),
    "bias of experts": (Experts, "down_bias", "of Experts: not the weight of a layer"),
}


def parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("case", PRUNABLE)
def test_a_prunable_tensor_is_in_scope_with_its_kind(case):
    make, kinds = PRUNABLE[case]
    model = make()
    scope = Scope.of(model)
    assert {layer.name: layer.kind for layer in scope} == kinds
    for layer in scope:
        assert layer.shape == tuple(model.get_parameter(layer.name).shape)


@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_not_prunable_is_skipped_with_its_reason(case):
    make, name, reason = SKIPPED[case]
    skipped = Scope.of(make()).skipped
    assert re.search(reason, skipped[name]), skipped[name]


@pytest.mark.parametrize("case", [*PRUNABLE, *SKIPPED])
def test_every_parameter_is_either_in_scope_or_skipped(case):
    model = (PRUNABLE.get(case) or SKIPPED[case])[0]()
    scope = Scope.of(model)
    listed = [layer.name for layer in scope] + list(scope.skipped)
    assert sorted(listed) == sorted(parameters(model))
    assert all(reason for reason in scope.skipped.values())


def test_the_order_is_the_order_of_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    assert [layer.name for layer in Scope.of(model)] == [
        "0.weight",
        "2.weight",
        "3.in_proj_weight",
        "3.out_proj.weight",
    ]


def test_a_lookup_table_is_in_scope_where_it_is_included_by_name():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "bag": nn.EmbeddingBag(5, 4), "fc": nn.Linear(4, 2)})
    kinds = {layer.name: layer.kind for layer in Scope.of(model, Rules(include=("embed*", "fc")))}
    assert kinds == {"embed.weight": "lookup", "fc.weight": "linear"}
    assert [layer.kind for layer in Scope.of(model, Rules(include=("*",)))] == ["lookup", "lookup", "linear"]
    assert Scope.of(model, Rules(include=("fc",))).skipped["embed.weight"] == "lookup table, not a matrix product"
    assert len(Scope.of(model, Rules(include=("*",), exclude=("embed",)))) == 2
    with pytest.raises(UsageError, match="matches no prunable layer"):  # where no rule includes it
        Scope.of(model, Rules(exclude=("embed",)))
    assert Scope.of(Tied(), Rules(include=("*",)))["table.weight"].kind == "linear"


def test_tied_weights_are_one_layer_with_all_their_names():
    (layer,) = Scope.of(Tied())
    assert layer.aliases == ("head.weight",)
    shared = Scope.of(Twice())["first.weight"]
    assert shared.aliases == ("again.weight", "blocks.a.1.weight")


def test_every_name_of_a_tied_weight_is_known_exactly_once():
    model = Twice()
    scope = Scope.of(model)
    names = [name for layer in scope for name in (layer.name, *layer.aliases)]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False) if "bias" in name]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(4), lambda: nn.Linear(4, 4, device="meta")])
def test_parameters_without_values_are_refused_by_name(make):
    with pytest.raises(UsageError, match=r"0\.weight holds no values yet"):
        Scope.of(nn.Sequential(make()))


def test_a_lazy_module_is_a_linear_after_its_first_batch():
    model = nn.Sequential(nn.LazyLinear(4))
    model(torch.zeros(1, 3))
    assert Scope.of(model)["0.weight"].shape == (4, 3)


def test_a_model_without_parameters_has_an_empty_scope():
    assert len(Scope.of(nn.ReLU())) == 0


def test_an_unknown_layer_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'weight'"):
        Scope.of(nn.Linear(4, 4))["weigth"]


# Rules


def net() -> nn.Module:
    model = nn.Module()
    model.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3))
    model.fc = nn.Linear(8, 10)
    return model


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        (Rules(include=("layer*",)), ["layer1.0.weight", "layer2.0.weight"]),
        (Rules(include=("layer1.*", "fc")), ["layer1.0.weight", "fc.weight"]),
        (Rules(exclude=("fc",)), ["layer1.0.weight", "layer2.0.weight"]),
        (Rules(exclude=("fc.weight",)), ["layer1.0.weight", "layer2.0.weight"]),
        (Rules(include=(r"re:layer\d\.0",)), ["layer1.0.weight", "layer2.0.weight"]),
        (Rules(exclude=(r"re:layer.*",)), ["fc.weight"]),
        (Rules(include=("*",), exclude=("layer1.0",)), ["layer2.0.weight", "fc.weight"]),
    ],
)
def test_rules_choose_layers_by_glob_or_regular_expression(rules, names):
    model = net()
    scope = Scope.of(model, rules)
    assert [layer.name for layer in scope] == names
    assert sorted([*names, *scope.skipped]) == sorted(parameters(model))


def test_a_skipped_layer_names_the_rule():
    assert Scope.of(net(), Rules(exclude=("f?",))).skipped["fc.weight"] == "excluded by rule 'f?'"
    assert Scope.of(net(), Rules(include=("fc",))).skipped["layer2.0.weight"] == "no include rule matches it"


def test_a_regular_expression_has_to_match_a_whole_name():
    with pytest.raises(UsageError, match=r"'re:layer' matches no prunable layer; there are layer1\.0\.weight"):
        Scope.of(net(), Rules(include=("re:layer",)))


@pytest.mark.parametrize(
    "rules",
    [
        Rules(include=("head",)),
        Rules(exclude=("layer1.1",)),
        Rules(min_density={"conv*": 0.5}),
        Rules(max_density={"fc.bias": 0.5}),
    ],
)
def test_a_rule_that_matches_nothing_is_refused(rules):
    with pytest.raises(UsageError, match="matches no prunable layer"):
        Scope.of(net(), rules)


def test_a_tied_layer_answers_to_all_its_names():
    assert len(Scope.of(Tied(), Rules(include=("head",)))) == 1
    assert len(Scope.of(Tied(), Rules(include=("table",)))) == 1


def test_of_several_density_bounds_the_last_that_matches_counts():
    rules = Rules(min_density={"*": 0.5, "fc": 0.25}, max_density={"*": 0.75})
    scope = Scope.of(net(), rules)
    assert scope["fc.weight"].min_kept == 20 and scope["fc.weight"].max_kept == 60
    assert scope["layer2.0.weight"].min_kept == 288


def test_density_bounds_round_inwards():
    scope = Scope.of(net(), Rules(min_density={"fc": 0.101}, max_density={"fc": 0.199}))
    assert (scope["fc.weight"].min_kept, scope["fc.weight"].max_kept) == (9, 15)


@pytest.mark.parametrize(
    ("floor", "kept", "per_row"),
    [(1, 1, 0), ("1", 1, 0), (5, 5, 0), (0, 0, 0), ("1/row", 10, 1), ("3/row", 30, 3), ("99/row", 80, 8),
     ("5%", 4, 0), ("0.1%", 1, 0), ("100%", 80, 0), (1000, 80, 0)],
)  # fmt: skip
def test_a_floor_is_weights_per_layer_or_per_row_or_a_share(floor, kept, per_row):
    layer = Scope.of(net(), Rules(floor=floor))["fc.weight"]
    assert (layer.min_kept, layer.min_per_row) == (kept, per_row)


def test_rows_of_a_transposed_conv_are_its_output_channels():
    layer = Scope.of(nn.ConvTranspose2d(4, 6, 3, groups=2), Rules(floor="2/row"))["weight"]
    assert (layer.rows, layer.inputs, layer.min_kept) == (6, 2, 12)


@pytest.mark.parametrize("floor", ["", "one", "-1", -1, 1.5, "5 %", "1/col", "101%", "%", True, None])
def test_a_floor_that_is_none_is_refused(floor):
    with pytest.raises(BudgetError, match=r"floor=.*is accepted"):
        Rules(floor=floor)


@pytest.mark.parametrize("bound", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_a_density_bound_that_is_none_is_refused(bound):
    for rules in ({"min_density": {"fc": bound}}, {"max_density": {"fc": bound}}):
        with pytest.raises(BudgetError, match=r"density bound fc=.*from 0 to 1"):
            Rules(**rules)


def test_a_broken_regular_expression_is_refused():
    with pytest.raises(UsageError, match="not a regular expression"):
        Rules(include=("re:(",))


def test_a_rule_that_is_a_bare_text_is_refused():
    with pytest.raises(UsageError, match="tuple of patterns"):
        Rules(exclude="fc")


def test_bounds_that_cross_are_refused_with_the_layer():
    layer = Scope.of(net(), Rules(min_density={"fc": 0.5}, max_density={"fc": 0.25}))["fc.weight"]
    with pytest.raises(BudgetError, match=r"fc\.weight.*at least 40 and at most 20 of 80"):
        Term(layer.name, layer.total, layer.min_kept, layer.max_kept)


# The matrix view


def kinds() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Modules without bias, and an input for each."""
    return [
        (nn.Linear(6, 4, bias=False), (2, 6)),
        (nn.Conv1d(4, 6, 3, bias=False), (2, 4, 7)),
        (nn.Conv2d(4, 6, (3, 2), groups=2, bias=False, stride=2), (2, 4, 7, 7)),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 5)),
        (nn.Conv3d(4, 6, (1, 2, 3), bias=False), (1, 4, 3, 4, 5)),
        (nn.ConvTranspose1d(4, 6, 3, bias=False), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, (3, 2), groups=2, bias=False, stride=2, padding=1), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, (1, 2, 3), bias=False), (1, 2, 3, 4, 5)),
    ]


CASES = list(range(len(kinds())))


def layer_of(model: nn.Module) -> Layer:
    (layer,) = Scope.of(model)
    return layer


@pytest.mark.parametrize("case", CASES)
def test_unmatrix_is_the_inverse_of_matrix(case):
    layer = layer_of(kinds()[case][0])
    weight = torch.arange(layer.total).view(layer.shape)
    matrix = layer.matrix(weight)
    assert matrix.shape == (layer.rows, layer.total // layer.rows)
    assert torch.equal(layer.unmatrix(matrix), weight)
    assert layer.unmatrix(matrix).is_contiguous()


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_the_matrix_is_what_one_output_channel_is_made_of(case):
    model, shape = kinds()[case]
    layer = layer_of(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        for row in range(layer.rows):
            only = torch.zeros(layer.rows, layer.total // layer.rows)
            only[row] = layer.matrix(model.weight)[row]
            alone = torch.func.functional_call(model, {"weight": layer.unmatrix(only)}, x)
            expected = torch.zeros_like(before).movedim(layer.output_dim, -1)
            expected[..., row] = before.movedim(layer.output_dim, -1)[..., row]
            assert torch.allclose(alone.movedim(layer.output_dim, -1), expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_columns_run_over_input_channels_first(case):
    model, shape = kinds()[case]
    layer = layer_of(model)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for column in range(layer.total // layer.rows):
        only = torch.zeros(layer.rows, layer.total // layer.rows)
        only[0, column] = 1.0
        weight = layer.unmatrix(only)
        channel = column % layer.inputs  # row 0 belongs to the first group
        kept = x.clone()
        kept.select(1, channel).zero_()
        assert not torch.func.functional_call(model, {"weight": weight}, kept).detach().any()


def test_the_matrix_of_a_transformers_conv1d_is_its_transpose():
    model = conv1d_of_transformers()
    layer = layer_of(model)
    assert layer.matrix(model.weight).shape == (6, 4) and (layer.rows, layer.inputs) == (6, 4)
    x = torch.randn(3, 4)
    assert torch.allclose(x @ layer.matrix(model.weight).t() + model.bias, model(x), atol=1e-6)
    assert torch.equal(layer.unmatrix(layer.matrix(model.weight)), model.weight)


def test_the_matrix_of_an_attention_input_stacks_query_key_and_value():
    model = nn.MultiheadAttention(4, 2, bias=False)
    scope = Scope.of(model)
    layer = scope["in_proj_weight"]
    assert (layer.rows, layer.inputs) == (12, 4)
    assert torch.equal(layer.unmatrix(layer.matrix(model.in_proj_weight)), model.in_proj_weight)


@pytest.mark.parametrize("kind", ["experts", "experts_transposed"])
def test_the_matrix_of_experts_has_the_rows_of_expert_after_expert(kind):
    layer = Layer("experts", (3, 4, 5), kind)
    weight = torch.arange(60.0).view(3, 4, 5)
    each = [matrix if kind == "experts" else matrix.t() for matrix in weight]
    assert torch.equal(layer.matrix(weight), torch.cat(each))
    assert (layer.rows, layer.inputs) == ((12, 5) if kind == "experts" else (15, 4))
    assert torch.equal(layer.unmatrix(layer.matrix(weight)), weight)
    assert layer.unmatrix(layer.matrix(weight)).is_contiguous()


def test_the_matrix_of_a_recurrent_weight_has_the_rows_of_gate_after_gate():
    model = nn.GRU(4, 3)
    layer = Scope.of(model)["weight_hh_l0"]
    assert (layer.rows, layer.inputs) == (9, 3) and layer.matrix(model.weight_hh_l0) is model.weight_hh_l0
