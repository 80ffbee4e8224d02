"""Sums products of columns on the CPU: matrix products, for the blocks on and above the diagonal."""

from __future__ import annotations

from torch import Tensor

from gs_kernels.cpu.matmul import add_matmul_, onednn_takes

BLOCK = 256  # columns: fewer flops below the diagonal against products that are fast; measured


def gram__cpu(total: Tensor, x: Tensor, floats: Tensor | None) -> None:
    rows = x.float()
    if floats is None:
        for sums, one in _parts(total, rows):
            _add_square(sums, one)
        return
    left = (floats.float() - rows).to(x.dtype).float()
    if total.shape[0] == 1:
        add_matmul_(total[0], left[0].t(), rows[0])
    else:
        total.baddbmm_(left.mT, rows)


def _parts(total: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Splits into groups what has more than a block of columns, or is but one group."""
    wide = total.shape[0] == 1 or total.shape[1] > BLOCK
    return list(zip(total, rows, strict=True)) if wide else [(total, rows)]


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Adds rows^T rows, `[T, K]`, or `[groups, T, K]` if K fits a block, to `total [K, K]` or `[groups, K, K]`."""
    if total.dim() == 3:
        total.baddbmm_(rows.mT, rows)
        return
    k, columns = total.shape[0], rows.t()
    columns = columns.contiguous() if onednn_takes(columns, columns) else columns
    for first in range(0, k, BLOCK):
        end = min(first + BLOCK, k)
        add_matmul_(total[first:end, first:], columns[first:end], columns[first:].t())
        total[end:, first:end] = total[first:end, end:].t()
