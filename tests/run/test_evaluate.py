"""Top-1 of every kind of labels, and clear errors about labels that are no classes."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import allot
from allot import UsageError, evaluate
from allot.run import labelled
from allot.run.labelled import described, labelled_batches


class Fixed(nn.Module):
    """A model that gives logits for the numbers of its samples."""

    def __init__(self, logits: Tensor, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.logits, self.wrap = logits, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.logits[x.long().flatten()])


def scored(logits: Tensor, labels: Any, wrap: Any = lambda logits: logits, **settings: Any) -> Any:
    return evaluate(Fixed(logits, wrap), [(torch.tensor([float(i)]), y) for i, y in enumerate(labels)], **settings)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: OrderedDict(out=logits, aux=logits[:, :1]),  # torchvision's segmentation
        lambda logits: SimpleNamespace(logits=logits),
    ],
)
def test_every_pixel_counts_in_a_segmentation(wrap):
    logits, labels = draw(5, 3, 4, 6), torch.arange(120).reshape(5, 4, 6) % 3
    score = scored(logits, labels, wrap, batch_size=2)
    assert score.metric == "top1" and score.samples == 5
    right = [logits[i, :, h, w].argmax() == labels[i, h, w] for i in range(5) for h in range(4) for w in range(6)]
    assert score.score == pytest.approx(sum(map(int, right)) / 120)
    assert score.nll == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))


def test_classes_may_come_last_and_labels_may_have_a_channel():
    logits, labels = draw(5, 3, 4), torch.arange(20).reshape(5, 4) % 3
    plain = scored(logits, labels)
    assert scored(logits.movedim(1, 2), labels) == plain
    assert scored(logits, labels[:, None]) == plain
    assert scored(logits, labels.to(torch.uint8)) == plain
    with pytest.raises(UsageError, match=r"logits \[5, 4, 4\] for labels \[5, 4\]: the classes may be the second"):
        scored(draw(5, 4, 4), labels)


def test_pixels_without_a_label_are_left_out():
    logits, labels = draw(4, 3, 2, 2), torch.arange(16).reshape(4, 2, 2) % 3
    whole = scored(logits[:2], labels[:2])
    for mark in (-100, 255):
        marked = labels.clone()
        marked[2:] = mark
        score = scored(logits, marked)
        assert (score.score, score.nll, score.samples) == (whole.score, pytest.approx(whole.nll), 4)
    assert scored(logits, labels + 1).nll is None  # 3 is no class, and no mark: it counts as wrong
    with pytest.raises(UsageError, match="the data to score on is empty"):
        scored(logits, torch.full((4, 2, 2), -100))


@pytest.mark.parametrize(
    ("logits", "labels", "told"),
    [
        (draw(4, 3), [0.5, 1.0, 2.0, 3.0], r"the labels are floating-point numbers \[4\]"),
        (draw(4, 3), ["cat", "dog", "cat", "cow"], "the labels are a list of 4, the first a text"),
        (draw(4, 3), [{"boxes": torch.zeros(i, 4)} for i in range(4)], "list of 4, the first a dict with 'boxes'"),
        (draw(4, 3), torch.ones(4, 3).long(), r"logits \[4, classes, 3\] for labels that are whole numbers \[4, 3\]"),
        (draw(4, 3), torch.ones(4, 3).bool(), r"true or false \[4, 3\]; the model gives \[4, 3\]"),
        (draw(4, 3, 2, 2), torch.zeros(4, 8, 8).long(), r"\[4, classes, 8, 8\].*the model gives \[4, 3, 2, 2\]"),
        (draw(4, 1), [0, 1, 1, 0], r"one number for every label, \[4, 1\]: no classes"),
        (draw(4, 3), [None] * 4, r"the data has no labels: top-1 needs samples \(inputs, label\)"),
    ],
)
def test_labels_that_are_no_classes_are_named_and_a_metric_is_pointed_to(logits, labels, told):
    with pytest.raises(UsageError, match=told) as raised:
        scored(logits, labels)
    assert "--metric file.py:function (metric= in Python) scores anything" in str(raised.value)


def test_a_model_that_gives_no_tensor_is_described():
    with pytest.raises(UsageError, match="the model gives a dict with 'boxes' and 'scores'"):
        scored(draw(4, 3), [0, 1, 2, 0], lambda logits: {"boxes": logits, "scores": logits})


def test_labels_that_do_not_stack_come_as_one_list_in_every_batch():
    boxes = [torch.ones(n, 4) for n in (1, 2, 3, 3)]
    batches = list(labelled_batches([(torch.zeros(2), {"boxes": b, "id": 1}) for b in boxes], 2))
    assert [len(row["boxes"]) for batch in batches for row in batch.targets] == [1, 2, 3, 3]
    assert [type(batch.targets) for batch in batches] == [list, list]
    assert [batch.samples for batch in batches] == [2, 2]
    with pytest.raises(UsageError, match=r"the labels of 2 samples do not form a batch.*collate_fn"):
        list(labelled_batches([(torch.zeros(2), b) for b in reversed(boxes)], 2))


def test_labels_in_dicts_stack_entry_by_entry():
    samples = [{"x": torch.zeros(2), "target": {"mask": np.ones((2, 2)), "kind": i}} for i in range(3)]
    (batch,) = labelled_batches(samples, 8)
    assert batch.inputs.keys() == {"x"} and batch.targets["mask"].shape == (3, 2, 2)
    assert batch.targets["kind"].tolist() == [0, 1, 2] and batch.samples == 3


def test_fewer_samples_with_many_pixels_are_scored_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labelled, "ENTRIES", 50)
    samples = [(torch.zeros(3, 4, 6), torch.zeros(4, 6).long())] * 5
    assert [batch.samples for batch in labelled_batches(samples, 256)] == [2, 2, 1]
    assert [batch.samples for batch in labelled_batches([(torch.zeros(3, 4, 6), 0)] * 5, 256)] == [5]


def test_inputs_that_do_not_form_a_batch_are_one_clear_error():
    with pytest.raises(UsageError, match=r"the inputs of 2 samples do not form a batch: .*samples of one shape"):
        evaluate(nn.Identity(), [(torch.zeros(2), 0), (torch.zeros(3), 1)])


def test_a_loader_gives_its_own_batches():
    def collate(samples):
        return torch.stack([x for x, _ in samples]), [y for _, y in samples]

    loader = DataLoader([(torch.zeros(2), "ab"[i % 2]) for i in range(5)], batch_size=2, collate_fn=collate)
    batches = list(labelled_batches(loader, 256))
    assert [(batch.targets, batch.samples) for batch in batches] == [(["a", "b"], 2), (["a", "b"], 2), (["a"], 1)]


def test_labels_are_described_in_words():
    assert described(torch.ones(2).bool()) == "true or false [2]"
    assert described((1, 2)) == "a tuple of 2, the first a int"
    assert described(None) == "missing"


def test_a_segmentation_net_is_scored_before_and_after():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    pictures = draw(6, 3, 5, 5)
    labels = net(pictures).argmax(1)
    result = allot.prune(net, pictures, "sparsity=0.5", test=list(zip(pictures, labels, strict=True)), repair="none")
    scores = result.report()["scores"]
    wanted = float((result.model()(pictures).argmax(1) == labels).float().mean())
    assert scores["dense"] == 1 and scores["sparse"] == pytest.approx(wanted) and scores["sparse"] < 1
