"""Rounds column after column, each against the errors of the others: what GPTQ and coordinate descent share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gs_algos.quant.packed.float_grid import nearest_values
from gs_algos.quant.packed.grid import Grid
from gs_kernels import gptq_block
from gs_kernels.cpu.matmul import matmul

BLOCK = 128  # columns between two products
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
        """Rounds the columns from `first`, as many as `pull` is for, all of whose errors are in it."""
        change = torch.empty_like(pull)
        for left in range(0, len(pull), BLOCK):
            part = slice(left, left + BLOCK)
            here = slice(first + left, first + min(left + BLOCK, len(pull)))
            values = self.q[here] - pull[part]
            if left:
                values -= product(self.factor[:, first : first + left, here], change[:left])
            scale = self._of_columns(self.scale, here)
            zero = None if self.zero is None else self._of_columns(self.zero, here)
            round_block = _round_floats if self.grid.scheme.is_float else self._round_integers
            change[part] = round_block(values, self.q[here], self.factor[:, here, here], scale, zero)
        self.move(slice(first, first + len(pull)), change)

    def _round_integers(
        self, values: Tensor, start: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None
    ) -> Tensor:
        low, high = self.grid.limits
        return gptq_block(values, start, factor, scale, zero, qmin=low, qmax=high)

    def move(self, columns: slice, change: Tensor) -> None:
        """Adds to the values of columns."""
        self.q[columns] += change
        self.error[columns] += change

    def result(self) -> tuple[Grid, Tensor]:
        """Returns the grid and the codes `[N, K]`."""
        grid = replace(self.grid, scale=_rows(self.scale, None))
        return grid, grid.codes(_rows(self.q, self.order))

    def _of_columns(self, groups: Tensor, columns: slice) -> Tensor:
        """Returns `[columns, groups, n]` of what each group `[G, groups, n]` has one of."""
        index = self.group_of[columns]
        if index.shape[1] == 1:
            return groups.index_select(0, index.flatten())
        return groups.gather(0, index.unsqueeze(2).expand(-1, -1, groups.shape[2]))


def _round_floats(values: Tensor, start: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Does for grids of 4-bit floats what `gptq_block` does for integers."""
    change = torch.empty_like(start)
    for j in range(len(values)):
        change[j] = nearest_values(values[j] / scale[j]) * scale[j] - start[j]
        values[j + 1 :] -= factor[:, j, j + 1 :].t().unsqueeze(2) * change[j]
    return change


def row_pieces(n: int, groups: int) -> Iterator[slice]:
    """Splits the rows of a weight; those of several groups of factors stay together."""
    size = ROWS if groups == 1 else n
    yield from (slice(first, first + size) for first in range(0, n, size))


def product(factor: Tensor, error: Tensor) -> Tensor:
    """Multiplies `factor [groups, k, m]`, transposed, by `error [k, groups, n]`, to `[m, groups, n]`."""
    return matmul(factor.mT, error.transpose(0, 1)).transpose(0, 1)


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
