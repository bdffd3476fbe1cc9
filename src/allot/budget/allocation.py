"""The density of each layer: an immutable value that is saved as JSON, edited by hand and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from allot.errors import UsageError


class Allocation(Mapping[str, float]):
    """Immutable map from layer name to density, with each layer's size.

    Args:
        density: layer name -> fraction kept, in [0, 1].
        total: layer name -> number of weights.
    Raises:
        UsageError: a density outside [0, 1] or nan, or the two maps name different layers.

    >>> allocation = Allocation({"conv": 0.5, "fc": 0.25}, {"conv": 10, "fc": 8})
    >>> allocation["fc"], allocation.kept
    (0.25, {'conv': 5, 'fc': 2})
    """

    def __init__(self, density: Mapping[str, float], total: Mapping[str, int]) -> None:
        for what, given in (("density", density), ("total", total)):
            if not isinstance(given, Mapping):
                raise UsageError(f"Allocation: {what}={given!r}: a dict by layer name is accepted.")
        if density.keys() != total.keys():
            raise UsageError(f"density and total name different layers: {sorted(density.keys() ^ total.keys())}")
        for name, value in density.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
                raise UsageError(f"density of {name} is {value!r}: a number from 0 to 1 is accepted.")
        for name, count in total.items():
            if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
                raise UsageError(f"total of {name} is {count!r}: a whole number of weights is accepted.")
        self._density = {name: float(value) for name, value in density.items()}
        self.total = dict(total)

    @classmethod
    def of(cls, kept: Mapping[str, int], total: Mapping[str, int]) -> Allocation:
        """The allocation that keeps `kept` weights of each layer."""
        return cls({name: kept[name] / total[name] for name in kept}, total)

    def __getitem__(self, name: str) -> float:
        return self._density[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._density)

    def __len__(self) -> int:
        return len(self._density)

    def __repr__(self) -> str:
        kept, total = sum(self.kept.values()), sum(self.total.values())
        return f"Allocation({len(self)} layers, {kept:,} of {total:,} kept)"

    @property
    def kept(self) -> dict[str, int]:
        """Layer name -> nearest whole number of weights."""
        return {name: round(density * self.total[name]) for name, density in self.items()}

    def to_json(self) -> dict[str, Any]:
        """`{"layers": {name: {"density", "kept", "total"}}}`; `load` reads `density` alone."""
        kept = self.kept
        layers = {name: {"density": self[name], "kept": kept[name], "total": self.total[name]} for name in self}
        return {"layers": layers}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> dict[str, float]:
        """The densities in a file that `save` wrote, edited by hand or not; a file `{name: density}` is accepted too.

        Raises:
            UsageError: a file without an allocation, or a density that is not a number from 0 to 1.
        """
        try:
            data = json.loads(Path(path).read_text())
        except TypeError as error:
            raise UsageError(f"Allocation.load: path={path!r}: a path is accepted.") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read an allocation from {path}: {error}") from error
        layers = data.get("layers", data) if isinstance(data, dict) else None
        if not isinstance(layers, dict) or not layers:
            raise UsageError(f'{path} holds no allocation: {{"layers": {{NAME: {{"density": D}}}}}} is accepted.')
        if incomplete := [name for name, row in layers.items() if isinstance(row, dict) and "density" not in row]:
            raise UsageError(f'{path}: {incomplete[0]} has no "density".')
        wished = {name: row["density"] if isinstance(row, dict) else row for name, row in layers.items()}
        try:
            return dict(Allocation(wished, dict.fromkeys(wished, 1)))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
