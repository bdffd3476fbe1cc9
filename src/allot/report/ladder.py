"""The repairs of a run as rungs: how near the dense model each one came, and whether its net was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allot.report.fidelity import Shown, measurements

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Rung:
    """One repair.

    Attributes:
        name: of the method.
        after: the measurement of the net that it made; None where nothing compares it, or it was left out.
        outcome: "kept", "undone" or "left out"; "start" for the masks before any repair.
    """

    name: str
    after: Shown | None
    outcome: str

    @property
    def text(self) -> str:
        """The rung in a line."""
        parts = (self.after.distance, self.after.agreement) if self.after and self.outcome != "left out" else ()
        return f"{self.name}: {', '.join(filter(None, (*parts, self.outcome)))}"


def rungs(report: Report) -> list[Rung]:
    """The rungs of a run, in order; empty where nothing compares them with the dense model.

    Args:
        report: the content of report.json; `fidelity` and `guard` are what is read.

    >>> entries = [{"stage": "select", "step": 1, "kl": 0.5}, {"stage": "repair-1-admm", "step": 6, "kl": 0.1}]
    >>> [rung.text for rung in rungs({"fidelity": entries, "guard": []})]
    ['selected weights: KL 0.5, start', 'admm: KL 0.1, kept']
    """
    last: dict[str, Shown] = {}
    for shown in measurements(report):
        if shown.stage == "select" or shown.stage.startswith("repair-"):
            last[shown.stage] = shown
    return [rung_of(stage, shown, report.get("guard") or ()) for stage, shown in last.items()]


def rung_of(stage: str, shown: Shown, guard: Any) -> Rung:
    """The rung of a stage, from its last measurement and the sentences of the guard."""
    if stage == "select":
        return Rung("selected weights", shown, "start")
    name = stage.split("-", 2)[2]
    if any(sentence.startswith(f"{name} left out: ") for sentence in guard):
        return Rung(name, shown, "left out")
    return Rung(name, shown, "undone" if shown.undone else "kept")
