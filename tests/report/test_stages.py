"""The page says what each stage did to the net, and folds what training looked at on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import allot
from allot.report.page import run_page
from allot.report.stages import batch_norm_sentence, looks, stages, training_sentences
from allot.report.trajectories import read_steps
from report.pages import Seen, report


def told(**more: Any) -> dict[str, Any]:
    """A report of a ladder of three rungs: one kept, one undone, one left out."""
    entries = [
        {"stage": "dense", "step": 0, "kl": 0.0, "agreement": 1.0},
        {"stage": "select", "step": 1, "kl": 2.0, "agreement": 0.5},
        {"stage": "repair-1-admm", "step": 9, "kl": 0.2, "agreement": 0.9},
        {"stage": "repair-2-polish", "step": 5, "kl": 0.3, "agreement": 0.8},
        {"stage": "repair-2-polish", "step": 9, "kl": 0.25, "agreement": 0.8, "undone": True},
        {"stage": "guard", "step": 9, "kl": 0.2, "agreement": 0.9},
        {"stage": "repair-3-anew", "step": 1, "kl": 0.2, "agreement": 0.9},
    ]
    return {
        "allocate": "erk", "score": "magnitude", "fidelity": entries,
        "seconds": {"allocate": 0.1, "select": 0.2, "repair-1-admm": 3, "repair-2-polish": 4, "repair-3-anew": 0.5},
        "guard": ["polish made it worse: KL 0.2 -> 0.25; kept admm.", "anew left out: the net is near enough (0.2)."],
        "watch": {"samples": 64, "batch_norm": {"mode": "batch", "error": 0.0159}},
        "settings": {"hyperparameters": {"repair": [{}, {"frozen": True}, {}]}},
        "diagnostics": {"training": [{"rounds": 5, "steps": 320, "ended": "no step size helped"}]},
        **more,
    }  # fmt: skip


STEPS = [{"stage": "repair-2-polish", "step": i, "loss": 1.0 / (1 + i)} for i in range(20)]


def test_every_stage_says_how_it_ended_and_why():
    found = {stage.name: stage for stage in stages(told(), STEPS)}
    assert list(found) == ["densities by erk", "weights by magnitude", "admm", "polish", "anew"]
    assert [stage.outcome for stage in found.values()] == ["", "kept", "kept", "undone", "left out"]
    assert found["admm"].after.distance == "KL 0.2" and found["admm"].reason == ""
    assert found["polish"].after.distance == "KL 0.25" and found["polish"].reason.startswith("polish made it worse")
    assert found["anew"].after is None and found["anew"].reason == "the net is near enough (0.2)."


def test_a_stage_that_trained_says_how_long_with_which_loss_and_batch_norms():
    polish = stages(told(), STEPS)[3]
    assert polish.trained == 20 and polish.losses == ((1 + 1 / 2) / 2, (1 / 19 + 1 / 20) / 2)
    assert polish.batch_norm == "frozen"  # by itself, where the run uses the statistics of each batch
    other = stages(told(settings={"hyperparameters": {"repair": [{}, {}, {}]}}), STEPS)[3]
    assert other.batch_norm == "batch" and stages(told(), STEPS)[2].batch_norm == ""
    assert stages(told(settings={}), STEPS)[3].batch_norm == ""  # not on record
    assert "move by 1.59 %" in batch_norm_sentence(told()) and batch_norm_sentence(told(watch={})) == ""
    assert training_sentences(told()) == ["320 steps in 5 rounds; the end: no step size helped."]


def test_weights_that_an_allocator_trained_and_that_were_worse_say_so():
    entries = [
        {"stage": "dense weights", "step": 0, "kl": 0.2, "agreement": 0.9},
        {"stage": "select", "step": 1, "kl": 0.4, "agreement": 0.9, "undone": True},
        {"stage": "guard", "step": 1, "kl": 0.2, "agreement": 0.9},
    ]
    reason = "training in fcpts made it worse: KL 0.2 -> 0.4; kept dense weights."
    (select,) = stages(told(allocate="fcpts", fidelity=entries, guard=[reason], seconds={"select": 1.0}), [])
    assert (select.outcome, select.reason) == ("undone", reason)


def test_looks_are_the_measurements_that_end_no_stage():
    assert [(look.stage, look.step) for look in looks(told())] == [("repair-2-polish", 5)]


def test_the_page_of_the_default_shows_a_row_for_each_rung_and_folds_the_looks(tmp_path: Path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).eval()
    short = {"polish": {"unfitted": 0.0, "steps": 12, "rounds": 1}, "anew": {"far": 100.0}}
    result = allot.prune(
        net, torch.randn(48, 1, 6, 6), "sparsity=0.6", method="best", options=short, save_to=tmp_path / "run"
    )
    content, steps = report(tmp_path / "run"), read_steps(tmp_path / "run")
    seen = Seen((tmp_path / "run/report.html").read_text())
    heads, *rows = seen.table("outcome")
    assert heads[:2] == ["stage", "KL after"] and len(rows) == len(content["seconds"])
    by_name = {row[0]: row for row in rows}
    assert by_name["anew"][3].startswith("left out") and "near enough" in by_name["anew"][3]
    polish = next(stage for stage in stages(content, steps) if stage.name == "polish")
    assert polish.trained >= 12 and by_name["polish"][heads.index("steps trained")] == f"{polish.trained}"
    assert by_name["polish"][heads.index("batch norms")] == "frozen"
    assert len(looks(content)) > 3 and f"{len(looks(content))} looks at the net while it was trained" in seen.text
    assert result.verify()["passed"]


def test_a_run_of_which_nothing_was_compared_has_stages_without_distances(runs: dict[str, Path]):
    bare = {**report(runs["erk"]), "fidelity": [], "watch": {}, "guard": []}
    heads, *rows = Seen(run_page(bare, {"rows": [], "passed": True}, "", [])).table("seconds")
    assert heads == ["stage", "seconds"] and rows[0][0] == "densities by erk"
