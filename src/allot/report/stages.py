"""What each stage of a run did to the net: its distance from the dense one after it, and whether it was kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allot.report.fidelity import Shown, measurements

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of the method, and what it does where that is not to repair.
        after: the net at its end; None where nothing was measured.
        outcome: "kept", "undone" or "left out"; empty where nothing was compared.
        reason: why it was left out, or what undid it.
        trained: steps that had a loss.
        losses: mean loss of the first tenth of them, and of the last.
        batch_norm: "frozen" or "batch", what batch norms normalised by in training; empty where that is not on record,
            where nothing was trained, and in a net without batch norms.
    """

    name: str
    after: Shown | None
    outcome: str
    reason: str
    trained: int
    losses: tuple[float, float] | None
    batch_norm: str
    seconds: float

    @property
    def text(self) -> str:
        """The stage in a line."""
        parts = (self.after.distance, self.after.agreement, self.outcome) if self.after else (self.outcome,)
        return f"{self.name}: {', '.join(filter(None, parts))}"


def stages(report: Report, steps: Sequence[Report] = ()) -> list[Stage]:
    """The stages of a run in order.

    Args:
        steps: of steps.jsonl; without them nothing is said of training.

    >>> report = {"seconds": {"repair-1-bn": 0.1}, "fidelity": [{"stage": "repair-1-bn", "step": 1, "kl": 0.2}]}
    >>> [(one.name, one.after.distance, one.outcome) for one in stages(report, [])]
    [('bn', 'KL 0.2', 'kept')]
    """
    return [_stage_of(stage, seconds, report, steps) for stage, seconds in report.get("seconds", {}).items()]


def looks(report: Report) -> list[Shown]:
    """The measurements inside of stages, which training makes on its way; not those at the ends."""
    entries = [row for row in report.get("fidelity") or () if row["stage"] in report["seconds"]]
    last = {row["stage"]: place for place, row in enumerate(entries)}
    shown = measurements({"fidelity": entries})
    return [look for place, look in enumerate(shown) if place != last[look.stage]]


def other_sentences(report: Report) -> list[str]:
    """What the guard did beside undoing stages and leaving them out, which the stages say."""
    reasons = {stage.reason for stage in stages(report, ())}
    return [s for s in report.get("guard") or () if s not in reasons and s.partition(" left out: ")[2] not in reasons]


def training_sentences(report: Report) -> list[str]:
    """How long trainings in rounds went on, and why they ended."""
    return [
        f"{row['steps']:,} steps in {row['rounds']} round{'' if row['rounds'] == 1 else 's'}; "
        f"the end: {row['ended'] or 'all steps were made'}."
        for row in report["diagnostics"].get("training", ())
    ]


def batch_norm_sentence(report: Report) -> str:
    """What decided whether batch norms are frozen in training; empty where there are none, or nothing decided it."""
    found = (report.get("watch") or {}).get("batch_norm")
    if not found:
        return ""
    moved = f"normalised by each batch, the dense model's outputs move by {100 * found['error']:.3g} % of their spread"
    kept = "stay frozen" if found["mode"] == "frozen" else "use the statistics of each batch"
    return f"Batch norms {kept} in training, except where a stage freezes them itself: {moved}."


def _stage_of(stage: str, seconds: float, report: Report, steps: Sequence[Report]) -> Stage:
    name, guard = _name(stage, report), report.get("guard") or ()
    losses = [step["loss"] for step in steps if step["stage"] == stage and "loss" in step]
    ends = [row for row in report.get("fidelity") or () if row["stage"] == stage]
    after = measurements({"fidelity": ends})[-1] if ends else None
    left_out = next((s.removeprefix(f"{name} left out: ") for s in guard if s.startswith(f"{name} left out: ")), "")
    culprit = f"training in {report['allocate']}" if stage == "select" else name
    undone = next((s for s in guard if s.startswith(f"{culprit} made it worse: ")), "")
    outcome = "" if after is None else "undone" if after.undone else "kept"
    tenth = math.ceil(len(losses) / 10)
    return Stage(
        name=_title(stage, report),
        after=None if left_out else after,
        outcome="left out" if left_out else outcome,
        reason=left_out or (undone if outcome == "undone" else ""),
        trained=len(losses),
        losses=(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth) if losses else None,
        batch_norm=_batch_norm(stage, report) if losses else "",
        seconds=seconds,
    )


def _title(stage: str, report: Report) -> str:
    if stage == "allocate":
        return f"densities by {report['allocate']}"
    return f"weights by {report['score']}" if stage == "select" else _name(stage, report)


def _name(stage: str, report: Report) -> str:
    """The name of a stage in the sentences of the guard.

    >>> _name("repair-2-admm", {}), _name("select", {})
    ('admm', 'the selected weights')
    """
    if stage == "allocate":
        return str(report["allocate"])
    if stage == "select":
        return "the selected weights"
    return stage.split("-", 2)[2] if stage.startswith("repair-") else stage


def _batch_norm(stage: str, report: Report) -> str:
    """What batch norms normalised by in the training of a stage; empty where that is not on record."""
    watch, settings = report.get("watch") or {}, report.get("settings") or {}
    if "batch_norm" not in watch and settings.get("batch_norm") not in ("batch", "frozen"):
        return ""
    mode = watch["batch_norm"]["mode"] if "batch_norm" in watch else settings["batch_norm"]
    repairs = (settings.get("hyperparameters") or {}).get("repair") or ()
    if not stage.startswith("repair-"):
        return str(mode)
    place = int(stage.split("-")[1]) - 1
    if place >= len(repairs):  # a run that was cut to fit into minutes records no hyperparameters
        return ""
    return "frozen" if repairs[place].get("frozen") else str(mode)
