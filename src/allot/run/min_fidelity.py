"""The guarantee on fidelity: how much of the dense model's answers the sparse one has to give, on the watch set.

Needs no labels. Where outputs are classes, the share of answers with the same top class; else the share of the outputs'
variance that is kept, 1 minus the error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allot.errors import UsageError


@dataclass(frozen=True)
class MinFidelity:
    """The least fidelity.

    Attributes:
        asked: as the user wrote it.
        share: from 0 to 1.

    >>> MinFidelity.read("95%").share, MinFidelity.read(0.95).share
    (0.95, 0.95)
    """

    asked: str
    share: float

    @classmethod
    def read(cls, text: float | str) -> MinFidelity:
        """The fidelity that a user wrote.

        Raises:
            UsageError: another form, or a share above 1.
        """
        asked = str(text).strip()
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%|)", asked)
        share = float(match[1]) / (100 if match[2] else 1) if match else 2.0
        if isinstance(text, bool) or share > 1:
            raise UsageError(f"min-fidelity={text}: a share from 0 to 1, or like 95%, is accepted.")
        return cls(asked, share)

    def verdict(self, watch: Mapping[str, Any], last: Mapping[str, Any] | None) -> dict[str, Any]:
        """`{kind, asked, limit, found, met, text}`: whether the net that came out is close enough to the dense one.

        Args:
            watch, last: of report.json: the watch set, and the last entry of `fidelity`.
        Raises:
            UsageError: nothing was compared.
        """
        if last is None:
            reason = watch.get("reason", "there is no calibration data")
            raise UsageError(f"min-fidelity={self.asked}: nothing compares this run with the dense model: {reason}.")
        of_classes = last.get("agreement") is not None
        kept = last["agreement"] if of_classes else 1 - (1.0 if last.get("error") is None else last["error"])
        met = kept >= self.share
        what = "the top class is that of the dense model for" if of_classes else "outputs keep"
        text = f"{what} {100 * kept:.1f} % {'of' if of_classes else 'of the variance on'} {watch['samples']:,} inputs"
        text += f"; {self.asked} is asked" + ("" if met else f": missed by {100 * (self.share - kept):.1f} points")
        return {
            "kind": "min-fidelity", "asked": self.asked, "limit": self.share, "found": kept, "met": met, "text": text,
        }  # fmt: skip
