"""What the user's model and data raise reaches the caller as it is, with a note, and nothing is left behind."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import allot
from allot.errors import in_one_line, raised_at, users_errors
from allot.run import store
from allot.run.calibration import Calibration


class OutOfCoffee(Exception):
    """An exception that nobody but the user knows."""


class Tired(nn.Module):
    """A layer that fails after so many forward passes."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.layer, self.calls, self.after = nn.Linear(8, 4), 0, after

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise OutOfCoffee("empty")
        return self.layer(x)


class Broken(Dataset[Tensor]):
    """Sample 7 cannot be read."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        if index == 7:
            raise OutOfCoffee("disk")
        return torch.ones(8) * index


def trained(model: nn.Module, data: Any, **more: Any) -> Any:
    steps = {"distill": {"steps": 5, "learning_rate": 0.01}}
    return allot.prune(model.eval(), data, "sparsity=0.5", repair="distill", options=steps, **more)


@pytest.mark.parametrize("after", [0, 1, 4, 9, 15])
def test_a_model_that_raises_in_any_pass_leaves_its_own_exception_and_no_directory(after: int, tmp_path: Path):
    with pytest.raises(OutOfCoffee, match="empty") as caught:
        trained(Tired(after), torch.randn(64, 8), save_to=tmp_path / "runs" / "x")
    assert "allot.prune" in " ".join(caught.value.__notes__)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [Broken(), DataLoader(Broken(), 8), (Broken()[i] for i in itertools.count())])
def test_data_that_raise_leave_their_own_exception(data: Any, tmp_path: Path):
    with pytest.raises(OutOfCoffee, match="disk") as caught:
        trained(nn.Linear(8, 4), data, save_to=tmp_path / "x")
    assert "in allot.prune" in caught.value.__notes__
    assert list(tmp_path.iterdir()) == []


def test_a_sample_that_raises_is_named():
    with pytest.raises(OutOfCoffee) as caught:
        Calibration.of(Broken(), samples=64).batch(0)
    assert caught.value.__notes__ == ["reading sample 7"]


def test_scoring_names_itself():
    with pytest.raises(OutOfCoffee) as caught:
        allot.evaluate(Tired(0), [(torch.ones(8), 1)])
    assert caught.value.__notes__[-1].startswith("in allot.evaluate: the model does not run")


def test_a_directory_that_was_there_stays_with_its_files(tmp_path: Path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OutOfCoffee):
        trained(Tired(12), torch.randn(64, 8), save_to=tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and not list((tmp_path / "x").iterdir())


def test_a_run_that_was_stopped_before_is_not_removed_by_an_error(tmp_path: Path):
    inputs = torch.randn(64, 8)
    torch.manual_seed(0)
    model, stops = Tired(10**6), itertools.count()
    with pytest.raises(allot.Stopped):
        trained(model, inputs, save_to=tmp_path / "x", should_stop=lambda: next(stops) == 5)
    model.calls, model.after = 0, 8
    with pytest.raises(OutOfCoffee) as caught:
        trained(model, inputs, save_to=tmp_path / "x")
    assert any("the same call resumes" in note for note in caught.value.__notes__)
    model.after = 10**6
    trained(model, inputs, save_to=tmp_path / "x").verify()


def test_work_worth_saving_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "SAVE_SECONDS", 0.0)
    with pytest.raises(OutOfCoffee):
        trained(Tired(12), torch.randn(64, 8), save_to=tmp_path / "x")
    assert list((tmp_path / "x").glob("state-*.pt"))


def test_an_error_of_torch_about_inputs_stays_an_error_of_allot():
    class Reshapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.view(3, 7))

    with pytest.raises(allot.UsageError, match="does not run on inputs of shape"):
        trained(Reshapes(), torch.randn(64, 8))


def test_samples_of_an_endless_data_set_are_drawn_without_a_list_of_all():
    class Endless(Dataset[Tensor]):
        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor([index % 7.0])

    first, again = (Calibration.of(Endless(), samples=100, seed=3).indices for _ in range(2))
    assert first == again and len(set(first)) == 100
    assert max(first) > 10**11 and first != Calibration.of(Endless(), samples=100, seed=4).indices


def test_a_number_is_no_data():
    for number in (torch.tensor(3.0), torch.tensor(3.0).numpy()):
        with pytest.raises(allot.UsageError, match=r"one number \(3.0\)"):
            trained(nn.Linear(8, 4), number)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_every_exception_has_one_line_that_names_the_place():
    def fails(error: Exception) -> None:
        raise error

    for error, says in [
        (ValueError("a\nb"), "ValueError: a b"),
        (Unprintable(), "Unprintable"),
        (KeyError(), "KeyErr"),
    ]:
        with pytest.raises(type(error)) as caught, users_errors("allot.prune"):
            fails(error)
        line = in_one_line(caught.value)
        assert line.startswith(says) and "test_users_errors.py:" in line and "in fails" in line and "\n" not in line
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert raised_at(caught.value).startswith("test_users_errors.py:")
