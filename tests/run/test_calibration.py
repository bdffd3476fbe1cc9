"""Batches of calibration inputs: every kind of data, each sample once a pass, a function of (seed, k)."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from allot.errors import UsageError
from allot.run.calibration import Calibration, inputs_of

N = 10
X = torch.arange(N * 3, dtype=torch.float32).view(N, 3)
Y = torch.arange(N)


class Pairs(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(X[i], int(Y[i])) for i in range(N)])


class StreamWithLength(Stream):
    def __len__(self):
        return N


class NoLength(Dataset):
    def __getitem__(self, i):
        return X[i]


class Dicts(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": X[i], "z": X[i] + 1, "labels": Y[i], "label": 3, "target": None, "nothing": None}


SOURCES = {
    "tensor": lambda: X,
    "numpy": X.numpy,
    "numpy of doubles": lambda: X.double().numpy(),
    "dataset of pairs": Pairs,
    "tensor dataset": lambda: TensorDataset(X, Y),
    "tensor dataset without labels": lambda: TensorDataset(X),
    "subset": lambda: Subset(TensorDataset(torch.cat([X, X]), torch.cat([Y, Y])), range(N)),
    "concatenation": lambda: ConcatDataset([TensorDataset(X[:4], Y[:4]), TensorDataset(X[4:], Y[4:])]),
    "stream": Stream,
    "stream with a length": StreamWithLength,
    "loader": lambda: DataLoader(Pairs(), batch_size=4),
    "shuffling loader": lambda: DataLoader(Pairs(), batch_size=4, shuffle=True),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=3),
    "loader without batches": lambda: DataLoader(Pairs(), batch_size=None),
    "loader of a stream without batches": lambda: DataLoader(Stream(), batch_size=None),
    "list of tensors": lambda: list(X),
    "list of pairs": lambda: [(x, 0) for x in X],
    "list of lists": lambda: [[x, 0] for x in X],
    "list of arrays": lambda: [x.numpy() for x in X],
    "generator": lambda: (x for x in X),
    "generator of pairs": lambda: ((x, 0) for x in X),
    "tuple": lambda: tuple(X),
}


def one_pass(calibration: Calibration) -> list[torch.Tensor]:
    return [calibration.batch(k)[0] for k in range(calibration.batches)]


def rows(batches: list[torch.Tensor]) -> list[list[float]]:
    return sorted(torch.cat(batches).float().tolist())


@pytest.mark.parametrize("case", SOURCES)
def test_every_kind_of_data_gives_every_sample_once_a_pass(case):
    calibration = Calibration.of(SOURCES[case](), batch_size=4)
    assert len(calibration) == N and calibration.batches == 3
    assert rows(one_pass(calibration)) == X.tolist()


@pytest.mark.parametrize(
    "batched", [[X[:4], X[4:]], [(X[:4], Y[:4]), (X[4:], Y[4:])], [[X[:7], Y[:7]], [X[7:], Y[7:]]]]
)
def test_an_iterable_of_batches_is_taken_apart(batched):
    for data in (batched, iter(batched)):
        assert rows(one_pass(Calibration.of(data, batch_size=3, batched=True))) == X.tolist()


@pytest.mark.parametrize(
    "data",
    [Dicts(), DataLoader(Dicts(), batch_size=4, collate_fn=lambda samples: {"x": torch.stack([s["x"] for s in samples]),
     "z": torch.stack([s["z"] for s in samples]), "labels": torch.zeros(len(samples))}),
     [({"x": x, "z": x + 1, "labels": 0}, 5) for x in X]],
)  # fmt: skip
def test_a_dict_keeps_its_inputs_and_loses_its_labels(data):
    batches = one_pass(Calibration.of(data, batch_size=4))
    assert all(batch.keys() == {"x", "z"} for batch in batches)
    assert rows([batch["x"] for batch in batches]) == X.tolist()
    assert all(torch.equal(batch["z"], batch["x"] + 1) for batch in batches)


@pytest.mark.parametrize(
    "data",
    [
        [((x, x + 1), 0) for x in X],
        [([x, x + 1], 0) for x in X],
        [((x, x + 1),) for x in X],
        DataLoader([((x, x + 1), 0) for x in X], batch_size=4),
    ],
)
def test_several_inputs_stay_together(data):
    batches = one_pass(Calibration.of(data, batch_size=4))
    assert all(isinstance(batch, tuple) and len(batch) == 2 for batch in batches)
    assert rows([a for a, _ in batches]) == X.tolist()
    assert all(torch.equal(b, a + 1) for a, b in batches)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
def test_each_pass_covers_every_sample_once_in_batches_that_differ_by_one_at_most(n, batch_size, seed, epoch):
    calibration = Calibration.of(torch.arange(n), batch_size=batch_size, seed=seed)
    parts = [calibration.batch(epoch * calibration.batches + k) for k in range(calibration.batches)]
    sizes = [samples for _, samples in parts]
    assert sorted(torch.cat([part for part, _ in parts]).tolist()) == list(range(n))
    assert [len(part) for part, _ in parts] == sizes
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size


def test_a_batch_is_a_function_of_seed_and_number_only():
    torch.manual_seed(1)
    calibration = Calibration.of(X, batch_size=4, seed=3)
    forwards = [calibration.batch(k)[0] for k in range(9)]
    torch.manual_seed(2)
    again = Calibration.of(X, batch_size=4, seed=3)
    backwards = [again.batch(k)[0] for k in reversed(range(9))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    other = Calibration.of(X, batch_size=4, seed=4)
    assert not all(torch.equal(a, other.batch(k)[0]) for k, a in enumerate(forwards))
    assert not torch.equal(forwards[0], forwards[3])  # the second pass has an order of its own


def test_a_shuffling_loader_gives_the_same_samples_for_the_same_seed_and_draws_nothing_from_the_users_generator():
    def loader():
        return DataLoader(TensorDataset(torch.arange(100)), batch_size=7, shuffle=True)

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = Calibration.of(loader(), samples=20, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = Calibration.of(loader(), samples=20, seed=5)
    assert torch.equal(first.batch(0)[0], second.batch(0)[0])


def test_a_loader_with_a_sampler_gives_its_samples_only():
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=4, sampler=SubsetRandomSampler(range(10)))
    assert sorted(Calibration.of(loader).batch(0)[0].tolist()) == list(range(10))


def test_of_much_data_a_draw_by_seed_is_used():
    drawn = [Calibration.of(torch.arange(1000), samples=20, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].indices == drawn[1].indices != drawn[2].indices
    assert len(set(drawn[0].indices)) == 20


def test_of_an_endless_stream_the_first_samples_are_used():
    def stream():
        i = 0
        while True:
            yield torch.tensor(i)
            i += 1

    assert sorted(Calibration.of(stream(), samples=5).batch(0)[0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", [0, 2**31, 2**62, -1])
def test_any_whole_number_is_a_seed(seed):
    calibration = Calibration.of(torch.arange(9), samples=5, seed=seed)
    assert calibration.batch(10**6)[1] == 5


def test_the_example_is_a_batch_of_one():
    assert Calibration.of(TensorDataset(X, Y)).example().tolist() == [X[0].tolist()]


def test_batches_are_put_into_the_models_dtype_but_whole_numbers_stay():
    calibration = Calibration.of([{"x": np.ones(3), "ids": torch.arange(3)}], dtype=torch.bfloat16)
    batch = calibration.example()
    assert batch["x"].dtype == torch.bfloat16 and batch["ids"].dtype == torch.int64


@pytest.mark.parametrize("data", [[], torch.zeros(0, 3), iter([]), TensorDataset(torch.zeros(0, 3)), np.zeros((0, 3))])
def test_no_data_is_refused(data):
    with pytest.raises(UsageError, match="calibration data is empty"):
        Calibration.of(data)


class Picture:
    """Like an image of PIL: no tensor, no array."""

    size = (4, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(3), torch.zeros(4)], "do not form a batch"),
        ([Picture(), Picture()], "do not form a batch"),
        ([(Picture(), 0)], "do not form a batch"),
        (["a text", "another"], "do not form a batch"),
        ([{"text": "a text"}], "do not form a batch"),
        ([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], "do not form a batch"),
        ([()], "empty tuple"),
        ([np.array([None])], "do not form a batch"),
    ],
)
def test_samples_that_form_no_batch_are_refused(data, message):
    with pytest.raises(UsageError, match=message):
        Calibration.of(data).batch(0)


@pytest.mark.parametrize("data", ["path/to/data", b"bytes", {"x": X}, 5, object(), NoLength()])
def test_what_is_no_data_is_refused_with_its_type(data):
    with pytest.raises(UsageError, match=f"of type {type(data).__name__}.*accepted"):
        Calibration.of(data)


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}, {"samples": -1}])
def test_numbers_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name}={options[name]}"):
        Calibration.of(X, **options)


def test_the_inputs_of_a_sample_are_its_first_place():
    assert inputs_of((1, 2)) == inputs_of([1, 2]) == inputs_of(1) == 1
    assert inputs_of(((1, 2), 3)) == inputs_of([[1, 2], 3]) == (1, 2)
    assert inputs_of({"a": 1, "labels": 2, "b": None}) == {"a": 1}
