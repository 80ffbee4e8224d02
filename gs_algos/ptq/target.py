"""Moves the weight that rounding aims at, so that it makes up for what layers before it lost."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_algos.core.input_statistics import InputStatistics
from gs_algos.ptq.hessian import Hessian
from gs_kernels.cpu.matmul import matmul

SMALLEST_DAMPING = 0.01


def damping(statistics: InputStatistics, damp: float | None, columns: int) -> float:
    """Returns the damping of H, times the mean of its diagonal: `damp`, or if None `max(.01, K / (4 T))`.

    The latter is a shrinkage: the fewer tokens T there are for K columns, the less their correlations are trusted.
    """
    return max(SMALLEST_DAMPING, columns / (4 * statistics.weight)) if damp is None else damp


@torch.no_grad()
def corrected(weight: Tensor, statistics: InputStatistics, alpha: float, hessian: Hessian) -> Tensor:
    """Computes `W* = W + alpha W C (H + damping)^-1`, `[N, K]` fp32; columns that were always 0 stay.

    `|Q ^X^T - W ~X^T|^2` is `|(Q - W*) ^X^T|^2` and a constant at alpha = 1 and without damping: what is best for W* is
    best for the float output (Qronos, arXiv:2505.11695; QEP, arXiv:2504.09629; GPTAQ, arXiv:2504.02692).

    Args:
        weight: `[N, K]` fp32; of G groups, N / G rows of each in turn.
        statistics: with a cross term, if alpha is not 0.
        alpha: 0 to 1.
        hessian: of the statistics. Without a factor the weight stays as it is.
    """
    groups, k = statistics.groups, statistics.columns
    rows = weight.view(groups, -1, k)
    if alpha and hessian.factor is not None and statistics.cross is not None:
        cross = statistics.cross
        if rows.shape[1] >= k:  # one solve for all layers of the stage
            change = matmul(rows, statistics.once(("correction", hessian), lambda: _divided(cross, hessian)))
        else:
            change = _divided(matmul(rows, cross), hessian)
        rows = rows + alpha * change
    return rows.reshape(weight.shape)


def _divided(rows: Tensor, hessian: Hessian) -> Tensor:
    """Computes `rows (H + damping)^-1` of `rows [groups, M, K]`."""
    order = hessian.order.unsqueeze(1).expand_as(rows)
    assert hessian.factor is not None and hessian.pivots is not None
    solve = torch.linalg.solve_triangular
    found = solve(hessian.factor.mT, rows.gather(2, order), upper=False, left=False, unitriangular=True)
    found = solve(hessian.factor, found / hessian.pivots.unsqueeze(1), upper=True, left=False, unitriangular=True)
    return torch.empty_like(rows).scatter_(2, order, found)
