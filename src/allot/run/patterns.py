"""The structure of a mask inside one tensor: values that know the feasible counts and choose the mask."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from allot.errors import InvalidPattern, PatternError, UsageError
from allot.network.layers import Layer
from allot.run.ranking import highest_each, highest_of_rows, rows_at_once


class Pattern(Protocol):
    """A structure: which counts are feasible in a layer, and the best mask for one of them."""

    def feasible(self, layer: Layer) -> tuple[int, int, int]:
        """(step, fewest, most): a layer keeps a multiple of `step` weights, from `fewest` to `most`."""

    def mask(self, layer: Layer, score: Tensor, kept: int) -> Tensor:
        """Mask of exactly `kept` weights with the highest score; `score` has the weight's shape."""

    def order(self, layer: Layer, score: Tensor) -> Tensor:
        """Flat indices of all weights; the first `kept` are those of `mask`, for every feasible `kept`.

        One sort serves many masks of one score.
        """


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be removed.

    >>> layer = Layer("fc.weight", (2, 2), "linear")
    >>> Unstructured().mask(layer, torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 2).tolist()  # ties: lower index
    [[True, False], [True, False]]
    """

    def feasible(self, layer: Layer) -> tuple[int, int, int]:
        """Every count within the layer's own bounds."""
        return 1, layer.min_kept, layer.max_kept

    def mask(self, layer: Layer, score: Tensor, kept: int) -> Tensor:
        """The `kept` highest scores, after each row's `layer.min_per_row` best; ties as in `select`.

        Raises:
            PatternError: `kept` is more than the layer has or less than its rows need, or `score` holds nan.
        """
        _check_rows(layer, kept)
        try:
            mask = select(score, kept)  # checks the score; final where rows have no minimum
            if layer.min_per_row:
                mask = _best_per_group(layer.matrix(score), layer.min_per_row)
                mask = layer.unmatrix(mask).flatten()
                free = (~mask).nonzero().flatten()
                mask[free] = select(score.flatten()[free], kept - layer.min_per_row * layer.rows)
        except PatternError as error:
            raise PatternError(f"{layer.name}: {error}") from error
        return mask.view(score.shape)

    def order(self, layer: Layer, score: Tensor) -> Tensor:
        """By score, each row's `layer.min_per_row` best first."""
        order = score.flatten().argsort(descending=True, stable=True)
        if not layer.min_per_row:
            return order
        first = layer.unmatrix(_best_per_group(layer.matrix(score), layer.min_per_row)).flatten()[order]
        return torch.cat([order[first], order[~first]])

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Rows:
    """Any weight within each output row, k or k + 1 of them a row, so that rows add up to the layer's count.

    The rows that keep k + 1 are those with the highest (k+1)-th best scores; of equal ones the lower rows. Wanda (Sun
    et al., ICLR 2024) compares weights within rows; for Linear layers this is the default of the recipe `llm`.

    >>> layer = Layer("fc.weight", (2, 3), "linear")
    >>> Rows().mask(layer, torch.tensor([[3.0, 1.0, 5.0], [0.2, 0.4, 0.3]]), 3).int().tolist()
    [[1, 0, 1], [0, 1, 0]]
    """

    def feasible(self, layer: Layer) -> tuple[int, int, int]:
        """Every count within the layer's own bounds."""
        return 1, layer.min_kept, layer.max_kept

    def mask(self, layer: Layer, score: Tensor, kept: int) -> Tensor:
        """The k or k + 1 highest scores of each row; equal scores go to the lower input column.

        Raises:
            PatternError: `kept` is more than the layer has or less than its rows need, or `score` holds nan.
        """
        _check_rows(layer, kept)
        if not 0 <= kept <= layer.total:
            raise PatternError(f"{layer.name}: cannot keep {kept:,} of {layer.total:,} weights.")
        if bool(score.isnan().any()):
            raise PatternError(f"{layer.name}: {_NAN}")
        matrix = layer.matrix(score)
        k, more = divmod(kept, layer.rows)
        counts = torch.full((layer.rows,), k, device=score.device)
        if more:
            counts += select(highest_of_rows(matrix, k + 1), more)
        parts = zip(*(value.split(rows_at_once(matrix)) for value in (matrix, counts)), strict=True)
        return layer.unmatrix(torch.cat([_best_of_rows(part, count, k) for part, count in parts]))

    def order(self, layer: Layer, score: Tensor) -> Tensor:
        """The best of every row, then the second best of every row, and so on; each time rows by that score."""
        matrix = layer.matrix(score)
        ranked, columns = matrix.sort(dim=1, descending=True, stable=True)
        rows = ranked.argsort(dim=0, descending=True, stable=True).t()  # [cols, rows], of each rank, best first
        place = rows * matrix.shape[1] + columns.t().gather(1, rows)
        index = torch.arange(layer.total, device=score.device).view(score.shape)
        return layer.matrix(index).flatten()[place.flatten()]

    def __str__(self) -> str:
        return "rows"


@dataclass(frozen=True)
class NM:
    """n of every m weights that follow each other along the input channels.

    Args:
        n: 0 < n < m; None: the budget decides n, from 1 to m, for each layer.
        m: 2 or more. Sparse tensor cores use 2:4.
    Raises:
        InvalidPattern: n and m are not such numbers.

    >>> layer = Layer("fc.weight", (1, 4), "linear")
    >>> NM(2, 4).mask(layer, torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2).tolist()
    [[False, True, True, False]]
    """

    n: int | None
    m: int

    def __post_init__(self) -> None:
        whole = type(self.n) in (int, type(None)) and type(self.m) is int
        if not (whole and 0 < (self.n or 1) < self.m) or self.n == 0:
            raise InvalidPattern(
                f"pattern {self.n}:{self.m}: whole numbers, n above 0 and below m, are accepted, like 2:4 (or n:4, "
                "where each layer may have an n of its own)."
            )

    def feasible(self, layer: Layer) -> tuple[int, int, int]:
        """The one count n/m of the layer, or whole n from 1 to m within its bounds.

        Raises:
            PatternError: the input channels do not divide by m, or the layer's own bounds exclude every n/m.
        """
        if layer.inputs % self.m:
            raise PatternError(
                f"{layer.name}: {layer.inputs} input channels do not divide by {self.m}, as {self} needs. "
                f"Exclude the layer (--exclude {layer.name})."
            )
        step = layer.total // self.m
        per_row = -(-layer.min_per_row * self.m // (layer.total // layer.rows))
        fewest = max(-(-layer.min_kept // step), per_row, self.n or 1)
        most = min(layer.max_kept // step, self.n or self.m)
        if fewest > most:
            kept = f"{step * self.n:,}" if self.n else f"multiples of {step:,}"
            raise PatternError(
                f"{layer.name}: {self} keeps {kept} of {layer.total:,} weights, outside the {layer.min_kept:,} "
                f"to {layer.max_kept:,} that its rules and floor allow."
            )
        return step, step * fewest, step * most

    def mask(self, layer: Layer, score: Tensor, kept: int) -> Tensor:
        """The best `kept * m / total` of every m weights; equal scores go to the lower input channel.

        Raises:
            PatternError: `kept` is not a whole number of weights per group, or `score` holds nan.
        """
        per_group, odd = divmod(kept * self.m, layer.total)
        if layer.inputs % self.m or odd or not 0 <= per_group <= self.m:
            raise PatternError(f"{layer.name}: {self} cannot keep {kept:,} of {layer.total:,} weights.")
        if bool(score.isnan().any()):
            raise PatternError(f"{layer.name}: {_NAN}")
        groups = layer.matrix(score).unflatten(1, (-1, self.m))  # [rows, cols/m, m]
        return layer.unmatrix(_best_per_group(groups, per_group).flatten(1))

    def order(self, layer: Layer, score: Tensor) -> Tensor:
        """The best of every group, then the second best of every group, and so on."""
        groups = layer.matrix(score).unflatten(1, (-1, self.m))  # [rows, cols/m, m]
        places = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return layer.unmatrix(places.flatten(1)).flatten().argsort(stable=True)

    def __str__(self) -> str:
        return f"{self.n or 'n'}:{self.m}"


@dataclass(frozen=True)
class Channels:
    """Whole channels, each removed from every tensor that holds it (`allot.network.channels`).

    Args:
        step: groups keep a multiple of `step` channels, or all of them; 1 or more. A group of at most `step` channels,
            such as attention heads, keeps any number.
    Raises:
        InvalidPattern: no such number.

    >>> str(Channels(8)), parse("channels:8") == Channels(8)
    ('channels:8', True)
    """

    step: int = 1

    def __post_init__(self) -> None:
        if type(self.step) is not int or self.step < 1:
            raise InvalidPattern(f"channels:{self.step}: a whole number, 1 or more, is accepted, like channels:8.")

    def feasible(self, layer: Layer) -> tuple[int, int, int]:
        """Any count: the weights of a layer follow from its channels."""
        return 1, 0, layer.total

    def mask(self, layer: Layer, score: Tensor, kept: int) -> Tensor:
        """Raises:
        PatternError: channels are selected by group, not by layer.
        """
        raise PatternError(f"{layer.name}: this selects single weights, which the pattern channels does not have.")

    def order(self, layer: Layer, score: Tensor) -> Tensor:
        """As `mask`."""
        return self.mask(layer, score, 0)

    def __str__(self) -> str:
        return "channels" if self.step == 1 else f"channels:{self.step}"


def select(score: Shaped[Tensor, "*shape"], kept: int) -> Bool[Tensor, "*shape"]:
    """Mask of exactly `kept` entries with the highest score; equal scores go to the lower flat index.

    Args:
        score: any shape; larger is more important.
        kept: how many entries survive, 0 <= kept <= score.numel().
    Returns:
        bool mask, shape of `score`, on its device.
    Raises:
        PatternError: `kept` out of range, or `score` holds nan.
    """
    (mask,) = _select_each(score, (kept,))
    return mask


def masks_of(pattern: Pattern, layer: Layer, score: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """What `pattern.mask` returns for each of several counts; where any weight may be removed, ranked together.

    Raises:
        PatternError: as `pattern.mask`.
    """
    if not isinstance(pattern, Unstructured) or layer.min_per_row:
        return [pattern.mask(layer, score, kept) for kept in counts]
    try:
        return _select_each(score, counts)
    except PatternError as error:
        raise PatternError(f"{layer.name}: {error}") from error


def _select_each(score: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """What `select` returns for each of the counts."""
    for kept in counts:
        if not 0 <= kept <= score.numel():
            raise PatternError(f"cannot keep {kept:,} of {score.numel():,} weights.")
    if score.numel() and bool(score.amax().isnan()):
        raise PatternError(_NAN)
    flat = score.flatten()
    cuts = highest_each(flat, sorted({kept for kept in counts if kept}))
    masks = {kept: _above(flat, cut, kept) for kept, cut in cuts.items()}
    masks[0] = torch.zeros_like(flat, dtype=torch.bool)
    return [masks[kept].view_as(score) for kept in counts]


def _above(flat: Tensor, cut: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` highest entries, `cut` being the lowest of them; of entries equal to it the first ones."""
    mask = flat >= cut
    if (excess := int(mask.count_nonzero()) - kept) > 0:
        mask[(flat == cut).nonzero().flatten()[-excess:]] = False
    return mask


def indices_of(mask: Tensor) -> Tensor:
    """Flat indices of the entries that are True, ascending; on the CPU numpy finds them several times faster."""
    if mask.device.type == "cpu":
        return torch.from_numpy(numpy.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().flatten()


_NAN = "the score holds nan: weights cannot be ranked."


def _check_rows(layer: Layer, kept: int) -> None:
    """Raises:
    PatternError: too few weights for the rows of the layer.
    """
    if kept < layer.min_per_row * layer.rows:
        raise PatternError(
            f"{layer.name}: {kept:,} weights cannot give {layer.min_per_row} to each of {layer.rows:,} rows."
        )


def _best_of_rows(
    matrix: Shaped[Tensor, "rows cols"], counts: Shaped[Tensor, " rows"], k: int
) -> Bool[Tensor, "rows cols"]:
    """Mask of the highest `counts` scores of each row, each k or k + 1; equal scores go to the lower column."""
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    for count in (k, k + 1):
        rows = (counts == count).nonzero().flatten()
        if not count or not len(rows):
            continue
        part = matrix if len(rows) == len(matrix) else matrix[rows]
        cut = highest_of_rows(part, count)[:, None]
        best = part >= cut
        if int(best.count_nonzero()) > count * len(rows):  # several scores equal the last one that is kept
            above, equal = part > cut, part == cut
            best = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
        mask[rows] = best
    return mask


def _best_per_group(score: Shaped[Tensor, "*groups m"], kept: int) -> Bool[Tensor, "*groups m"]:
    """Mask of the `kept` highest scores along the last dimension; equal scores go to the lower index."""
    if score.shape[-1] <= 8:  # a few comparisons cost less than sorting
        entries = score.movedim(-1, 0).contiguous()
        better = torch.zeros_like(entries, dtype=torch.int8)  # how many entries of its group are better
        for i, j in itertools.combinations(range(len(entries)), 2):
            first = entries[i] >= entries[j]
            better[i] += ~first
            better[j] += first
        return (better < kept).movedim(0, -1).contiguous()
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)


PATTERNS: dict[str, Callable[[re.Match[str]], Pattern]] = {  # text, as a regular expression -> the value
    r"unstructured": lambda match: Unstructured(),
    r"rows": lambda match: Rows(),
    r"(\d+|n):(\d+)": lambda match: NM(None if match[1] == "n" else int(match[1]), int(match[2])),
    r"channels(?::(\d+))?": lambda match: Channels(int(match[1] or 1)),
}


def parse(text: str) -> Pattern:
    """`unstructured`, `rows`, `N:M`, `n:M` where n may differ between layers, `channels`, or `channels:STEP`.

    Raises:
        UsageError: anything else.
    """
    for form, make in PATTERNS.items():
        if match := re.fullmatch(form, text):
            return make(match)
    raise UsageError(
        f"unknown pattern {text!r}: 'unstructured', rows, N:M like 2:4, n:4, channels, or channels:8 is accepted."
    )
