"""Improves codes and scales together, group after group: scales by least squares, codes by coordinate descent."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gs_algos.ptq.hessian import Hessian
from gs_algos.ptq.sweep import BLOCK, Sweep, product, row_pieces
from gs_algos.quant.packed.grid import Grid
from gs_kernels import PerTensor

LARGEST_CHANGE = 3.0  # of a scale: more is asked for where a group hardly matters
ROUNDING = 1e-4  # share of the objective that sums in fp32 may be off by


@torch.no_grad()
def refine(target: Tensor, grid: Grid, codes: Tensor, hessian: Hessian, rounds: int) -> tuple[Grid, Tensor, float]:
    """Lowers `tr(E H E^T)`, E = Q - W*, in passes over the groups of each row; never raises it.

    A pass moves the scale of a group to the one that loses least with its codes, then each of its codes to the one that
    loses least, both against the errors of all other groups as they are by then. A scale that would change its sign, or
    by more than 3x, or that would not gain once it is rounded to the stored dtype, stays; so does one scale for all.

    Args:
        target: W* `[N, K]` fp32; of several groups of the Hessian, N / groups rows of each in turn.
        grid: of the weight; zero points stay.
        codes: `[N, K]`, to start from.
        hessian: H, here with its damping.
        rounds: passes, 0 or more.

    Returns:
        The grid, the codes, and `tr(E H E^T)` of them.
    """
    before = hessian.damped_loss(grid.values(codes) - target)
    if not rounds:
        return grid, codes, before
    diagonal = hessian.damped.diagonal(dim1=1, dim2=2)  # [groups, K]
    factor = hessian.damped / diagonal.unsqueeze(1)
    parts = []
    for rows in row_pieces(len(target), len(factor)):
        part, found = grid.rows(rows), codes[rows]
        for _ in range(rounds):
            part, found = _pass(Sweep(target[rows], part.values(found), part, factor), diagonal)
        parts.append((part, found))
    grid = replace(grid, scale=torch.cat([part.scale for part, _ in parts]))
    codes = torch.cat([found for _, found in parts])
    after = hessian.damped_loss(grid.values(codes) - target)
    assert after <= before * (1 + ROUNDING), (before, after)
    return grid, codes, after


def _pass(sweep: Sweep, diagonal: Tensor) -> tuple[Grid, Tensor]:
    k = len(sweep.q)
    size = k // len(sweep.scale)
    width = size * max(1, BLOCK // size)  # whole groups
    for first in range(0, k, width):
        end = min(first + width, k)
        pull = sweep.pull(first, end, slice(0, k))
        if not isinstance(sweep.grid.scheme.granularity, PerTensor):
            for left in range(first, end, size):
                _move_scale(sweep, diagonal, left // size, slice(left, left + size), pull, first)
        sweep.round(first, pull)
    return sweep.result()


def _move_scale(sweep: Sweep, diagonal: Tensor, group: int, columns: slice, pull: Tensor, first: int) -> None:
    """Moves the scale of a group, its values, and what they pull the columns from `first` by.

    With q the values of the group, scale times 1 + d loses `2 d q^T (H e) + d^2 q^T H q` more.
    """
    q, scale = sweep.q[columns], sweep.scale[group]
    here = slice(first, first + len(pull))
    worth = product(sweep.factor[:, columns, here], q)  # [columns, groups, n], of the values themselves
    inside = slice(columns.start - first, columns.stop - first)
    weighted = q * diagonal[:, columns].t().unsqueeze(2)
    slope, curvature = ((weighted * t[inside]).sum(0) for t in (pull, worth))
    ratio = 1 - slope / torch.where(curvature > 0, curvature, torch.inf)
    fits = (ratio >= 1 / LARGEST_CHANGE) & (ratio <= LARGEST_CHANGE)
    moved = sweep.grid.storable(torch.where(fits, scale * ratio, scale))
    moved = torch.where(moved.isfinite() & (moved != 0), moved, scale)
    change = torch.where(scale == 0, 0.0, moved / scale - 1)
    gains = change * (2 * slope + change * curvature) < 0
    change = torch.where(gains, change, 0.0)
    sweep.scale[group] = torch.where(gains, moved, scale)
    sweep.move(columns, change * q)
    pull += change * worth
