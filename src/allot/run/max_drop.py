"""The guarantee on the score: how much worse than the dense model the sparse one may be.

    2pt     points: hundredths of a score whose dense value is from 0 to 1, like top-1
    0.5     in the unit of the score, where its dense value is not from 0 to 1, like perplexity
    5%      of the dense score, whatever it is

A number without a unit could mean points or shares where the score is from 0 to 1, and is refused there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from allot.errors import UsageError

ROUNDING = 1e-9  # of the dense score: a drop of exactly what is allowed is allowed


@dataclass(frozen=True)
class MaxDrop:
    """The largest drop of the headline score; of a score for which lower is better, the largest rise.

    Attributes:
        asked: as the user wrote it.
        number, unit: the same in parts; the unit is "pt", "%" or empty.

    >>> MaxDrop.read("1pt").limit("top1", 0.95), MaxDrop.read("10%").limit("perplexity", 20.0, lower=True)
    (0.94, 22.0)
    """

    asked: str
    number: float
    unit: str

    @classmethod
    def read(cls, text: float | str) -> MaxDrop:
        """The drop that a user wrote.

        Raises:
            UsageError: another form, or a number below 0.
        """
        asked = str(text).strip()
        match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(pt|%|)", asked)
        if isinstance(text, bool) or match is None or not math.isfinite(float(match[1])):
            raise UsageError(f"max-drop={text}: {_ACCEPTED} is accepted.")
        return cls(asked, float(match[1]), match[2])

    def limit(self, metric: str, dense: float, *, lower: bool = False) -> float:
        """The worst score that is allowed.

        Args:
            metric: the name of the score, for errors.
            dense: the score of the dense model.
            lower: whether lower is better.
        Raises:
            UsageError: the unit does not fit the score, the dense score is not finite, or every score is allowed.
        """
        if not math.isfinite(dense):
            raise UsageError(f"max-drop={self.asked}: the dense model's {metric} is {dense}.")
        share = 0 <= dense <= 1
        if share and self.unit == "" and self.number:
            raise UsageError(
                f"max-drop={self.asked}: {metric} is from 0 to 1 (dense {dense:.4g}), so this may mean points or "
                f"shares: {self.number:g}pt (points, hundredths) or {self.number:g}% (of the dense score) is accepted."
            )
        if not share and self.unit == "pt":
            raise UsageError(
                f"max-drop={self.asked}: points are hundredths of a score from 0 to 1, and the dense {metric} is "
                f"{dense:.4g}: {self.number:g} (in its own unit) or {self.number:g}% (of the dense score) is accepted."
            )
        allowed = self.number * {"pt": 0.01, "%": 0.01 * abs(dense), "": 1.0}[self.unit]
        worst = dense + allowed if lower else dense - allowed
        if share and not lower and worst <= 0 < allowed:
            raise UsageError(f"max-drop={self.asked} allows any {metric}: dense it is {dense:.4g}.")
        return worst

    def verdict(self, metric: str, dense: float, sparse: float, *, lower: bool = False) -> dict[str, Any]:
        """`{kind, asked, limit, found, met, text}`: whether the sparse score is within the limit, and by how much.

        Raises:
            UsageError: as `limit`.
        """
        limit = self.limit(metric, dense, lower=lower)
        missing = sparse - limit if lower else limit - sparse
        met = missing <= ROUNDING * max(1.0, abs(dense))  # never with nan
        change = sparse - dense
        verb = "rose" if change > 0 else "fell"
        text = f"{metric} {verb} by {self._amount(abs(change), dense)}, from {dense:.4g} to {sparse:.4g}"
        if not change:
            text = f"{metric} stayed at {dense:.4g}"
        text += f"; {self.asked} is allowed" + ("" if met else f": missed by {self._amount(missing, dense)}")
        return {"kind": "max-drop", "asked": self.asked, "limit": limit, "found": sparse, "met": met, "text": text}

    def _amount(self, difference: float, dense: float) -> str:
        if 0 <= dense <= 1:
            return f"{100 * difference:.2f} points"
        return f"{difference:.4g}"


_ACCEPTED = (
    "1pt (points: hundredths of a score from 0 to 1), 5% (of the dense score), or, where the score is not from 0 to 1, "
    "a number in its unit"
)
