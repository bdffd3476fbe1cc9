"""Models whose outputs are no logits: lists of dicts, as detectors give, through the user's function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import allot
from allot import UsageError


class Detector(nn.Module):
    """For each picture a dict of boxes `[A, 4]`, scores `[A]` and labels `[A]`, of 16 places or those above `least`."""

    def __init__(self, least: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)
        self.least = least

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = self.body(x)
        boxes = self.boxes(found).flatten(2).mT
        scores, labels = self.classes(found).flatten(2).mT.softmax(-1).max(-1)
        rows = [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(boxes, scores, labels, strict=True)]
        if self.least is None:
            return rows
        return [{key: value[row["scores"] > self.least] for key, value in row.items()} for row in rows]


def places(output: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Boxes `[B, A, 4]` and scores `[B, A]`; labels are whole numbers, and carry no gradients."""
    return {key: torch.stack([row[key] for row in output]) for key in ("boxes", "scores")}


@pytest.fixture
def pictures() -> Tensor:
    grey = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return grey.expand(-1, 3, -1, -1).contiguous()  # two thirds of the first layer's weights are not needed


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("erk", {}),  # bn: nothing is compared
        ("fcpts", {"fcpts": {"steps": 8, "start": "uniform"}}),
        ("unipts", {"fcpts": {"steps": 4}, "unipts": {"steps": 4}}),
    ],
)
def test_detectors_are_pruned_exactly(method, options, pictures):
    model = Detector().eval()
    for name in options:
        options[name] |= {"outputs": places, "loss": "mse"}
    repair = "bn" if method == "erk" else None
    result = allot.prune(
        model, pictures, "sparsity=0.5", method=method, repair=repair, options=options, samples=16, batch_size=8
    )
    report = result.report()
    assert report["kept"] == round(report["total"] / 2) and result.model()(pictures)[0].keys() == {
        "boxes",
        "scores",
        "labels",
    }


def test_distillation_brings_the_boxes_back(pictures):
    model = Detector()
    model.body[1].momentum = None
    model(pictures)  # statistics of batch norm as trained nets have them
    model.eval()
    settings = {"distill": {"outputs": places, "loss": "mse", "steps": 60}}

    def off(**given) -> float:
        made = allot.prune(model, pictures, "sparsity=0.5", method="uniform", batch_size=8, **given).model()
        with torch.no_grad():
            wanted, found = places(model(pictures)), places(made(pictures))
        return float((found["boxes"] - wanted["boxes"]).square().mean())

    assert off(repair="distill,bn", options=settings) < off(repair="bn") / 2


@pytest.mark.parametrize(
    ("stage", "named"), [("fcpts", "allocate"), ("unipts", "fcpts"), ("distill", "repair-1-distill")]
)
def test_without_a_function_the_error_says_what_came_and_what_to_give(stage, named, pictures):
    chain = {"method": "uniform", "repair": "distill"} if stage == "distill" else {"method": stage}
    told = (
        rf"{named}: a model output, a list of 8, the first a dict of boxes: float32 \[16, 4\], scores: float32 \[16\], "
        r"labels: int64 \[16\], cannot be compared: .*--set options.METHOD.outputs=package.module:function"
    )
    with pytest.raises(UsageError, match=told):
        allot.prune(Detector().eval(), pictures, "sparsity=0.5", batch_size=8, **chain)


def test_what_was_picked_by_score_has_no_counterpart(pictures):
    options = {"distill": {"outputs": lambda rows: [row["boxes"] for row in rows], "loss": "mse", "steps": 3}}
    with pytest.raises(
        UsageError, match=r"the sparse net gives outputs of shapes .* before the best of them are picked"
    ):
        allot.prune(
            Detector(0.5).eval(), pictures, "sparsity=0.8", method="uniform", repair="distill", options=options,
            batch_size=8,
        )  # fmt: skip


def test_a_function_is_found_in_a_file(pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    Path("picking.py").write_text(
        "import torch\n\n"
        "def places(rows):\n    return [torch.stack([row[key] for row in rows]) for key in ('boxes', 'scores')]\n"
    )

    def run(outputs):
        options = {"distill": {"outputs": outputs, "loss": "mse", "steps": 3}}
        return allot.prune(
            Detector().eval(), pictures, "sparsity=0.5", method="uniform", repair="distill", options=options
        ).state_dict()

    named, given = run("picking.py:places"), run(lambda rows: list(places(rows).values()))
    assert all(torch.equal(named[name], value) for name, value in given.items())
    with pytest.raises(UsageError, match=r"outputs='picking.py:no'.* file.py:function or package"):
        run("picking.py:no")
    with pytest.raises(UsageError, match=r"outputs='none.py:no'.* file.py:function or package"):
        run("none.py:no")
