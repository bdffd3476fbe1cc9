from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

import allot
from allot.report import progress
from allot.report.progress import Display, shown
from allot.report.stages import stages
from allot.report.table import ladder_table
from allot.run.activity import activities, activity, tell
from allot.run.driver import Progress as Step
from contract.cases import CASES

CASE = CASES["with batch norm"]


def console(*, terminal: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def written(screen: Console) -> str:
    return screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_now_and_then_with_loss_and_time_left(clock: list[float]):
    screen = console()
    with shown(screen) as display, activity("training (polish)", 4, 5):
        for step in range(1, 251):
            clock[0] = step / 3
            display(Step("repair-3-polish", step, 250, {"loss": 0.031, "forward": 8}))
    lines = written(screen).splitlines()
    assert lines == [
        "training (polish): 30 of 250, loss 0.031, 73 s left",
        "training (polish): 120 of 250, loss 0.031, 43 s left",
        "training (polish): 210 of 250, loss 0.031, 13 s left",
    ]


def test_an_activity_without_steps_is_a_line_where_the_last_one_is_long_ago(clock: list[float]):
    screen = console()
    with shown(screen):
        with activity("loading model"):
            clock[0] = 40.0
        with activity("measuring MACs"):
            pass
    assert written(screen) == "measuring MACs\n"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_has_a_bar_for_the_run_and_one_for_the_stage(clock: list[float], width: int):
    screen = console(terminal=True, width=width)
    with shown(screen) as display, activity("sparsity per layer (fcpts)", 2, 5):
        display(Step("allocate", 1, 250, {"loss": 0.5}))
        clock[0] = 10.0
        display(Step("allocate", 51, 250, {"loss": 0.031}))
        display.bars.refresh()
        run, stage = display.bars.tasks
        assert (run.completed, run.total) == (1 + 51 / 250, 5) and (stage.completed, stage.total) == (51, 250)
    text = written(screen)
    assert "stage 2 of 5" in text and "sparsity per layer (fcpts)" in text
    assert "51/250, loss 0.031, 40 s left" in text


def test_runs_of_a_sweep_have_the_bar_of_the_run():
    screen = console(terminal=True)
    with shown(screen) as display:
        display.whole("erk, sparsity=0.9, seed 0", 2, 12)
        with activity("choosing weights", 2, 4):
            display(Step("select", 1, 2, {}))
        run, _ = display.bars.tasks
        assert (run.description, run.completed, run.total) == ("erk, sparsity=0.9, seed 0", 2, 12)


def test_outcomes_are_lines_where_they_are_wanted():
    for lines, expected in ((True, "admm: KL 0.1, kept\n"), (False, "")):
        screen = console()
        with shown(screen, lines=lines):
            tell("admm: KL 0.1, kept")
        assert written(screen) == expected


def test_loggers_are_left_as_they_were():
    before = activities.level, list(activities.handlers)
    with shown(console()), pytest.raises(ZeroDivisionError), activity("measuring MACs"):
        _ = 1 / 0
    assert (activities.level, activities.handlers) == before and not progress._shown
    assert logging.getLogger("allot.phases").handlers == []


def test_a_notebook_is_drawn_on():
    assert Display(Console(force_jupyter=True, file=io.StringIO())).drawn
    assert not Display(console()).drawn


def test_python_is_silent_where_nobody_looks_and_shows_the_run_where_it_is_told_to(capsys: pytest.CaptureFixture[str]):
    seen: dict[bool | None, list[str]] = {None: [], True: []}
    for wanted in seen:
        allot.prune(
            CASE.make(), CASE.inputs(16), "sparsity=0.5", repair="bn,variance", batch_size=8, progress=wanted,
            on_step=lambda step, wanted=wanted: seen[wanted].append(step.stage),
        )  # fmt: skip
        told = capsys.readouterr()
        assert told.out == "" and ("weights by magnitude: " in told.err and "variance: " in told.err) is bool(wanted)
    assert seen[None] == seen[True] and told.err.count("\n") == 3
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_run_in_python_unless_it_is_told_not_to(monkeypatch: pytest.MonkeyPatch):
    screens: list[Console] = []

    def screen(**_: object) -> Console:
        screens.append(console(terminal=True))
        return screens[-1]

    monkeypatch.setattr(progress, "Lasting", screen)
    for wanted, drawn in ((None, True), (False, False)):
        allot.prune(CASE.make(), CASE.inputs(16), "sparsity=0.5", repair="bn,variance", batch_size=8, progress=wanted)
        text = written(screens[-1])
        assert ("measuring MACs" in text and "stage 4 of 4" in text) is drawn


def test_two_displays_do_not_stand_in_each_others_way():
    outer = console(terminal=True)
    with shown(outer):
        allot.prune(CASE.make(), CASE.inputs(16), "sparsity=0.5", method="erk", batch_size=8, progress=True)
    assert "choosing weights" in written(outer)


# The ladder


def entry(stage: str, kl: float, **more: object) -> dict[str, object]:
    return {"stage": stage, "step": 1, "kl": kl, "agreement": 0.9, **more}


LADDER = {
    "fidelity": [
        entry("dense", 0.0), entry("select", 1.7), entry("repair-1-admm", 0.3), entry("repair-2-admm-views", 0.4),
        entry("repair-2-admm-views", 0.5, undone=True), entry("guard", 0.3), entry("repair-3-polish", 0.2),
        entry("repair-4-anew", 0.2),
    ],
    "allocate": "erk", "score": "magnitude",
    "seconds": {
        "select": 0.1, "repair-1-admm": 1.0, "repair-2-admm-views": 1.0, "repair-3-polish": 1.0, "repair-4-anew": 0.1
    },
    "guard": ["admm-views made it worse: KL 0.3 -> 0.5; kept admm.", "anew left out: the net is near enough (0.2)."],
}  # fmt: skip


def test_every_repair_is_a_stage_with_its_last_distance_and_what_became_of_it():
    found = [(stage.name, stage.after and stage.after.value, stage.outcome) for stage in stages(LADDER)]
    assert found == [
        ("weights by magnitude", 1.7, "kept"), ("admm", 0.3, "kept"), ("admm-views", 0.5, "undone"),
        ("polish", 0.2, "kept"), ("anew", None, "left out"),
    ]  # fmt: skip
    assert stages(LADDER)[2].text == "admm-views: KL 0.5, agrees on 90.0 %, undone"
    assert stages(LADDER)[4].text == "anew: left out"


def test_the_ladder_is_a_table_of_80_columns_where_there_is_more_than_one_repair():
    screen = console()
    screen.print(ladder_table(LADDER))
    lines = written(screen).splitlines()
    assert max(map(len, lines)) <= 80 and sum("kept" in line for line in lines) == 3
    assert ladder_table({**LADDER, "seconds": {"select": 0.1}}) is None


def test_a_run_tells_its_stages(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="allot.activities"):
        result = allot.prune(CASE.make(), CASE.inputs(32), "sparsity=0.5", repair="bn,variance", batch_size=8)
    told = [record.getMessage() for record in caplog.records if record.name == "allot.activities"]
    assert told == [stage.text for stage in stages(result.report()) if stage.outcome]
    assert told[0].startswith("weights by magnitude: ")
