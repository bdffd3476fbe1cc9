"""Weights of 3 dimensions: which of them are stacks of experts, and the products of every expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.network.input_squares import Squares, input_norms, watched_squares
from allot.network.layers import Rules, Scope
from allot.network.macs import measured
from allot.network.products import Product, watched_products
from allot.pruning.prune import prune

E, OUT, IN, T = 3, 4, 8, 7


class Stack(nn.Module):
    """A function of inputs and of one weight of 3 dimensions."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def one_by_one(x: Tensor, w: Tensor) -> Tensor:
    return torch.stack([nn.functional.linear(x[:, e], w[e]) for e in range(E)], 1)


def picked(x: Tensor, w: Tensor) -> Tensor:
    """Token t of expert e, in any order, each with a copy of its expert."""
    numbers = torch.arange(T * E).roll(5)
    chosen = w[numbers % E]
    out = torch.bmm(chosen, x.flatten(0, 1)[numbers][..., None])[..., 0]
    return out[numbers.argsort()].unflatten(0, (T, E))


def grouped(x: Tensor, w: Tensor) -> Tensor:
    ends = torch.arange(1, E + 1, dtype=torch.int32) * T
    flat = x.transpose(0, 1).flatten(0, 1)
    return nn.functional.grouped_mm(flat, w.transpose(1, 2), offs=ends).unflatten(0, (E, T)).transpose(0, 1)


# inputs [T, E, IN] -> outputs [T, E, OUT]; every expert has inputs of its own
USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "bmm": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), "experts_transposed"),
    "bmm of the transpose": (lambda x, w: torch.bmm(x.transpose(0, 1), w.mT).transpose(0, 1), "experts"),
    "bmm from the left": (lambda x, w: torch.bmm(w, x.permute(1, 2, 0)).permute(2, 0, 1), "experts"),
    "baddbmm": (
        lambda x, w: torch.baddbmm(torch.zeros(E, 1, OUT), x.transpose(0, 1), w).transpose(0, 1),
        "experts_transposed",
    ),
    "einsum": (lambda x, w: torch.einsum("tei,eoi->teo", x, w), "experts"),
    "einsum of the transpose": (lambda x, w: torch.einsum("tei,eio->teo", x, w), "experts_transposed"),
    "matmul with copies": (lambda x, w: (x[:, :, None] @ w)[:, :, 0], "experts_transposed"),
    "one by one": (one_by_one, "experts"),
    "of the transpose, one by one": (
        lambda x, w: torch.stack([x[:, e] @ w[e] for e in range(E)], 1),
        "experts_transposed",
    ),
    "picked": (picked, "experts"),
    "grouped": (grouped, "experts"),
    "a copy": (lambda x, w: torch.bmm(x.transpose(0, 1), w.mT.contiguous()).transpose(0, 1), "experts"),
    "in double precision": (
        lambda x, w: torch.einsum("tei,eoi->teo", x.double(), w.double()).float(),
        "experts",
    ),
}


def outputs_of(model: nn.Module, scope: Scope, x: Any) -> dict[str, list[tuple[slice, Tensor]]]:
    """Layer -> (rows, `[positions, rows]` that the columns give for them) of every product."""
    seen: dict[str, list[tuple[slice, Tensor]]] = {}

    def visit(product: Product) -> None:
        weight = model.get_parameter(product.layer.name).detach()
        rows = product.layer.matrix(weight)[product.rows].unflatten(0, (product.groups, -1))
        columns = torch.cat(list(product.columns()), 1)
        assert columns.shape[:2] == (product.groups, product.positions)
        values = torch.einsum("gpk,grk->pgr", columns.float(), rows).flatten(1)
        seen.setdefault(product.layer.name, []).append((product.rows, values))

    with watched_products(model, scope, visit):
        model(x)
    return seen


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_a_stack_of_experts_is_found_with_its_products(name: str, square: bool, inference: bool) -> None:
    function, kind = USES[name]
    torch.manual_seed(0)
    width = OUT if square else IN
    model = Stack(function, E, OUT, width) if kind == "experts" else Stack(function, E, width, OUT)
    x = torch.randn(T, E, width)
    with torch.inference_mode(inference):
        scope = measured(Scope.of(model), model, lambda: model(x))
        (layer,) = scope
        assert (layer.kind, layer.macs, dict(scope.skipped)) == (kind, T * E * OUT * width, {})
        expected = model(x).detach()
        seen = torch.zeros(T * E, E * OUT)
        counts = [0] * E
        for rows, values in outputs_of(model, scope, x)["weight"]:
            for e in range(rows.start // OUT, rows.stop // OUT):
                part = values[:, e * OUT - rows.start : (e + 1) * OUT - rows.start]
                seen[counts[e] : counts[e] + len(part), e * OUT : (e + 1) * OUT] = part
                counts[e] += len(part)
    assert counts == [T] * E
    for e in range(E):
        found = seen[:T, e * OUT : (e + 1) * OUT]
        order = torch.stack([(found - row).abs().sum(1).argmin() for row in expected[:, e]])
        assert sorted(order.tolist()) == list(range(T))
        torch.testing.assert_close(found[order], expected[:, e], atol=1e-5, rtol=1e-5)


def test_all_inputs_through_all_experts_is_one_product() -> None:
    model = Stack(lambda x, w: torch.einsum("ti,eoi->teo", x, w), E, OUT, IN)
    x = torch.randn(T, IN)
    scope = measured(Scope.of(model), model, lambda: model(x))
    ((rows, values),) = outputs_of(model, scope, x)["weight"]
    assert (scope["weight"].kind, rows) == ("experts", slice(0, E * OUT))
    torch.testing.assert_close(values, model(x).detach().flatten(1))


UNUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added, as positions are": lambda x, w: x[:, :1] + w[:1, :1, :IN],
    "summed over experts": lambda x, w: torch.einsum("tei,eoi->to", x, w),
    "computed before use": lambda x, w: torch.einsum("tei,eoi->teo", x, w - w.mean()),
    "a kernel of a convolution": lambda x, w: nn.functional.conv1d(x, w),
    "a part of it": lambda x, w: torch.einsum("tei,eoi->teo", x[..., :2], w[..., :2]),
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_weight_of_three_dimensions_that_is_no_stack_stays_dense_with_a_reason(name: str) -> None:
    shape = (OUT, IN, E) if "kernel" in name else (E, OUT, IN)
    model = Stack(UNUSED[name], *shape)
    x = torch.randn(T, IN, E) if "kernel" in name else torch.randn(T, E, IN)
    scope = measured(Scope.of(model), model, lambda: model(x))
    assert len(scope) == 0
    assert scope.skipped == {"weight": "weight of Stack: not the weight of a layer that allot knows"}


class Queries(nn.Module):
    """Learned queries of 3 dimensions are the inputs of a layer, which a rule may exclude."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, E, IN))
        self.layer, self.other = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.queries.expand(len(x), -1, -1)) + self.layer(self.queries[0]) + self.other(x)
        return out


@pytest.mark.parametrize("rules", [Rules(), Rules(exclude=("layer",))])
def test_learned_inputs_of_a_layer_are_no_experts(rules: Rules) -> None:
    model, x = Queries(), torch.randn(T, E, IN)
    scope = measured(Scope.of(model, rules), model, lambda: model(x))
    assert "queries" in scope.skipped
    assert "other.weight" in {layer.name for layer in scope}


def test_rules_hold_for_experts_and_the_order_is_the_order_of_the_model() -> None:
    model = nn.Sequential(
        nn.Linear(IN, IN),
        nn.Unflatten(1, (1, IN)),
        Stack(lambda x, w: x.expand(-1, E, -1).transpose(0, 1) @ w, E, IN, OUT),
        nn.Linear(OUT, 2),
    )
    x = torch.randn(T, IN)
    rules = Rules(min_density={"2": 0.5}, floor="1/row")
    scope = measured(Scope.of(model, rules), model, lambda: model(x))
    assert [layer.name for layer in scope] == ["0.weight", "2.weight", "3.weight"]
    assert (scope["2.weight"].min_kept, scope["2.weight"].min_per_row) == (E * IN * OUT // 2, 1)
    scope = measured(Scope.of(model, Rules(exclude=("2",))), model, lambda: model(x))
    assert scope.skipped["2.weight"] == "excluded by rule '2'"


def test_input_squares_of_an_expert_without_inputs_are_the_mean_of_the_others() -> None:
    model = Stack(lambda x, w: torch.stack([x[:, e] @ w[e] for e in range(E - 1)], 1), E, IN, OUT)
    x = torch.randn(T, E, IN)
    scope = measured(Scope.of(model), model, lambda: model(x))
    sums: Squares = {}
    with watched_squares(model, scope, sums):
        model(x)
    norms = input_norms(scope["weight"], sums["weight"])
    expected = x.square().sum(0)  # [E, IN]
    expected[-1] = expected[:-1].mean(0)
    torch.testing.assert_close(norms.square().float(), expected[..., None].expand(E, IN, OUT))


def test_input_squares_of_a_lookup_table_are_ones() -> None:
    model, sums = nn.Embedding(6, 3), {}
    scope = Scope.of(model, Rules(include=("*",)))
    with watched_squares(model, scope, sums):
        model(torch.tensor([1, 2]))
    assert sums == {}
    assert torch.equal(input_norms(scope["weight"], {}), torch.ones(6, 3).double())


def mixture(module: str, config: Any, implementation: str) -> nn.Module:
    """The fused experts of a model of transformers, with values."""
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    name = next(name for name in vars(modeling) if name.endswith("Experts"))
    config._experts_implementation = implementation
    experts: nn.Module = getattr(modeling, name)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("module", ["mixtral", "gpt_oss"])
def test_the_fused_experts_of_transformers_are_in_scope(module: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = {"mixtral": transformers.MixtralConfig, "gpt_oss": transformers.GptOssConfig}[module](**sizes)
    model = mixture(module, config, implementation)
    x = torch.randn(6, 8)
    chosen = torch.tensor([[0, 1], [1, 3], [0, 3], [3, 1], [1, 0], [0, 1]])  # never 2
    inputs = (x, chosen, torch.full((6, 2), 0.5))
    scope = measured(Scope.of(model), model, lambda: model(*inputs))
    kind = "experts" if module == "mixtral" else "experts_transposed"
    assert {layer.name: layer.kind for layer in scope} == {"gate_up_proj": kind, "down_proj": kind}
    assert {layer.name: layer.macs for layer in scope} == {"gate_up_proj": 12 * 8 * 32, "down_proj": 12 * 16 * 8}
    rows: dict[str, dict[tuple[int, int], list[Tensor]]] = {}

    def visit(product: Product) -> None:
        assert product.groups == 1
        of_layer = rows.setdefault(product.layer.name, {})
        of_layer.setdefault((product.rows.start, product.rows.stop), []).append(next(product.columns())[0])

    with watched_products(model, scope, visit):
        model(*inputs)
    assert set(rows["gate_up_proj"]) == {(32 * e, 32 * e + 32) for e in (0, 1, 3)}
    assert set(rows["down_proj"]) == {(8 * e, 8 * e + 8) for e in (0, 1, 3)}
    for e in (0, 1, 3):
        (columns,) = rows["gate_up_proj"][32 * e, 32 * e + 32]
        expected = x[(chosen == e).any(1)]
        assert columns.shape == expected.shape
        torch.testing.assert_close(columns.sort(0).values, expected.sort(0).values)


def test_a_language_model_of_experts_is_pruned_with_its_experts() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4, "num_hidden_layers": 1}
    heads = {"vocab_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    rows = [{"input_ids": torch.randint(0, 40, (6,))} for _ in range(6)]
    result = prune(model, rows, "sparsity=0.5", allocate="erk", score="wanda", repair="none")
    scope, pruned = result.problem.scope, result.model()
    assert {layer.kind for layer in scope} == {"linear", "experts"}
    reason = "weight of MixtralTopKRouter: not the weight of a layer that allot knows"
    assert scope.skipped["model.layers.0.mlp.gate.weight"] == reason
    for layer in scope:
        assert int(torch.count_nonzero(pruned.get_parameter(layer.name))) == result.allocation.kept[layer.name]
    assert bool(torch.isfinite(pruned(rows[0]["input_ids"][None]).logits).all())
