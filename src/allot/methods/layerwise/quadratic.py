"""The error of one layer as a quadratic function of its weight, and the two solvers that admm is made of.

The letters are those of `allot.methods.admm`, whose docstring has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from allot.methods.layerwise.grams import Gram
from allot.methods.layerwise.sites import Part
from allot.network.layers import Layer
from allot.run.patterns import Pattern

Select = Callable[[Tensor, int], Tensor]  # (scores [rows, K], kept) -> mask [rows, K]


def selects(pattern: Pattern, layer: Layer) -> Select:
    """The selection of a layer's weights by the pattern; `kept` is rounded up to a count that the pattern has."""
    step = pattern.feasible(layer)[0]

    def select(score: Tensor, kept: int) -> Tensor:
        kept = min(-(-kept // step) * step, layer.total)
        return layer.matrix(pattern.mask(layer, layer.unmatrix(score), kept))

    return select


def alternated(quadratic: Quadratic, select: Select, kept: int, T: int) -> tuple[Tensor, Tensor]:
    """(X + U, M) after T iterations; both `[rows, K]`, columns times n."""
    X = quadratic.W_d * quadratic.n
    U, M = torch.zeros_like(X), torch.ones_like(X, dtype=torch.bool)
    total, moving = X.numel(), max(1, round(0.75 * T))
    for t in range(T):
        if t < moving:
            k_t = kept + (total - kept) * (1 - (t + 1) / moving) ** 3
            M = select((X + U).abs(), round(k_t))
        Z = (X + U) * M
        U += X - Z
        X = quadratic.times_R(quadratic.Y + quadratic.rho * (Z - U))
    return X + U, M


def refined(quadratic: Quadratic, X: Tensor, M: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for min <X A, X> - 2 <Y, X> on the mask M, every row by itself."""
    X = X * M
    r = (quadratic.Y - quadratic.times_A(X)) * M
    d, size = r, r.square().sum(1, keepdim=True)
    first = size
    live = first > 0  # rows that are not solved yet
    for _ in range(steps):
        q = quadratic.times_A(d) * M
        curvature = (d * q).sum(1, keepdim=True)
        live = live & (size > 1e-12 * first) & (curvature > torch.finfo(X.dtype).eps * d.square().sum(1, keepdim=True))
        if not bool(live.any()):
            break
        step = (size / curvature).where(live, 0)
        X = X + step * d
        r = r - step * q
        size, before = r.square().sum(1, keepdim=True), size
        d = r + (size / before).where(live, 0) * d
    return X


class Quadratic:
    """The layer error as a function of X = W n; the parts of a weight that read other inputs have a G each.

    Attributes:
        n: norm of each column, `[rows, K]`.
        Y: `[rows, K]`.
        rho: `[rows, 1]`.
    """

    def __init__(self, W_d: Float[Tensor, "rows K"], parts: Mapping[Part, Gram], damping: float | None) -> None:
        self.W_d = W_d
        self.n = torch.ones_like(W_d)  # rows that no product computes stay as they are: A = I
        self.Y = W_d.clone()
        self.rho = torch.ones_like(W_d[:, :1])
        self._grams = [(slice(start, stop), gram) for (_, start, stop), gram in parts.items()]
        self._A: list[tuple[slice, Tensor]] = []
        self._R: list[tuple[slice, Tensor]] = []
        for rows, gram in self._grams:
            S = gram.gram  # G so far; changed in place, as matrices of K x K may be most of the memory
            n = column_norms(S)
            S /= n[:, :, None] * n[:, None, :]
            delta = disagreement(gram, S, n) if damping is None else S.new_full((len(S),), damping)
            A = plus_diagonal(S, delta[:, None])
            self._A.append((rows, A))
            rho = 1 + delta  # the diagonal of A: with less, weights that are removed come back in turn
            self._R.append((rows, inverse(plus_diagonal(A.clone(), rho[:, None]))))
            dense = W_d[rows].unflatten(0, (len(A), -1))  # [groups, rows, K]
            Y = dense @ gram.cross / n[:, None] + delta[:, None, None] * dense * n[:, None]
            self.n[rows] = n[:, None].expand_as(dense).flatten(0, 1)
            self.Y[rows] = Y.flatten(0, 1)
            self.rho[rows] = rho[:, None].expand(-1, dense.shape[1]).reshape(-1, 1)

    def times_A(self, X: Float[Tensor, "rows K"]) -> Float[Tensor, "rows K"]:  # noqa: N802
        return _product(X, self._A)

    def times_R(self, X: Float[Tensor, "rows K"]) -> Float[Tensor, "rows K"]:  # noqa: N802
        return _product(X, self._R)

    def A_of_rows(self) -> Float[Tensor, "rows K K"]:  # noqa: N802
        """The A of each row; for layers that are small."""
        A = torch.eye(self.Y.shape[1], dtype=self.Y.dtype, device=self.Y.device).repeat(len(self.Y), 1, 1)
        for rows, matrix in self._A:
            A[rows] = matrix.repeat_interleave((rows.stop - rows.start) // len(matrix), 0)
        return A

    def error(self, W: Tensor, energy: float) -> float:
        """|W X_s - W_d X_d|^2 over |W_d X_d|^2."""
        total = energy
        for rows, gram in self._grams:
            G = gram.gram
            grouped, dense = (w[rows].unflatten(0, (len(G), -1)) for w in (W, self.W_d))
            total += float(((grouped @ G - 2 * (dense @ gram.cross)) * grouped).sum(dtype=torch.float64))
        return max(total, 0.0) / energy if energy else 0.0


def _product(X: Tensor, matrices: list[tuple[slice, Tensor]]) -> Tensor:
    """The rows of X, each times the matrix of its part and group."""
    product = X.clone()
    for rows, matrix in matrices:
        product[rows] = (X[rows].unflatten(0, (len(matrix), -1)) @ matrix).flatten(0, 1)
    return product


def column_norms(G: Float[Tensor, "groups K K"]) -> Float[Tensor, "groups K"]:
    """n: root of the diagonal of G, with a floor for a column that these samples do not use."""
    energy = G.diagonal(dim1=1, dim2=2).clamp_min(0)  # [groups, K]
    floor = 1e-3 * energy.mean()
    return (energy + floor if floor > 0 else torch.ones_like(energy)).sqrt()


def inverse(matrices: Float[Tensor, "groups K K"]) -> Float[Tensor, "groups K K"]:
    """The inverses of symmetric matrices; where rounding made one indefinite, with more on its diagonal."""
    more = 1e-3
    factors, failures = torch.linalg.cholesky_ex(matrices)
    while bool(failures.any()) and more < 1e6:
        factors, failures = torch.linalg.cholesky_ex(plus_diagonal(matrices, more))
        more *= 10
    return torch.cholesky_inverse(factors)


def plus_diagonal(matrices: Float[Tensor, "groups K K"], value: Tensor | float) -> Float[Tensor, "groups K K"]:
    """The matrices, with the value added to their diagonals in place."""
    matrices.diagonal(dim1=1, dim2=2).add_(value)
    return matrices


def disagreement(gram: Gram, S: Float[Tensor, "groups K K"], n: Float[Tensor, "groups K"]) -> Float[Tensor, " groups"]:
    """delta: how much of the distance of G from the identity, columns scaled by n, is noise of the sample.

        s = |D|^2 / |S - I|^2,   delta = s / (1 - s)        S = G / (n n^T),  D what both halves differ by

    After Ledoit and Wolf (2004): s is the weight of the identity in the best mix of it with S.
    """
    one, other = gram.positions
    # of halves of one size, half their difference
    if one and other:
        D = gram.halves[0] / one
        D -= gram.halves[1] / other
        D *= (one * other) ** 0.5
    else:
        D = gram.gram
    D /= n[:, :, None] * n[:, None, :]
    noise = D.square_().sum((1, 2))
    del D
    distance = plus_diagonal(S.clone(), -1.0).square_().sum((1, 2))
    share = (noise / distance.clamp_min(torch.finfo(S.dtype).tiny)).clamp(max=0.9)
    return (share / (1 - share)).clamp_min(1e-3)
