"""Prepares second moments for the solvers: damping, the order of columns, the triangular factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gs_algos.core.input_statistics import InputStatistics
from gs_kernels.cpu.matmul import matmul

ORDERS = ("act", "group", "none")
LARGEST_DAMPING = 1.0  # that is tried if the factor fails
WIDE = 512  # columns of a product with the triangle


@dataclass(frozen=True, eq=False)
class Hessian:
    """Holds the damped second moments of a layer's input: the curvature of its output error.

    With columns in `order`, `H + damping = R diag(pivots) R^T`, where R is upper triangular with ones on its diagonal.
    So the error of a row is `sum_j pivots_j (e R)_j ** 2`, and column j of `e R` holds no e behind j: columns can be
    rounded one after the other.

    Args:
        damped: `[groups, K, K]` fp32, in the order of the weight's columns.
        damping: `[groups]`, that is on its diagonal.
        order: `[groups, K]`, in which columns are rounded.
        factor: R `[groups, K, K]` fp32; None if it failed.
        pivots: `[groups, K]` fp32.
        notes: what had to be done to get the factor.
    """

    damped: Tensor
    damping: Tensor
    order: Tensor
    factor: Tensor | None
    pivots: Tensor | None
    notes: tuple[str, ...] = ()

    def damped_loss(self, error: Tensor) -> float:
        """Computes `tr(E (H + damping) E^T)` of `error [N, K]`; of several groups, N / groups rows of each in turn."""
        if self.factor is None or self.pivots is None:
            return objective(error, self.damped)
        groups, k = self.order.shape
        rows = error.view(groups, -1, k)
        rows = rows.gather(2, self.order.unsqueeze(1).expand_as(rows))
        total = 0.0
        for first in range(0, k, WIDE):  # half the products of E H, and no large terms that cancel
            here = slice(first, first + WIDE)
            behind = matmul(rows[:, :, : here.stop], self.factor[:, : here.stop, here])
            total += float(behind.square_().mul_(self.pivots[:, here].unsqueeze(1)).sum(dtype=torch.float64))
        return total

    def loss(self, error: Tensor, damped: float | None = None) -> float:
        """Computes `tr(E H E^T)`. damped: the `damped_loss` of the same error, where it is known."""
        squares = error.view(*self.order.shape[:1], -1, error.shape[1]).square().sum(1)
        share = (squares * self.damping.unsqueeze(1)).sum(dtype=torch.float64)
        damped = self.damped_loss(error) if damped is None else damped
        return max(0.0, damped - float(share))


def hessian_of(statistics: InputStatistics, damp: float, order: str, group_size: int) -> Hessian:
    """Prepares the second moments, once for all layers of a stage.

    If the factor fails, damping grows tenfold, up to 1; notes say so. A column that was always 0 has only the damping:
    what is lost in it counts little, and its weights stay, for inputs that the tokens have not shown.

    Args:
        damp: times the mean of the diagonal over columns that were not always 0; times 1 if all were.
        order: `act`: descending diagonal · `group`: descending inside groups, these by their largest · `none`.
        group_size: columns of a group, for `group`.
    """
    size = group_size if order == "group" else None
    return statistics.once(("hessian", damp, order, size), lambda: _prepare(statistics.gram, damp, order, group_size))


def objective(error: Tensor, gram: Tensor) -> float:
    """Computes `tr(E H E^T)` of `error [N, K]`; of G groups of `gram [groups, K, K]`, N / G rows of each in turn."""
    split = error.view(len(gram), -1, error.shape[1])
    return float(matmul(split, gram).mul_(split).sum(dtype=torch.float64))


@torch.no_grad()
def _prepare(gram: Tensor, damp: float, order: str, group_size: int) -> Hessian:
    diagonal = gram.diagonal(dim1=1, dim2=2)
    seen = (diagonal != 0).sum(1)
    mean = torch.where(seen > 0, diagonal.sum(1) / seen.clamp(min=1), 1.0)
    columns = _column_order(diagonal, order, group_size)
    notes: list[str] = []
    while True:
        damping = mean * damp
        damped = gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping.unsqueeze(1))
        factor, pivots = _factor(damped, columns)
        if factor is not None or damp >= LARGEST_DAMPING:
            break
        larger = min(10 * damp, LARGEST_DAMPING)
        notes.append(f"damping {damp:.3g} was too little for a factor: {larger:.3g}")
        damp = larger
    if factor is None:
        notes.append(f"no factor with damping {damp:.3g}: rounded to nearest")
    return Hessian(damped, damping, columns, factor, pivots, tuple(notes))


def _column_order(diagonal: Tensor, order: str, group_size: int) -> Tensor:
    """Orders the columns of each group: `[groups, K]` of `diagonal [groups, K]`."""
    groups, k = diagonal.shape
    if order == "none":
        return torch.arange(k, device=diagonal.device).expand(groups, k).contiguous()
    if order == "act":
        return diagonal.argsort(dim=1, descending=True, stable=True)
    inside = diagonal.view(groups, -1, group_size)
    first = inside.amax(2).argsort(dim=1, descending=True, stable=True)  # [groups, G]
    starts = torch.arange(0, k, group_size, device=first.device)[:, None]
    columns = inside.argsort(dim=2, descending=True, stable=True) + starts
    return columns.gather(1, first.unsqueeze(2).expand_as(columns)).flatten(1)


def _factor(damped: Tensor, order: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Factors in fp64: with J the reversal, `J H J = L L^T`, so `H = (J L J)(J L J)^T`."""
    k = order.shape[1]
    back = order.flip(1)
    rows = damped.gather(1, back.unsqueeze(2).expand_as(damped))
    lower, info = torch.linalg.cholesky_ex(rows.gather(2, back.unsqueeze(1).expand(-1, k, -1)).double())
    diagonal = lower.diagonal(dim1=1, dim2=2)
    if bool(info.any()) or not bool(diagonal.isfinite().all()):
        return None, None
    upper = (lower / diagonal.unsqueeze(1)).float().flip(1, 2)
    return upper, diagonal.square().float().flip(1)
