"""Rounds column after column, each against the errors of the others: what GPTQ and coordinate descent share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gs_algos.quant.packed.grid import Grid

BLOCK = 128  # columns between two large products
STEP = 16  # columns between two small ones
ROWS = 4096  # rows that go together: a block of theirs should stay in the cache


class Sweep:
    """Rounds columns j of a weight in turn to `nearest(w_j - sum_(i != j) e_i F_ij)`, e = q - w.

    F, with ones on its diagonal, says what the error of column i is worth in column j: `H_ij / H_jj` in coordinate
    descent, from codes that are there; R of `Hessian` in GPTQ, from e = 0.

    Tensors lie as `[K, groups, n]`, so that a column of all rows is contiguous; n = N / groups.

    Args:
        target: w `[N, K]` fp32; of G groups of factors, N / G rows of each in turn.
        start: `[N, K]` fp32, the values q that the pass starts with.
        grid: of the weight.
        factor: F `[groups, K, K]`, its rows and columns in `order`.
        order: `[groups, K]`, of columns; None for that of the weight.
    """

    def __init__(self, target: Tensor, start: Tensor, grid: Grid, factor: Tensor, order: Tensor | None = None) -> None:
        groups, k = factor.shape[:2]
        self.grid, self.factor, self.order = grid, factor, order
        self.q = _columns(start, groups, order)
        self.error = self.q - _columns(target, groups, order)
        self.scale = _columns(grid.scale, groups, None)  # [G, groups, n]
        self.zero = _columns(grid.stored_zero, groups, None) if bool(grid.zero.any()) else None
        columns = torch.arange(k, device=factor.device).expand(groups, k) if order is None else order
        self.group_of = (columns // (k // len(self.scale))).t()  # [K, groups]

    def pull(self, first: int, end: int, columns: slice) -> Tensor:
        """Computes what the errors of some columns are worth in those from `first` to `end`."""
        return product(self.factor[:, columns, first:end], self.error[columns])

    def round(self, first: int, pull: Tensor) -> None:
        """Rounds the columns from `first`, as many as `pull` is for."""
        change = torch.zeros_like(pull)
        here = slice(first, first + len(pull))
        self._round(first, self.q[here] - pull, change, self.factor[:, here, here], BLOCK)
        self.move(here, change)

    def move(self, columns: slice, change: Tensor) -> None:
        """Adds to the values of columns."""
        self.q[columns] += change
        self.error[columns] += change

    def result(self) -> tuple[Grid, Tensor]:
        """Returns the grid and the codes `[N, K]`."""
        grid = replace(self.grid, scale=_rows(self.scale, None))
        return grid, grid.codes(_rows(self.q, self.order))

    def _round(self, first: int, free: Tensor, change: Tensor, factor: Tensor, width: int) -> None:
        """Writes `change` of the columns from `first`, whose values would be `free`, which is used up."""
        for left in range(0, len(free), width):
            here = slice(left, left + width)
            if left:
                free[here] -= product(factor[:, :left, here], change[:left])
            step = self._round if width > STEP else self._round_few
            step(first + left, free[here], change[here], factor[:, here, here], STEP)

    def _round_few(self, first: int, free: Tensor, change: Tensor, factor: Tensor, width: int) -> None:
        low, high = self.grid.limits
        worth = factor.permute(1, 2, 0).unsqueeze(3).contiguous()  # [columns, columns, groups, 1]
        scales = self._of_columns(self.scale, first, len(free))
        inverses = torch.where(scales == 0, 0.0, 1.0 / scales)  # rows of zeros of 1 bit have a scale of 0
        zeros = None if self.zero is None else self._of_columns(self.zero, first, len(free))
        before = self.q[first : first + len(free)]
        columns = zip(*(t.unbind() for t in (free, before, change, scales, inverses)), strict=True)
        for j, (value, was, moved, scale, inverse) in enumerate(columns):
            code = value * inverse
            if zeros is None:
                code.round_().clamp_(low, high)
            else:
                code.add_(zeros[j]).round_().clamp_(low, high).sub_(zeros[j])
            torch.sub(code.mul_(scale), was, out=moved)
            if j + 1 < len(free):
                free[j + 1 :].addcmul_(worth[j, j + 1 :], moved, value=-1.0)

    def _of_columns(self, groups: Tensor, first: int, count: int) -> Tensor:
        """Returns `[count, groups, n]` of what each group `[G, groups, n]` has one of."""
        index = self.group_of[first : first + count]
        if index.shape[1] == 1:
            return groups.index_select(0, index.flatten())
        return groups.gather(0, index.unsqueeze(2).expand(-1, -1, groups.shape[2]))


def row_pieces(n: int, groups: int) -> Iterator[slice]:
    """Splits the rows of a weight; those of several groups of factors stay together."""
    size = ROWS if groups == 1 else n
    yield from (slice(first, first + size) for first in range(0, n, size))


def product(factor: Tensor, error: Tensor) -> Tensor:
    """Multiplies `factor [groups, k, m]`, transposed, by `error [k, groups, n]`, to `[m, groups, n]`."""
    if len(factor) == 1:
        return (factor[0].t() @ error.squeeze(1)).unsqueeze(1)
    return torch.bmm(factor.mT, error.transpose(0, 1)).transpose(0, 1)


def _columns(rows: Tensor, groups: int, order: Tensor | None) -> Tensor:
    """Lays `[N, K]` out as `[K, groups, n]`, columns in that order."""
    split = rows.view(groups, -1, rows.shape[1])
    split = split if order is None else split.gather(2, order.unsqueeze(1).expand_as(split))
    return split.permute(2, 0, 1).contiguous()


def _rows(columns: Tensor, order: Tensor | None) -> Tensor:
    """Undoes `_columns`."""
    split = columns.permute(1, 2, 0)
    if order is not None:
        split = torch.empty_like(split).scatter_(2, order.unsqueeze(1).expand_as(split), split)
    return split.reshape(-1, split.shape[2])
