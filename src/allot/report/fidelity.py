"""How close a run came to the dense model, in words: from `watch`, `fidelity` and `guard` of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allot.run.outputs import KINDS, NAMES
from allot.run.untrained import sentence

Report = Mapping[str, Any]

MEANINGS = {
    "kl": "KL divergence of the outputs as distributions, in nats; 0: the same",
    "error": "squared error over that of a constant answer; 0: the same, 1: no better than a constant",
}


@dataclass(frozen=True)
class Shown:
    """One measurement of fidelity, as text.

    Attributes:
        name: of the measure.
        meaning: of the measure.
        agreement: empty where outputs are no classes.
    """

    stage: str
    step: int
    name: str
    meaning: str
    value: float | None
    agreement: str
    undone: bool

    @property
    def distance(self) -> str:
        """The measure and its value."""
        return f"{self.name} {'not finite' if self.value is None else f'{self.value:.3g}'}"


def compared_as(report: Report) -> str:
    """What the model's outputs were taken for, in words; empty where they were not compared."""
    return KINDS.get((report.get("watch") or {}).get("kind", ""), "")


def measurements(report: Report) -> list[Shown]:
    """All measurements of a run, in order."""
    return [_shown(entry) for entry in report.get("fidelity") or ()]


def fidelity(report: Report) -> Shown | None:
    """The measurement of the net that came out; None where nothing was measured.

    >>> report = {"fidelity": [{"stage": "select", "step": 1, "kl": 0.1234, "agreement": 0.9}]}
    >>> fidelity(report).distance, fidelity(report).agreement
    ('KL 0.123', 'agrees on 90.0 %')
    """
    entries = report.get("fidelity")
    return _shown(entries[-1]) if entries else None


def warnings(report: Report) -> list[str]:
    """That the model looks untrained, what the guard did, and why it may be unsure, in sentences."""
    watch = report.get("watch") or {}
    found = [f"warning: {sentence(signs)}"] if (signs := report.get("untrained")) else []
    found += [f"guard: {line}" for line in report.get("guard") or ()]
    if watch.get("reason"):
        found.append(f"not compared with the dense model: {watch['reason']}")
    elif watch.get("unsure"):
        found.append(f"guard: unsure, {watch['samples']} of the inputs to compare on; give 32 inputs or more")
    return found


def _shown(entry: Mapping[str, Any]) -> Shown:
    kind = "kl" if "kl" in entry else "error"
    agreement = "" if entry.get("agreement") is None else f"agrees on {100 * entry['agreement']:.1f} %"
    return Shown(
        entry["stage"],
        entry["step"],
        NAMES[kind],
        MEANINGS[kind],
        entry.get(kind),
        agreement,
        entry.get("undone", False),
    )
