"""Samples read by several threads, and samples that cannot be read."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

import allot
from allot import Calibration, Readable, UsageError, evaluate
from allot.errors import CorruptSample
from allot.run.reading import read


class Files(Dataset):
    """Sample i is i in four places, and a label; those in `broken` raise as a file that is no picture does."""

    def __init__(self, count: int = 40, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken, self.threads = count, set(broken), set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        self.threads.add(threading.get_ident())
        time.sleep(0.002 * (index % 3 == 0))  # later ones are done first
        if index in self.broken:
            raise OSError(f"file {index} is cut off")
        return torch.full((4,), float(index)), index % 3


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    alone, together = Files(), Files()
    one = Calibration.of(alone, samples=30, batch_size=8, seed=3)
    many = Calibration.of(together, samples=30, batch_size=8, seed=3, workers=workers)
    for k in range(6):
        assert torch.equal(one.batch(k)[0], many.batch(k)[0])
    assert threading.get_ident() not in together.threads and alone.threads == {threading.get_ident()}
    assert one.repeats() and many.repeats()


def test_samples_are_read_ahead_and_not_all_at_once():
    seen: list[int] = []

    class Counted(Files):
        def __getitem__(self, index: int):
            seen.append(index)
            return super().__getitem__(index)

    samples = read(Counted(200), range(200), workers=2)
    assert next(samples)[1] == 0
    assert 1 < len(seen) < 20
    samples.close()
    assert len(seen) < 20


def test_an_error_of_a_worker_is_the_error_of_the_sample():
    with pytest.raises(OSError, match="file 5 is cut off"):
        Calibration.of(Files(broken=(5,)), samples=40, workers=3).batch(0)


@pytest.mark.parametrize("workers", [-1, 1.5, True])
def test_a_number_of_workers_that_is_none_is_refused(workers):
    with pytest.raises(UsageError, match=f"workers={workers}"):
        Calibration.of(Files(), workers=workers)
    with pytest.raises(UsageError, match=f"workers={workers}"):
        evaluate(torch.nn.Linear(4, 3), Files(), workers=workers)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_next_of_the_draw_takes_the_place_of_a_sample_that_cannot_be_read(workers, caplog):
    whole = Calibration.of(Files(), samples=40, seed=5)
    draw = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    broken = (draw[0], draw[4], draw[30])
    source = Readable(Files(broken=broken))
    with caplog.at_level(logging.WARNING, logger="allot"):
        found = Calibration.of(source, samples=10, seed=5, workers=workers)
    assert found.indices == tuple([i for i in draw if i not in broken][:10])
    # the third was never needed, whoever read ahead
    assert source.unreadable.keys() == set(broken[:2])
    assert [record.getMessage() for record in caplog.records] == [
        f"left out: sample {i} cannot be read (file {i} is cut off)" for i in broken[:2]
    ]
    assert len(whole) == 40


def test_all_samples_are_used_where_all_are_readable():
    for samples in (7, 40, 100):
        plain, readable = (Calibration.of(data, samples=samples, seed=1) for data in (Files(), Readable(Files())))
        assert plain.indices == readable.indices


def test_samples_that_cannot_be_read_are_told_once_and_not_scored(caplog):
    data = Readable(Files(9, broken=(2, 6)))
    model = torch.nn.Linear(4, 3)
    with caplog.at_level(logging.WARNING, logger="allot"):
        scores = [evaluate(model, data, workers=workers, batch_size=4) for workers in (0, 2)]
    assert scores[0] == scores[1] and scores[0].samples == 7 and scores[0].unreadable == 2
    kept = [Files(9)[i] for i in range(9) if i not in (2, 6)]
    assert scores[0].score == evaluate(model, kept).score
    assert len(caplog.records) == 2 and scores[0].to_json()["unreadable"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_data_of_which_nothing_can_be_read_say_so(workers):
    def data() -> Readable:
        return Readable(Files(4, broken=(0, 1, 2, 3)))

    told = r"none of the 4 samples can be read; the first: sample \d cannot be read \(file \d is cut off\)\."
    with pytest.raises(UsageError, match=told):
        Calibration.of(data(), workers=workers)
    with pytest.raises(UsageError, match=told):
        evaluate(torch.nn.Linear(4, 3), data(), workers=workers)


def test_a_sample_that_breaks_after_it_was_chosen_is_an_error():
    files = Files(6)
    calibration = Calibration.of(Readable(files), samples=6)
    files.broken.add(3)
    with pytest.raises(CorruptSample, match=r"sample 3 cannot be read.*--skip-corrupt.*Readable"):
        calibration.batch(0)


def test_only_data_with_places_can_leave_samples_out():
    with pytest.raises(UsageError, match="generator cannot be left out: a Dataset with a length is accepted"):
        Readable(iter_ for iter_ in ())


def test_a_run_tells_how_many_samples_it_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data, test = Readable(Files(12, broken=(2, 6))), Readable(Files(9, broken=(1,)))
    report = allot.prune(model, data, "sparsity=0.5", method="uniform", repair="bias", test=test, workers=2).report()
    assert report["unreadable"] == 2 and report["scores"]["unreadable"] == 1 and report["scores"]["samples"] == 8
    again = allot.prune(model, Files(12), "sparsity=0.5", method="uniform", repair="none").report()
    assert again["unreadable"] == 0
