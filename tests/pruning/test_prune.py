"""`prune` on whatever an `nn.Module` can be: an exact budget and an untouched model, or one clear line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import allot
from allot.errors import BudgetError, PatternError, UsageError
from allot.methods import METHODS
from allot.network.layers import Rules
from allot.pruning.assemble import assemble
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.pruning.time_limit import limit_steps
from allot.run.problem import Problem, Rule
from contract.cases import CASES, bits

ODD: dict[str, tuple[Callable[[], nn.Module], Any]] = {}


def odd(inputs: Callable[[], Any]) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def listed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ODD[make.__name__.replace("_", " ")] = (make, inputs)
        return make

    return listed


def rows(*shape: int, samples: int = 12) -> Callable[[], Tensor]:
    return lambda: torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1))


class Wrapped(nn.Module):
    """Calls `function(self.net, ...)`."""

    def __init__(self, net: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.net, *args, **kwargs)


@odd(rows(6))
def dict_output() -> nn.Module:
    return Wrapped(nn.Linear(6, 4), lambda net, x: {"out": net(x), "more": [x]})


@odd(lambda: [((x, x * 2), 0) for x in rows(6)()])
def two_inputs() -> nn.Module:
    return Wrapped(nn.Linear(6, 4), lambda net, a, b: net(a) + net(b))


@odd(lambda: [{"a": a, "b": a + 1, "label": 0} for a in rows(6)()])
def dict_inputs() -> nn.Module:
    return Wrapped(nn.Linear(6, 4), lambda net, a, b: net(a) * net(b))


@odd(lambda: torch.arange(60).view(12, 5) % 11)
def embedding_tied_to_the_output() -> nn.Module:
    net = nn.ModuleDict({"embed": nn.Embedding(11, 6), "mix": nn.Linear(6, 6), "out": nn.Linear(6, 11, bias=False)})
    net["out"].weight = net["embed"].weight
    return Wrapped(net, lambda net, tokens: net["out"](net["mix"](net["embed"](tokens))))


@odd(rows(3, 6, 6))
def transposed_convolution() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)
    )


@odd(rows(2, 4, 4, 4))
def three_dimensions() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2))


@odd(rows(5, 6))
def recurrent_inside() -> nn.Module:
    net = nn.ModuleDict({"lstm": nn.LSTM(6, 7, batch_first=True), "out": nn.Linear(7, 3)})
    return Wrapped(net, lambda net, x: net["out"](net["lstm"](x)[0][:, -1]))


@odd(rows(5, 6))
def recurrent_both_ways_in_a_loop() -> nn.Module:
    net = nn.ModuleDict({"gru": nn.GRU(6, 4, 2, batch_first=True, bidirectional=True), "cell": nn.LSTMCell(8, 3)})
    return Wrapped(net, lambda net, x: net["cell"](net["gru"](x)[0].sum(1))[0])


@odd(rows(6))
def mixture_of_experts() -> nn.Module:
    net = nn.Module()
    net.router, net.up = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 6, 8))
    net.down, net.positions = nn.Parameter(torch.randn(3, 4, 8)), nn.Parameter(torch.randn(1, 1, 6))

    def forward(net: Any, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eih->ebh", (x + net.positions)[0], net.up).relu()
        return (torch.bmm(hidden, net.down.mT) * net.router(x).softmax(-1).t()[..., None]).sum(0)

    return Wrapped(net, forward)


@odd(rows(5, 8))
def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@odd(rows(5, 8))
def transformer_decoder_over_itself() -> nn.Module:
    return Wrapped(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), lambda net, x: net(x, x))


@odd(rows(5, 8))
def attention_of_other_widths() -> nn.Module:
    net = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True, bias=False)
    return Wrapped(net, lambda net, x: net(x, x[..., :5], x[..., :3])[0])


@odd(rows(6))
def used_twice() -> nn.Module:
    return Wrapped(nn.Linear(6, 6), lambda net, x: net(torch.relu(net(x))))


@odd(rows(3, 6, 6))
def relu_between_convolution_and_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1, bias=False))


@odd(rows(6))
def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).requires_grad_(False)


@odd(rows(6))
def half_precision() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).half()


@odd(rows(6))
def double_precision() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()


@odd(rows(4, 6, 6))
def channels_last() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    return net.to(memory_format=torch.channels_last)


@odd(rows(6))
def train_mode_with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.BatchNorm1d(9), nn.Linear(9, 4)).train()


@odd(rows(6))
def infinite_buffer() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6))
    net.register_buffer("causal", torch.full((6, 6), float("-inf")).triu(1))
    return net


@odd(rows(6))
def parameters_of_its_own() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6))
    net.register_parameter("scale", nn.Parameter(torch.ones(6, 6)))
    net.register_parameter("nothing", None)
    return net


@odd(rows(6))
def a_bare_layer() -> nn.Module:
    return nn.Linear(6, 5)


@odd(rows(6))
def norms_of_every_kind() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.RMSNorm(8),
        nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None),
    )  # fmt: skip


@odd(rows(3, 6, 6))
def lazy_after_its_first_batch() -> nn.Module:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    net(torch.randn(2, 3, 6, 6))
    return net


@odd(rows(5, 6))
def conv1d_of_transformers() -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    return nn.Sequential(pytorch_utils.Conv1D(8, 6), nn.GELU(), pytorch_utils.Conv1D(6, 8))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_module_gets_an_exact_budget_and_is_left_alone(name: str, tmp_path: Path):
    torch.manual_seed(0)
    make, inputs = ODD[name]
    model = make()
    state = {key: (id(value), bits(value)) for key, value in _named(model)}
    modes = [module.training for module in model.modules()]
    result = prune(model, inputs(), "sparsity=0.6", repair="bn,variance,bias", batch_size=5, save_to=tmp_path / "run")
    assert {key: (id(value), bits(value)) for key, value in _named(model)} == state
    assert [module.training for module in model.modules()] == modes
    total = sum(layer.total for layer in result.problem.scope)
    assert sum(result.allocation.kept.values()) == round(0.4 * total)
    assert result.verify()["passed"]

    sparse = result.model()
    assert [type(module) for module in sparse.modules()] == [type(module) for module in model.modules()]
    assert list(sparse.state_dict()) == list(model.state_dict()) == list(result.state_dict())
    assert {p.requires_grad for p in sparse.parameters()} == {p.requires_grad for p in model.parameters()}
    nonzero = sum(int(dict(sparse.named_parameters())[layer.name].count_nonzero()) for layer in result.problem.scope)
    assert nonzero <= round(0.4 * total)
    for path in (tmp_path / "run", tmp_path / "run" / "model.bitmask.safetensors"):
        loaded = allot.load(path)
        assert set(loaded) == set(model.state_dict())
        assert all(torch.equal(loaded[key], value) for key, value in sparse.state_dict().items())
    again = prune(model, inputs(), "sparsity=0.6", repair="bn,variance,bias", batch_size=5, save_to=tmp_path / "run")
    assert all(bits(again.state_dict()[key]) == bits(value) for key, value in result.state_dict().items())


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def test_a_module_registered_twice_is_left_alone():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.BatchNorm1d(6), layer).append(nn.Identity())
    model.append(model[1])
    model.eval()
    before = {key: (id(value), bits(value)) for key, value in _named(model)}
    result = prune(model, rows(6)(), "sparsity=0.5")
    assert {key: (id(value), bits(value)) for key, value in _named(model)} == before
    assert int(result.model()[2].weight.count_nonzero()) == 18


def test_a_model_that_counts_its_calls_in_a_buffer_is_left_alone():
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counts(6, 6)
    model.register_buffer("calls", torch.zeros(()))
    prune(model, rows(6)(), "sparsity=0.5")
    assert int(model.calls) == 0


def test_a_model_that_cannot_be_copied_still_gives_a_state_dict(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 6))
    model.generator = (i for i in range(3))
    result = prune(model, rows(6)(), "sparsity=0.5", save_to=tmp_path / "run")
    with pytest.raises(UsageError, match=r"Sequential cannot be copied .*generator.*load result\.state_dict\(\)"):
        result.model()
    nn.Sequential(nn.Linear(6, 6)).load_state_dict(result.state_dict())


def test_the_state_dict_of_a_result_is_a_copy():
    model = nn.Linear(6, 6)
    result = prune(model, None, "sparsity=0.5", repair="none")
    before = bits(model.bias), bits(result.model().weight)
    for value in result.state_dict().values():
        value.fill_(7)
    assert (bits(model.bias), bits(result.model().weight)) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "nothing in scope|no parameters"),
        (lambda: nn.LayerNorm(6), "nothing in scope"),
        (lambda: nn.LazyLinear(3), r"weight holds no values yet"),
        (lambda: nn.Linear(6, 6, device="meta"), "weight holds no values yet"),
        (lambda: _with(nn.Linear(6, 6), "weight", math.nan), "weight holds nan or infinite values"),
        (lambda: _with(nn.Linear(6, 6), "bias", math.inf), "bias holds nan or infinite values"),
        (lambda: _with(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), "1.running_var", math.nan), r"holds nan"),
        (lambda: nn.Linear(7, 6), r"does not run on inputs of shape \[1, 6\]"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_one_clear_line(make: Callable[[], nn.Module], said: str, tmp_path: Path):
    with pytest.raises((UsageError, BudgetError), match=said) as caught:
        prune(make(), rows(6)(), "sparsity=0.5", save_to=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def _with(model: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = value
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, torch.compile, nn.DataParallel])
def test_a_compiled_or_wrapped_model_is_refused(compiled: Callable[[nn.Module], Any]):
    with pytest.raises(UsageError, match=r"a compiled or wrapped model .*pass the module that it was made from"):
        prune(compiled(nn.Linear(6, 6)), rows(6)(), "sparsity=0.5")


# calibration


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.ones(6)


@pytest.mark.parametrize(
    "data",
    [
        rows(6),
        lambda: list(rows(6)()),
        lambda: (x for x in rows(6)()),
        lambda: ((x, 1) for x in rows(6)()),
        lambda: iter(rows(6)().split(5)),
        lambda: iter([(x, torch.zeros(len(x))) for x in rows(6)().split(5)]),
        lambda: rows(6)().numpy(),
        lambda: TensorDataset(rows(6)(), torch.zeros(12)),
        lambda: DataLoader(TensorDataset(rows(6)(), torch.zeros(12)), batch_size=5, shuffle=False),
        lambda: rows(6)().requires_grad_(),
    ],
)
def test_calibration_comes_in_any_form_and_the_same_samples_give_the_same_result(
    data: Callable[[], Any], tmp_path: Path
):
    model = CASES["linear chain"].make().append(nn.BatchNorm1d(4)).eval()
    expected = prune(model, rows(6)(), "sparsity=0.5", method="erk")
    result = prune(model, data(), "sparsity=0.5", method="erk", save_to=tmp_path / "run")
    assert {key: bits(value) for key, value in result.state_dict().items()} == {
        key: bits(value) for key, value in expected.state_dict().items()
    }
    assert result.log.forward == 3 * 11  # of 12 samples, one is watched


def test_an_endless_source_is_read_as_far_as_samples_say():
    for data in (Endless(), iter(Endless())):
        assert prune(nn.Linear(6, 6), data, "sparsity=0.5", method="erk", samples=7).log.forward == 2 * 6


@pytest.mark.parametrize("data", [[], torch.zeros(0, 6), iter(()), 3, "words", [object()]])
def test_data_that_is_none_is_one_clear_line(data: Any, tmp_path: Path):
    with pytest.raises(UsageError) as caught:
        prune(nn.Linear(6, 6), data, "sparsity=0.5", save_to=tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_part_that_needs_data_says_so_before_anything_is_written(tmp_path: Path):
    for parts in ({"repair": "bn"}, {"repair": "none", "score": "wanda"}):
        with pytest.raises(UsageError, match="needs calibration data"):
            prune(nn.Linear(6, 6), None, "sparsity=0.5", save_to=tmp_path / "run", **parts)
    assert not (tmp_path / "run").exists()
    assert sum(prune(nn.Linear(6, 6), None, "sparsity=0.5", repair="none").allocation.kept.values()) == 18


# budgets, patterns, scores


@pytest.mark.parametrize("sparsity", ["0.5", "0.8", "90%", "0.95", "0.98", "0.99", "0.123456789", "0.001"])
def test_kept_is_the_rounded_share_in_every_way_of_asking(sparsity: str):
    model = nn.Sequential(nn.Linear(37, 41), nn.Linear(41, 29), nn.Linear(29, 3))
    total = 37 * 41 + 41 * 29 + 29 * 3
    share = float(sparsity.rstrip("%")) / (100 if "%" in sparsity else 1)
    for budget in (f"sparsity={sparsity}", allot.Budget(sparsity=sparsity)):
        for method, recipe in allot.RECIPES.items():
            if METHODS[recipe.allocate].needs_data:
                continue
            inputs = torch.randn(4, 37) if "wanda" in (recipe.score, recipe.score_alone) else None
            report = prune(model, inputs, budget, method=method, repair="none").report()
            assert report["kept"] == sum(layer["kept"] for layer in report["layers"]) == round((1 - share) * total)
            assert report["budget"][0]["met"] is True


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("1:4", 0.25), ("3:4", 0.75), ("1:2", 0.5)])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "random", "lamp"])
def test_a_pattern_holds_in_every_group_of_input_channels(pattern: str, share: float, score: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 5))
    inputs = torch.randn(12, 4, 6, 6)
    result = prune(model, inputs, f"sparsity={1 - share}", pattern=pattern, score=score)
    n, m = map(int, pattern.split(":"))
    for layer in result.problem.scope:
        groups = layer.matrix(result.masks[layer.name]).unflatten(1, (-1, m))
        assert bool((groups.sum(-1) == n).all())
        nonzero = layer.matrix(result.model().get_parameter(layer.name)).unflatten(1, (-1, m)) != 0
        assert bool((nonzero.sum(-1) <= n).all())


def test_a_pattern_that_does_not_fit_is_an_error_that_names_the_layer_or_the_nearest_budget():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    with pytest.raises(PatternError, match=r"1\.weight: 6 input channels do not divide by 4"):
        prune(model, None, "sparsity=0.5", pattern="2:4", repair="none")
    rules = Rules(exclude=("1",))
    assert prune(model, None, "sparsity=0.5", pattern="2:4", repair="none", rules=rules).report()["kept"] == 24
    with pytest.raises(BudgetError, match=r"Nearest that can be met: sparsity=0\.5"):
        prune(model, None, "sparsity=0.8", pattern="2:4", repair="none", rules=rules)


def test_wanda_keeps_weights_by_the_norms_of_their_inputs():
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    inputs = torch.randn(20, 6) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.01, 1.0])
    result = prune(model, inputs, "sparsity=0.5", score="wanda", repair="none")
    used = inputs[list(result.problem.inputs().indices)]
    score = (model.weight.detach().double().abs() * used.double().norm(dim=0)).flatten()
    assert set(score.topk(12).indices.tolist()) == set(result.masks["weight"].flatten().nonzero().flatten().tolist())
    assert result.report()["images"] == {"forward": 18, "backward": 0}  # two are watched


def test_a_score_of_ones_own_is_used_and_one_that_is_none_is_refused():
    model = nn.Linear(4, 4)
    result = prune(model, None, "sparsity=0.75", score=lambda layer, weight, evidence: -weight.abs(), repair="none")
    weight = model.weight.detach().abs()
    assert float(weight[result.masks["weight"]].max()) <= float(weight[~result.masks["weight"]].min())
    for wrong in (lambda *_: torch.ones(3), lambda *_: torch.full((4, 4), math.nan)):
        with pytest.raises(UsageError, match="weight: the score has shape"):
            prune(model, None, "sparsity=0.75", score=wrong, repair="none")


def test_an_allocation_is_replayed_from_a_file_a_run_a_mapping_and_after_editing(tmp_path: Path):
    case = CASES["without batch norm"]
    first = prune(case.make(), case.inputs(), "sparsity=0.7", method="lamp", save_to=tmp_path / "run")
    for given in (
        str(tmp_path / "run"),
        str(tmp_path / "run" / "allocation.json"),
        dict(first.allocation),
        first.allocation,
    ):
        assert prune(case.make(), None, "sparsity=0.7", allocate=given, repair="none").allocation.kept == (
            first.allocation.kept
        )
    content = json.loads((tmp_path / "run" / "allocation.json").read_text())
    content["layers"]["out.weight"]["density"] = 1.0
    (tmp_path / "edited.json").write_text(json.dumps(content))
    edited = prune(case.make(), None, "sparsity=0.7", allocate=str(tmp_path / "edited.json"), repair="none").allocation
    assert sum(edited.kept.values()) == sum(first.allocation.kept.values())
    assert (
        edited["out.weight"] / edited["full.weight"] > first.allocation["out.weight"] / first.allocation["full.weight"]
    )


def test_a_directory_called_like_a_method_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "uniform").mkdir()
    monkeypatch.chdir(tmp_path)
    result = prune(nn.Linear(6, 6), None, "sparsity=0.5", allocate="uniform", repair="none")
    assert result.report()["method"] == "uniform"


# parts


def test_parts_may_be_values_and_are_called_by_their_names():
    case = CASES["with batch norm"]
    parts = {"allocate": METHODS["lamp"], "repair": [METHODS["bn"], "variance"]}
    report = prune(case.make(), case.inputs(), "sparsity=0.5", **parts).report()
    assert (report["allocate"], report["repair"]) == ("lamp", ["bn", "variance"])

    def mine(problem: Problem) -> dict[str, float]:
        return {layer.name: 1.0 for layer in problem.scope}

    report = prune(case.make(), case.inputs(), "sparsity=0.5", allocate=Rule(mine), repair="none").report()
    assert report["allocate"] == report["method"] == "mine"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"method": "erq"}, r"unknown method 'erq': did you mean 'erk'"),
        ({"allocate": "bn"}, r"unknown allocator 'bn'"),
        ({"repair": "erk"}, r"unknown repair 'erk'"),
        ({"repair": "bn,,variance"}, r"unknown repair ''"),
        ({"allocate": METHODS["bn"]}, r"bn is no method with role 'allocate'"),
        ({"repair": [METHODS["erk"]]}, r"erk is no method with role 'repair'"),
        ({"repair": [3]}, r"int is no method with role 'repair'"),
        ({"score": "weight"}, r"unknown score 'weight'"),
        ({"pattern": "2-4"}, r"unknown pattern '2-4'"),
        ({"options": {"variance": {"limits": 3}}}, r"unknown option of variance 'limits': did you mean 'limit'"),
        ({"options": {"erk": {"densities": 3}}}, r"unknown option of erk 'densities'"),
        ({"options": {"variance": {"limit": "x"}}}, r"limit='x': a number"),
        ({"options": {"lamp": {}}}, r"no method of this run is called 'lamp'"),
        ({"samples": 0}, r"samples=0"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"budget": "sparsity=1.5"}, r"sparsity=1\.5 is out of range"),
        ({"rules": Rules(exclude=("nothing*",))}, r"rule 'nothing\*' matches no prunable layer"),
    ],
)
def test_parts_that_do_not_fit_are_one_clear_line(parts: dict[str, Any], said: str, tmp_path: Path):
    budget = parts.pop("budget", "sparsity=0.5") if "budget" in parts else "sparsity=0.5"
    case = CASES["linear chain"]
    with pytest.raises((UsageError, BudgetError), match=said) as caught:
        prune(case.make(), case.inputs(), budget, save_to=tmp_path / "run", **{"method": "erk"} | parts)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


# the result


def test_a_result_that_breaks_its_budget_cannot_be_constructed():
    result = prune(CASES["linear chain"].make(), None, "sparsity=0.5", repair="none")
    good = dict(vars(result))
    assert Result(**good).allocation.kept == result.allocation.kept
    masks = dict(result.masks)
    fuller = masks["0.weight"].clone()
    fuller[~fuller] = True
    for candidate in (
        replace(result.candidate, masks=masks | {"0.weight": fuller}),
        replace(result.candidate, masks={}),
        replace(result.candidate, masks={"0.weight": masks["0.weight"]}),
        replace(result.candidate, allocation=_raised(result)),
    ):
        with pytest.raises(BudgetError, match="masks do not keep what the allocation says"):
            Result(**good | {"candidate": candidate})
    dense = allot.run.problem.Candidate.dense(result.problem)
    full = {layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in result.problem.scope}
    with pytest.raises(BudgetError, match="are broken: 144 of 144 weights"):
        Result(**good | {"candidate": replace(dense, masks=full)})


def _raised(result: Result) -> allot.Allocation:
    kept = result.allocation.kept
    return allot.Allocation.of(kept | {"0.weight": kept["0.weight"] + 1}, result.allocation.total)


def test_a_result_with_values_that_are_not_finite_cannot_be_constructed():
    result = prune(CASES["linear chain"].make(), None, "sparsity=0.5", repair="none")
    broken = replace(result.candidate, tensors={"0.bias": torch.full((8,), math.nan)})
    with pytest.raises(allot.AllotError, match=r"0\.bias holds values that are not finite"):
        Result(**vars(result) | {"candidate": broken})


def test_a_result_can_be_saved_later_and_verified_only_then(tmp_path: Path):
    result = prune(CASES["linear chain"].make(), None, "sparsity=0.5", repair="none")
    with pytest.raises(UsageError, match="nothing to verify"):
        result.verify()
    assert result.report()["bytes"] == {"dense": None, "file": None, "with_ideal_mask": None}
    assert result.save(tmp_path / "later")["passed"] and result.verify()["passed"]
    assert allot.load(tmp_path / "later").keys() == result.state_dict().keys()
    report = json.loads((tmp_path / "later" / "report.json").read_text())
    assert report["bytes"]["file"] == (tmp_path / "later" / "model.bitmask.safetensors").stat().st_size


@pytest.mark.parametrize(("data", "parts", "method"), [
    (torch.zeros(8, 6), {}, "best"), (None, {"repair": "none"}, "erk"), (torch.zeros(8, 6), {"repair": "bias"}, "erk"),
    (torch.zeros(8, 6), {"method": "uniform"}, "uniform"),
])  # fmt: skip
def test_a_run_that_names_no_method_takes_best_where_there_is_data(data: Any, parts: dict[str, Any], method: str):
    assert prune(CASES["linear chain"].make(), data, "sparsity=0.5", **parts).method == method


def test_outputs_that_cannot_be_compared_leave_best_without_its_training():
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.linear(x)
            return logits, logits.argmax(1)

    made = prune(Labelled(), torch.randn(40, 6), "sparsity=0.5")
    assert made.report()["repair"] == ["admm"] and made.log.backward == 0


def test_a_limit_of_steps_reaches_every_training_of_best(tmp_path: Path):
    model, inputs = CASES["linear chain"].make(), torch.randn(40, 6)
    limited = limit_steps(assemble("best"), 7, required=True)
    trainings = [limited.repair[2].training, limited.repair[3].then[1].training]
    assert [training.max_steps for training in trainings] == [7, 7]
    far = {"polish": {"unfitted": 0}, "anew": {"unfitted": 100}}
    made = prune(model, inputs, "sparsity=0.9", max_steps=7, options=far)
    assert 0 < made.report()["diagnostics"]["training"][0]["steps"] <= 7
    with pytest.raises(UsageError, match=r"give --set options\.distill\.steps=auto"):
        prune(model, inputs, "sparsity=0.5", repair="distill", max_steps=7)
    with pytest.raises(UsageError, match="none of its repairs trains"):
        prune(model, inputs, "sparsity=0.5", repair="bias", max_steps=7)
