"""Scores of one's own: functions of a batch or of all data, with targets of any form."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import allot
from allot import UsageError, evaluate
from allot.run.metric import Metric


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = draw(7, 3)
LINEAR = nn.Linear(3, 2).eval()


def test_a_batch_weighs_by_its_samples():
    y = draw(7, 2, seed=1)
    with torch.no_grad():
        whole = float(((LINEAR(X) - y) ** 2).mean())
    for data, batch_size in ((TensorDataset(X, y), 3), (DataLoader(TensorDataset(X, y), 4), 256)):
        score = evaluate(LINEAR, data, metric=F.mse_loss, batch_size=batch_size)
        assert score.score == pytest.approx(whole) and score.samples == 7
        assert score.metric == "mse_loss" and score.lower == ("mse_loss",) and score.nll is None


def test_the_first_name_is_the_headline():
    def quality(outputs, targets):
        return {"r2": 0.5, "mae": (outputs - targets).abs().mean()}

    score = evaluate(LINEAR, TensorDataset(X, draw(7, 2)), metric=quality)
    assert (score.metric, score.score, score.lower) == ("r2", 0.5, ("mae",))
    assert score.to_json() == {
        "metric": "r2", "score": 0.5, "samples": 7, "values": dict(score.values), "lower_is_better": ["mae"]
    }  # fmt: skip


def test_a_function_of_the_model_and_the_data_gets_both_whole_and_in_eval_mode():
    data = TensorDataset(X, torch.arange(7) % 2)
    seen: list[Any] = []

    def accuracy(model: nn.Module, data: Any) -> float:
        seen.append((model.training, data, torch.is_grad_enabled()))
        inputs, labels = zip(*data, strict=True)
        return float((model(torch.stack(inputs)).argmax(1) == torch.stack(labels)).float().mean())

    LINEAR.train()
    score = evaluate(LINEAR, data, metric=accuracy)
    assert seen == [(False, data, False)] and LINEAR.training
    LINEAR.eval()
    assert score.score == pytest.approx(evaluate(LINEAR, data).score) and score.samples == 7
    # other tensors: a copy of the model holds them
    zeros = {"weight": torch.zeros(2, 3), "bias": torch.tensor([1.0, 0.0])}
    assert evaluate(LINEAR, data, metric=accuracy, tensors=zeros).score == pytest.approx(4 / 7)
    assert LINEAR.weight.abs().sum() > 0


# Targets of every form


def test_multi_label_targets():
    targets = (draw(7, 2, seed=2) > 0).float()

    def hamming(outputs, targets):
        return ((outputs > 0) == (targets > 0)).float().mean()

    with torch.no_grad():
        wanted = float(((LINEAR(X) > 0) == (targets > 0)).double().mean())
    assert evaluate(LINEAR, TensorDataset(X, targets), metric=hamming, batch_size=2).score == pytest.approx(wanted)


class Boxes(nn.Module):
    """A box a picture, in a list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.box = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": box[None]} for box in self.box(x)]


def nearest(outputs, targets):
    """The mean distance from a box to the nearest target."""
    pairs = zip(outputs, targets, strict=True)
    return sum(float(torch.cdist(found["boxes"], wanted["boxes"]).min()) for found, wanted in pairs) / len(targets)


def test_detection_targets_of_several_sizes_through_samples_and_through_a_loader():
    model = Boxes()
    samples = [(x, {"boxes": draw(1 + i % 3, 4, seed=i)}) for i, x in enumerate(X)]
    with torch.no_grad():
        wanted = nearest(model(X), [target for _, target in samples])
    loader = DataLoader(samples, batch_size=3, collate_fn=lambda s: (torch.stack([x for x, _ in s]), [y for _, y in s]))
    for data in (samples, loader):
        assert evaluate(model, data, metric=nearest, batch_size=3).score == pytest.approx(wanted)


def test_targets_in_dicts():
    samples = [({"input": x}, {"value": x.sum(), "group": i % 2}) for i, x in enumerate(X)]

    def mae(outputs, targets):
        return {"mae": (outputs[:, 0] - targets["value"]).abs().mean(), "odd": targets["group"].float().mean()}

    score = evaluate(LINEAR, samples, metric=mae)
    with torch.no_grad():
        assert score.score == pytest.approx(float((LINEAR(X)[:, 0] - X.sum(1)).abs().mean()))
    assert score.values["odd"] == pytest.approx(3 / 7)


def test_without_labels_the_inputs_are_the_targets():
    def error(outputs, targets):
        return ((outputs - targets) ** 2).mean()

    assert evaluate(nn.Identity(), X, metric=error).score == 0


# Which form, which direction


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        ("loss", True), ("val_loss", True), ("MSELoss", True), ("mse", True), ("error_rate", True), ("RMSE", True),
        ("perplexity", True), ("mae/boxes", True), ("top1error", True), ("top1", False), ("iou", False), ("map", False),
        ("lossless", False), ("terror", False),
    ],
)  # fmt: skip
def test_words_of_the_name_say_which_way_is_better(name, lower):
    assert Metric.of(lambda outputs, targets: 0).lower([name]) == ((name,) if lower else ())


def test_an_attribute_says_otherwise():
    def metric(outputs, targets):
        return 0

    for says, wanted in ((True, ("fid", "loss")), (False, ()), ({"fid"}, ("fid",)), ("loss", ("loss",))):
        metric.lower_is_better = says
        assert Metric.of(metric).lower(["fid", "loss"]) == wanted


class Callable:
    def __call__(self, outputs, targets):
        return 1


def test_anything_that_can_be_called_is_a_metric():
    for function, name in (
        (Callable(), "Callable"),
        (nn.MSELoss(), "MSELoss"),
        (partial(F.l1_loss, reduction="mean"), "partial"),
        (torch.dist, "dist"),  # written in C
    ):
        score = evaluate(nn.Identity(), TensorDataset(X, X), metric=function)
        assert score.metric == name


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda outputs: 1, "does not take two arguments"),
        (lambda a, b, c: 1, "does not take two arguments"),
        (lambda data, model: 1, "may mean a batch or all the data"),
        (lambda net, data: 1, "may mean a batch or all the data"),
        (3, "metric=3: a function, file.py:function"),
        ("nowhere.py:iou", r"metric 'nowhere.py:iou': .*nowhere.py.*; file.py:function or package.module:function"),
        (lambda outputs, targets: outputs, r"returns a Tensor of shape \[7, 3\] as '<lambda>': one number is accepted"),
        (lambda outputs, targets: "high", "returns a str as"),
        (lambda outputs, targets: {}, r"returns {}: a number or {name: number} is accepted"),
        (lambda outputs, targets: 1 / 0, r"the metric <lambda> fails in line \d+: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_metric_is_refused_by_name(function, told):
    with pytest.raises(UsageError, match=told):
        evaluate(nn.Identity(), TensorDataset(X, X), metric=function)


def test_names_that_change_between_batches_are_refused():
    calls = iter("ab")
    with pytest.raises(UsageError, match="batches have different scores: a, then b"):
        evaluate(nn.Identity(), TensorDataset(X, X), metric=lambda outputs, targets: {next(calls): 1}, batch_size=4)


def test_no_samples_are_no_score():
    with pytest.raises(UsageError, match="the data to score on is empty"):
        evaluate(nn.Identity(), [], metric=F.mse_loss)


# In a run


def test_a_run_is_scored_by_the_metric_before_and_after(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    y = model(X).detach() + 0.1

    def quality(model, data):
        outputs = model(torch.stack([x for x, _ in data]))
        return {"mse": F.mse_loss(outputs, torch.stack([y for _, y in data])), "count": len(data)}

    def run(**settings: Any) -> Any:
        return allot.prune(
            model, X, "sparsity=0.5", repair="none", test=TensorDataset(X, y), save_to=tmp_path / "run", **settings
        )

    result = run(metric=quality)
    scores = result.report()["scores"]
    assert (scores["metric"], scores["samples"], scores["lower_is_better"]) == ("mse", 7, ["mse"])
    assert scores["dense"] == pytest.approx(0.01)
    assert scores["sparse"] == pytest.approx(float(F.mse_loss(result.model()(X), y).detach()))
    assert scores["values"] == {
        "mse": {"dense": scores["dense"], "sparse": scores["sparse"]}, "count": {"dense": 7, "sparse": 7}
    }  # fmt: skip
    assert run(metric=quality).scores == scores  # opened again
    # the metric is no part of what decides a run: another one scores the finished run
    other = run(metric=F.l1_loss).scores
    assert other["metric"] == "l1_loss" and other["dense"] == pytest.approx(0.1)


def test_a_metric_that_fails_is_an_error_before_the_run(tmp_path: Path):
    with pytest.raises(UsageError, match="the metric l1_loss fails"):
        allot.prune(LINEAR, X, "sparsity=0.5", test=[(x, "text") for x in X], metric=F.l1_loss, save_to=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_metric_without_data_to_score_on_is_refused():
    with pytest.raises(UsageError, match="metric: there is nothing to score: give --test"):
        allot.prune(LINEAR, X, "sparsity=0.5", metric=F.l1_loss)
