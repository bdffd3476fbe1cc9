"""Masks against every subset that there is."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from allot import prune
from allot.errors import PatternError, UsageError
from allot.network.layers import Layer, Rules, Scope
from allot.run import ranking
from allot.run.patterns import NM, Rows, Unstructured, indices_of, masks_of, parse, select

VALUES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 0.5, 1.0, math.inf]) | st.floats(-2, 2, width=32)


def best_subset(score: list[float], kept: int) -> set[int]:
    """Of all subsets, the one whose values in descending order are largest; of those, the lexicographically first."""
    subsets = itertools.combinations(range(len(score)), kept)
    return set(max(subsets, key=lambda s: (sorted((score[i] for i in s), reverse=True), [-i for i in s])))


def chosen(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


def linear(rows: int, inputs: int, **rules) -> Layer:
    return Scope.of(nn.Linear(inputs, rows, bias=False), Rules(**rules))["weight"]


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "sorted", "periodic", "infinite"])
def test_of_a_large_tensor_the_same_entries_are_selected(kind: str, monkeypatch: pytest.MonkeyPatch):
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(70_001, generator=draw)
    score = {
        "spread": score,
        "ties": (score * 50).round(),
        "equal": torch.zeros_like(score),
        "sorted": score.sort().values,
        "periodic": torch.arange(70_001) % 2 * (1 + score),  # the sample sees zeros only
        "infinite": torch.where(score > 0.9, math.inf, score),
    }[kind]
    for kept in (1, 700, 35_000, 69_000, 70_001):
        wanted = select(score, kept)
        with monkeypatch.context() as patch:
            patch.setattr(ranking, "LARGE", 10_000)
            assert torch.equal(select(score, kept), wanted) and int(wanted.sum()) == kept


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, max_size=8), st.data())
def test_selected_is_the_best_of_all_subsets_ties_to_the_lower_index(score, data):
    kept = data.draw(st.integers(0, len(score)))
    mask = select(torch.tensor(score), kept)
    assert int(mask.sum()) == kept
    assert chosen(mask) == best_subset(score, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_scores_of_any_number_type_are_ranked(dtype):
    assert select(torch.tensor([[3, 1], [3, 2]]).to(dtype), 2).tolist() == [[True, False], [True, False]]


def test_a_mask_has_the_shape_of_its_score():
    mask = select(rand(2, 3, 4), 5)
    assert mask.shape == (2, 3, 4) and mask.dtype == torch.bool and int(mask.sum()) == 5


def test_a_score_in_any_memory_layout_gives_the_same_mask():
    score = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert torch.equal(select(score.t().contiguous().t(), 3), select(score, 3))


@pytest.mark.parametrize("kept", [-1, 5])
def test_more_or_less_than_there_is_cannot_be_kept(kept):
    with pytest.raises(PatternError, match=f"cannot keep {kept} of 4 weights"):
        select(rand(4), kept)
    with pytest.raises(PatternError, match=rf"^weight: cannot keep {kept} of 4|^weight: {kept} weights cannot give"):
        Unstructured().mask(linear(2, 2), rand(2, 2), kept)
    with pytest.raises(PatternError, match=rf"^weight: cannot keep {kept} of 4|^weight: {kept} weights cannot give"):
        Rows().mask(linear(2, 2), rand(2, 2), kept)


@pytest.mark.parametrize("pattern", [Unstructured(), Rows(), NM(1, 2)])
@pytest.mark.parametrize("floor", [1, "1/row"])
def test_a_score_with_nan_is_refused_with_the_name_of_the_layer(pattern, floor):
    with pytest.raises(PatternError, match=r"^weight: the score holds nan"):
        pattern.mask(linear(2, 2, floor=floor), torch.tensor([[math.nan, 1.0], [0.0, 1.0]]), 2)


# A floor per row


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=6, max_size=6), st.integers(0, 3), st.data())
def test_a_floor_per_row_keeps_the_best_of_each_row_then_the_best_of_the_rest(values, floor, data):
    layer = linear(2, 3, floor=f"{floor}/row")
    kept = data.draw(st.integers(2 * floor, 6))
    mask = Unstructured().mask(layer, torch.tensor(values).view(2, 3), kept)
    forced = {3 * r + i for r in range(2) for i in best_subset(values[3 * r : 3 * r + 3], floor)}
    rest = [i for i in range(6) if i not in forced]
    expected = forced | {rest[i] for i in best_subset([values[i] for i in rest], kept - len(forced))}
    assert chosen(mask) == expected


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.Linear(5, 7)],
)
def test_every_output_channel_keeps_its_floor(make):
    layer = Scope.of(make(), Rules(floor="2/row"))["weight"]
    mask = Unstructured().mask(layer, rand(*layer.shape), 2 * layer.rows + 3)
    assert mask.shape == layer.shape and int(mask.sum()) == 2 * layer.rows + 3
    assert int(layer.matrix(mask).sum(1).min()) >= 2


@pytest.mark.parametrize("pattern", [Unstructured(), Rows()])
def test_rows_that_cannot_have_their_floor_are_an_error_with_the_layer(pattern):
    with pytest.raises(PatternError, match="weight: 3 weights cannot give 2 to each of 2 rows"):
        pattern.mask(linear(2, 4, floor="2/row"), rand(2, 4), 3)


# within each output row


def best_rows(score: list[list[float]], kept: int) -> set[int]:
    """Of all subsets with k or k + 1 a row, the best in each row, then the rows with one more by what it adds."""
    rows, columns = len(score), len(score[0])
    k, more = divmod(kept, rows)
    ranked = [sorted(range(columns), key=lambda i, row=row: (-row[i], i)) for row in score]
    extra = max(
        itertools.combinations(range(rows), more),
        key=lambda some: (sorted((score[r][ranked[r][k]] for r in some), reverse=True), [-r for r in some]),
    )
    return {r * columns + i for r in range(rows) for i in best_subset(score[r], k + (r in extra))}


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_each_row_keeps_its_best_and_one_more_goes_to_the_rows_that_gain_most(rows, columns, data):
    values = data.draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns))
    score = torch.tensor(values).view(rows, columns)
    for kept in range(rows * columns + 1):
        mask = Rows().mask(linear(rows, columns), score, kept)
        assert int(mask.sum()) == kept and mask.shape == score.shape and mask.dtype == torch.bool
        assert chosen(mask) == best_rows(score.tolist(), kept), kept


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.Linear(5, 7)],
)
def test_rows_are_output_channels_of_any_layer(make):
    layer = Scope.of(make(), Rules(floor="1/row"))["weight"]
    score = (rand(*layer.shape) * 5).floor()  # many ties
    assert Rows().feasible(layer) == (1, layer.rows, layer.total)
    for kept in (layer.rows, 3 * layer.rows + 2, layer.total - 1):
        mask = Rows().mask(layer, score, kept)
        assert mask.shape == layer.shape
        assert chosen(layer.matrix(mask)) == best_rows(layer.matrix(score).tolist(), kept)


def test_a_run_with_rows_meets_its_budget_with_rows_that_differ_by_one():
    model = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5))
    result = prune(model, rand(6, 9), "sparsity=0.63", pattern="rows", score="wanda")
    assert result.report()["kept"] == round(0.37 * (63 + 35)) and result.report()["pattern"] == "rows"
    for mask in result.masks.values():
        counts = mask.sum(1)
        assert int(counts.max() - counts.min()) <= 1


def test_rows_of_a_large_tensor_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch):
    layer, score = linear(9, 50), (rand(9, 50) * 20).round()
    wanted = {kept: Rows().mask(layer, score, kept) for kept in (4, 100, 203, 450)}
    monkeypatch.setattr(ranking, "LARGE", 100)
    for kept, mask in wanted.items():
        assert torch.equal(Rows().mask(layer, score, kept), mask) and int(mask.sum()) == kept


# n of every m


def groups_of(model: nn.Module, m: int) -> list[list[tuple[int, ...]]]:
    """Weight indices of each N:M group, written down from what a group is: m input channels of one output, in order."""
    weight = model.weight
    transposed = isinstance(model, nn.modules.conv._ConvTransposeNd)
    groups = getattr(model, "groups", 1)
    inputs = weight.shape[0] // groups if transposed else weight.shape[1]
    found = []
    for kernel in itertools.product(*map(range, weight.shape[2:])):
        for a in range(0, inputs, m):
            if transposed:
                for g, o in itertools.product(range(groups), range(weight.shape[1])):
                    found.append([(g * inputs + a + i, o, *kernel) for i in range(m)])
            else:
                found += [[(o, a + i, *kernel) for i in range(m)] for o in range(weight.shape[0])]
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(12, 3, bias=False),
        lambda: nn.Conv1d(12, 2, 2, bias=False),
        lambda: nn.Conv2d(24, 4, (2, 1), groups=2, bias=False),
        lambda: nn.ConvTranspose1d(12, 2, 2, bias=False),
        lambda: nn.ConvTranspose2d(24, 4, (2, 1), groups=2, bias=False),
    ],
)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (5, 6), (7, 12)])
def test_each_group_keeps_its_best_n(make, n, m):
    model = make()
    layer = Scope.of(model)["weight"]
    score = (rand(*layer.shape) * 4).floor()  # many ties
    step, fewest, most = NM(n, m).feasible(layer)
    assert (step, fewest, most) == (layer.total // m, layer.total * n // m, layer.total * n // m)
    mask = NM(n, m).mask(layer, score, fewest)
    expected = torch.zeros(layer.shape, dtype=torch.bool)
    for group in groups_of(model, m):
        for i in best_subset([float(score[at]) for at in group], n):
            expected[group[i]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("kept", "per_group"), [(0, 0), (4, 1), (12, 3), (16, 4)])
def test_other_whole_numbers_a_group_can_be_kept_too(kept, per_group):
    layer = linear(2, 8)
    mask = NM(2, 4).mask(layer, rand(2, 8), kept)
    assert (mask.view(-1, 4).sum(1) == per_group).all()


def test_what_is_no_whole_number_a_group_is_refused_with_the_layer():
    for kept in (3, -4, 20):
        with pytest.raises(PatternError, match=f"weight: 2:4 cannot keep {kept} of 16"):
            NM(2, 4).mask(linear(2, 8), rand(2, 8), kept)


@pytest.mark.parametrize(
    ("model", "inputs"), [(nn.Linear(6, 4), 6), (nn.Conv2d(8, 8, 2, groups=4), 2), (nn.ConvTranspose1d(6, 4, 4), 6)]
)
def test_input_channels_that_do_not_divide_are_an_error_with_the_layer_and_a_way_out(model, inputs):
    layer = Scope.of(model)["weight"]
    with pytest.raises(PatternError, match=rf"weight: {inputs} input channels do not divide by 4.*--exclude weight"):
        NM(2, 4).feasible(layer)
    with pytest.raises(PatternError, match="weight: 2:4 cannot keep"):
        NM(2, 4).mask(layer, rand(*layer.shape), layer.total // 2)


@pytest.mark.parametrize("rules", [{"min_density": {"*": 0.6}}, {"max_density": {"*": 0.4}}, {"floor": "5/row"}])
def test_bounds_that_exclude_the_pattern_are_an_error_with_the_layer(rules):
    with pytest.raises(PatternError, match="weight: 2:4 keeps 8 of 16 weights, outside"):
        NM(2, 4).feasible(linear(2, 8, **rules))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (2.0, 4.0), (True, 4), ("2", "4")])
def test_a_pattern_needs_fewer_than_m_and_more_than_none(n, m):
    with pytest.raises(PatternError, match=f"pattern {n}:{m}: .*like 2:4"):
        NM(n, m)


def test_patterns_are_read_and_written():
    for pattern in (Unstructured(), Rows(), NM(2, 4), NM(10, 16)):
        assert parse(str(pattern)) == pattern
    for text in ("", "2:4:8", "2-4", "Unstructured", "nm", "a:b", "row", "rows:2"):
        with pytest.raises(UsageError, match="unknown pattern"):
            parse(text)
    with pytest.raises(PatternError, match="pattern 4:2"):
        parse("4:2")


@pytest.mark.parametrize("pattern", [Unstructured(), Rows()])
def test_an_unstructured_layer_keeps_any_count_within_its_bounds(pattern):
    assert pattern.feasible(linear(2, 8, min_density={"*": 0.25}, max_density={"*": 0.5})) == (1, 4, 8)


# one order for every count


@pytest.mark.parametrize("pattern", [Unstructured(), Rows(), NM(None, 4), NM(2, 4)])
@pytest.mark.parametrize("floor", [1, "2/row"])
def test_the_first_of_an_order_are_the_weights_of_a_mask(pattern, floor):
    model = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(8, 5))
    for layer in Scope.of(model, Rules(floor=floor)):
        score = torch.randint(6, layer.shape, generator=torch.Generator().manual_seed(1)).float()  # many are equal
        order = pattern.order(layer, score)
        assert sorted(order.tolist()) == list(range(layer.total))
        step, fewest, most = pattern.feasible(layer)
        for kept in range(fewest, most + 1, step):
            mask = torch.zeros(layer.total, dtype=torch.bool).index_fill(0, order[:kept], True).view(layer.shape)
            assert torch.equal(mask, pattern.mask(layer, score, kept)), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_masks_are_the_first_of_a_stable_order_in_every_dtype(dtype: torch.dtype):
    layer = Layer("fc.weight", (6, 8), "linear")
    for seed in range(20):
        score = (
            (torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) * 2).round().to(dtype)
        )  # many are equal
        for pattern in (Unstructured(), Rows(), NM(None, 4), NM(None, 2), NM(None, 8)):
            step = pattern.feasible(layer)[0]
            for kept in range(step, 49, step):
                mask = torch.zeros(48, dtype=torch.bool)
                mask[pattern.order(layer, score)[:kept]] = True
                if kept >= layer.rows:
                    assert torch.equal(pattern.mask(layer, score, kept), mask.view(6, 8)), (pattern, kept)


@pytest.mark.parametrize("pattern", [Unstructured(), Rows(), NM(None, 4)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_masks_of_several_counts_are_those_of_each_count(pattern, ties: bool):
    layer, score = linear(6, 8), rand(6, 8)
    score = (score * 3).round() if ties else score
    for values, counts in ((score, (24, 12, 48, 12)), (score.to(torch.bfloat16), (36, 24))):
        for mask, kept in zip(masks_of(pattern, layer, values, counts), counts, strict=True):
            assert torch.equal(mask, pattern.mask(layer, values, kept)) and int(mask.sum()) == kept
    with pytest.raises(PatternError, match=layer.name):
        masks_of(pattern, layer, torch.full((6, 8), math.nan), (24,))


def test_indices_of_a_mask_are_its_true_entries():
    mask = rand(3, 7, 2) > 0.6
    assert torch.equal(indices_of(mask), mask.flatten().nonzero().flatten())
