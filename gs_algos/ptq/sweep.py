"""Rounds column after column, each against the errors of the others: one pass of GPTQ, or of coordinate descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gs_algos.quant.packed.grid import Grid

BLOCK = 128  # columns between two large products
STEP = 16  # columns between two small ones
ROWS = 4096  # rows that go together: a block of theirs should stay in the cache


@torch.no_grad()
def sweep(
    target: Tensor, start: Tensor, grid: Grid, factor: Tensor, order: Tensor | None = None, triangular: bool = False
) -> Tensor:
    """Rounds each column j in turn to `nearest(w_j - sum_(i != j) e_i F_ij)`, e = q - w, and returns codes `[N, K]`.

    F with ones on the diagonal says what error i is worth in column j. The R of `Hessian`, from e = 0, makes the pass
    GPTQ (Frantar et al. 2023, arXiv:2210.17323): F_ij is 0 for i > j then. `H_ij / H_jj`, from codes that are there,
    makes it coordinate descent.
    Differs from the paper: errors of columns before are gathered by R, not pushed to those behind by R^-1: the same
    numbers (Babai's nearest plane), without the inverse.

    Args:
        target: w `[N, K]` fp32; of G groups of factors, N / G rows of each in turn.
        start: `[N, K]` fp32, the values that q starts with: `target` itself for an error of 0.
        grid: of the weight.
        factor: F `[groups, K, K]`, its rows and columns in `order`.
        order: `[groups, K]`, of columns; None for that of the weight.
        triangular: whether F_ij is 0 for i > j, and e is 0 at the start.
    """
    groups, k = factor.shape[:2]
    if groups == 1 and len(target) > ROWS:
        cuts = [(first, first + ROWS) for first in range(0, len(target), ROWS)]
        parts = [(target[a:b], start[a:b], grid.rows(a, b), factor, order, triangular) for a, b in cuts]
        return torch.cat([sweep(*part) for part in parts])
    q = _columns(start, groups, order)
    error = q - _columns(target, groups, order)
    scales = _Scales(grid, factor, order)
    for first in range(0, k, BLOCK):
        end = min(first + BLOCK, k)
        before = slice(0, first) if triangular else slice(0, k)
        free = q[first:end] - _product(factor[:, before, first:end], error[before])  # where columns would go
        change = torch.zeros_like(free)
        block = factor[:, first:end, first:end]
        for left in range(0, end - first, STEP):
            here = slice(left, left + STEP)
            if left:
                free[here] -= _product(block[:, :left, here], change[:left])
            old = q[first:end][here]
            _round(free[here], old, change[here], block[:, here, here], scales.of(first + left, len(old)), grid)
        error[first:end] += change
        q[first:end] += change
    return grid.codes(_rows(q, order))


def _round(free: Tensor, old: Tensor, change: Tensor, factor: Tensor, scales: Sequence[Tensor], grid: Grid) -> None:
    """Rounds a few columns; writes `change` and uses `free` up, `[columns, groups, n]` both.

    factor: `[groups, columns, columns]`.
    """
    low, high = grid.limits
    worth = factor.permute(1, 2, 0).unsqueeze(3).contiguous()  # [columns, columns, groups, 1]
    for j, (value, was, moved, scale, inverse, *zero) in enumerate(
        zip(*(t.unbind() for t in (free, old, change, *scales)), strict=True)
    ):
        code = value * inverse
        if zero:
            code = code.add_(zero[0]).round_().clamp_(low, high).sub_(zero[0])
        else:
            code = code.round_().clamp_(low, high)
        torch.sub(code.mul_(scale), was, out=moved)
        if j + 1 < len(free):
            free[j + 1 :].addcmul_(worth[j, j + 1 :], moved, value=-1.0)


class _Scales:
    """Gives scales, their inverses and, unless all are 0, zero points of columns, `[columns, groups, n]` each."""

    def __init__(self, grid: Grid, factor: Tensor, order: Tensor | None) -> None:
        groups, k = factor.shape[:2]
        inverse = torch.where(grid.scale == 0, 0.0, 1.0 / grid.scale)  # rows of zeros of 1 bit have a scale of 0
        zero = grid.stored_zero
        found = (grid.scale, inverse, *([zero] if bool(zero.any()) else []))
        self.tensors = [_columns(t, groups, None).to(factor.dtype) for t in found]  # [G, groups, n]
        columns = torch.arange(k, device=factor.device).expand(groups, k) if order is None else order
        self.group = (columns // (k // grid.scale.shape[1])).t()  # [K, groups]

    def of(self, first: int, count: int) -> list[Tensor]:
        group = self.group[first : first + count]
        if group.shape[1] == 1:
            return [t.index_select(0, group.flatten()) for t in self.tensors]
        index = group.unsqueeze(2).expand(-1, -1, self.tensors[0].shape[2])
        return [t.gather(0, index) for t in self.tensors]


def _product(factor: Tensor, error: Tensor) -> Tensor:
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
