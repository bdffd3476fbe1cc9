"""The layers of a result as rows, for Python: `result.layers`, and the densities as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup

from allot.errors import UsageError
from allot.run.named import optional


@dataclass(frozen=True)
class LayerRow:
    """What one layer keeps.

    Attributes:
        name: of the parameter.
        kept, total: weights.
        macs, macs_kept: multiply-accumulates in one pass of the example, dense and where zeros are skipped; None where
            no example input was there.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    density: float
    macs: int | None
    macs_kept: int | None


def macs_kept(row: Mapping[str, Any]) -> int | None:
    """The MACs of a layer, a row of report.json, where zeros are skipped; None where they were not counted, and for
    groups of channels.
    """
    macs = row.get("macs")
    return None if macs is None else round(macs * row["kept"] / row["total"])


class Layers(tuple[LayerRow, ...]):
    """The rows of all layers in scope, in the model's order; a table in a notebook.

    >>> row = {"name": "fc.weight", "shape": [2, 4], "kept": 2, "total": 8, "density": 0.25, "macs": 8}
    >>> layers = Layers.of([row])
    >>> layers[0].density, layers[0].macs_kept
    (0.25, 2)
    >>> layers
    layer      shape  kept  of  density
    fc.weight  2 × 4     2   8    0.250
    """

    __slots__ = ()

    def __repr__(self) -> str:
        rows = [
            (r.name, " × ".join(map(str, r.shape)), f"{r.kept:,}", f"{r.total:,}", f"{r.density:.3f}") for r in self
        ]
        table = [("layer", "shape", "kept", "of", "density"), *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        aligned = (
            (f"{a:<{widths[0]}}", f"{b:<{widths[1]}}", *map(str.rjust, rest, widths[2:])) for a, b, *rest in table
        )
        return "\n".join("  ".join(line) for line in aligned)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Layers:
        """From rows as `layers` of report.json."""
        return cls(
            LayerRow(
                row["name"], tuple(row["shape"]), row["kept"], row["total"], row["density"], row["macs"],
                macs_kept(row),
            )
            for row in rows
        )  # fmt: skip

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row a layer, indexed by name.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")  # of no extra: who wants a frame has it
        except ImportError as error:
            raise UsageError(f"pandas is not installed ({error}): pip install pandas.") from error
        return pandas.DataFrame([asdict(row) for row in self]).set_index("name")

    def plot(self, axes: Any = None) -> Any:
        """The density of every layer as a bar, the first layer at the top; returns the matplotlib axes.

        Args:
            axes: to draw into; None: those of a new figure.
        Raises:
            UsageError: matplotlib is not installed.
        """
        if axes is None:
            pyplot = optional("matplotlib.pyplot", "matplotlib", "plot")
            _, axes = pyplot.subplots(figsize=(7, 1 + 0.22 * len(self)), layout="constrained")
        places = range(len(self))
        axes.barh(places, [row.density for row in self], height=0.7)
        axes.set_yticks(places, [row.name for row in self], fontsize="small")
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("density (share of weights kept)")
        overall = sum(row.kept for row in self) / sum(row.total for row in self)
        axes.axvline(overall, color="0.5", linewidth=1, linestyle="--")
        axes.set_title(f"{100 * overall:.1f} % of the weights kept (dashed)", fontsize="medium")
        return axes

    def _repr_html_(self) -> str:
        head = Markup("").join(Markup("<th>{}</th>").format(n) for n in ("layer", "shape", "kept", "of", "density"))
        cell = Markup("<td style='text-align:left'>{}</td><td>{}</td><td>{:,}</td><td>{:,}</td><td>{:.3f}</td>")
        rows = Markup("").join(
            Markup("<tr>{}</tr>").format(
                cell.format(row.name, " × ".join(map(str, row.shape)), row.kept, row.total, row.density)
            )
            for row in self
        )
        return str(Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, rows))
