"""Limits as people write them: 0.9, 90%, 20k, 5M, 3MB, 5ms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from allot.errors import InvalidBudget, UsageError

KINDS = ("sparsity", "params", "macs", "bytes", "latency")
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_UNITS = _COUNTS | {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


@dataclass(frozen=True)
class Amount:
    """A limit as a number: its exact value, and whether it is a fraction of the dense model."""

    value: Fraction
    relative: bool

    @classmethod
    def read(cls, kind: str, limit: float | int | str) -> Amount:
        """The amount that a user wrote.

        Raises:
            InvalidBudget: no number, an unknown unit, or a value out of range.

        >>> Amount.read("bytes", "3kB")
        Amount(value=Fraction(3000, 1), relative=False)
        """
        text = str(limit).strip()
        match = re.fullmatch(r"([-+]?[0-9.eE+-]+?|nan|[-+]?inf)\s*(%|[a-zA-Z]*)", text)
        try:
            number = Decimal(match[1]) if match and not isinstance(limit, bool) else Decimal("nan")
        except InvalidOperation:
            number = Decimal("nan")
        suffix = match[2].lower() if match else ""
        if not number.is_finite():
            raise InvalidBudget(f"{kind}={limit!r} is not a number. {_ACCEPTED[kind]}")
        # beyond every float, or every time; 10**999999999 would take all memory
        if not -400 <= number.adjusted() <= 290 or (kind == "latency" and abs(number.adjusted()) > 20):
            raise InvalidBudget(f"{kind}={limit} is out of range. {_ACCEPTED[kind]}")
        value = Fraction(number) / (100 if suffix == "%" else 1)
        relative = suffix == "%" or kind == "sparsity"
        if relative and (suffix not in ("", "%") or not 0 < value < 1):
            raise InvalidBudget(f"{kind}={limit} is out of range. {_ACCEPTED[kind]}")
        if not relative:
            units = _NANOSECONDS if kind == "latency" else _UNITS
            if suffix not in units or (suffix.endswith("b") and kind != "bytes"):
                raise InvalidBudget(f"{kind}={limit}: unknown unit {match[2] if match else ''!r}. {_ACCEPTED[kind]}")
            value *= units[suffix]
            if value < 1 or (value.denominator != 1 and suffix == ""):
                raise InvalidBudget(f"{kind}={limit} is not a whole number of {unit(kind)}. {_ACCEPTED[kind]}")
        return cls(value, relative)


def meaning(asked: Mapping[str, float | int | str]) -> frozenset[tuple[str, Amount]]:
    """The limits by kind and value: two texts for the same limits are equal.

    >>> meaning({"sparsity": "90%"}) == meaning({"sparsity": 0.90})
    True
    """
    return frozenset((kind, Amount.read(kind, limit)) for kind, limit in asked.items())


_ACCEPTED = {
    "sparsity": "A fraction removed above 0 and below 1, like 0.9 or 90%, is accepted.",
    "params": "A whole number, 20k, or a share above 0% and below 100% is accepted.",
    "macs": "A whole number, 5M, or a share above 0% and below 100% is accepted.",
    "bytes": "A whole number, 300kB, 3MB, or a share above 0% and below 100% is accepted.",
    "latency": "A time, 5ms or 300us, or a share above 0% and below 100% is accepted.",
}


def memory(name: str, size: int | str) -> int:
    """A number of bytes, from 64000000, 64MB, 6GB or 6GiB.

    Args:
        name: the option, for the error.
    Raises:
        UsageError: not a number of bytes, or less than one byte.
    """
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**63:
        return size
    try:
        amount = Amount.read("bytes", str(size))
    except InvalidBudget:
        amount = Amount(Fraction(0), relative=True)
    if amount.relative or amount.value < 1:
        raise UsageError(f"{name}={size}: a number of bytes, like 800MB or 6GB, is accepted.")
    return int(amount.value)


def unit(kind: str) -> str:
    """What a limit of this kind counts."""
    return {"sparsity": "weights", "params": "weights", "macs": "MACs", "bytes": "bytes", "latency": "ns"}[kind]


def amount_text(kind: str, cost: int) -> str:
    """A cost, written as a limit that allows it."""
    return f"{-(-cost // 1000)}us" if kind == "latency" else str(cost)


def sparsity_keeping(kept: int, total: int) -> str:
    """The shortest sparsity that keeps exactly `kept` of `total` weights.

    >>> sparsity_keeping(667, 1000)
    '0.333'
    """
    # 0 and 1 are not sparsities; numbers that round to all or to no weights are
    sparsity = min(max(1 - Fraction(kept, total), Fraction(1, 4 * total)), 1 - Fraction(1, 4 * total))
    decimal = Decimal(sparsity.numerator) / Decimal(sparsity.denominator)
    texts = (f"{decimal:.{digits}f}" for digits in range(1, 29))
    return next(text for text in texts if 0 < Fraction(text) < 1 and round((1 - Fraction(text)) * total) == kept)
