"""Improves codes and scales together: scales by least squares, codes by coordinate descent, in turn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gs_algos.ptq.hessian import objective
from gs_algos.ptq.sweep import sweep
from gs_algos.quant.packed.grid import Grid
from gs_kernels import PerTensor

LARGEST_CHANGE = 3.0  # of a scale: a system that asks for more is ill-conditioned
ROUNDING = 1e-4  # share of the objective that sums in fp32 may be off by
SYSTEM = 2**24  # numbers in the systems of the rows that are refitted at a time


@torch.no_grad()
def refine(target: Tensor, grid: Grid, codes: Tensor, damped: Tensor, rounds: int) -> tuple[Grid, Tensor]:
    """Lowers `tr(E H E^T)`, E = Q - W*, in rounds of a scale refit and a pass of coordinate descent; never raises it.

    Args:
        target: W* `[N, K]` fp32; of G groups of `damped`, N / G rows of each in turn.
        grid: of the weight; zero points stay.
        codes: `[N, K]`, to start from.
        damped: H with its damping `[groups, K, K]` fp32.
        rounds: 0 or more.
    """
    if not rounds:
        return grid, codes
    before = objective(grid.values(codes) - target, damped)
    factor = damped / damped.diagonal(dim1=1, dim2=2).unsqueeze(1)
    for _ in range(rounds):
        grid = refit(target, grid, codes, damped)
        codes = sweep(target, grid.values(codes), grid, factor)
    after = objective(grid.values(codes) - target, damped)
    assert after <= before * (1 + ROUNDING), (before, after)
    return grid, codes


def refit(target: Tensor, grid: Grid, codes: Tensor, damped: Tensor) -> Grid:
    """Moves the scales of each row to those that lose least with its codes.

    With q_g the values of group g, scales times 1 + d lose least where `A d = -b`, `A_gh = q_g^T H_gh q_h`,
    `b_g = q_g^T (H e)_g`. A scale that would change its sign, or by more than 3x, stays; so do those of a row that
    would not gain once they are rounded to the stored dtype.
    """
    values = grid.values(codes)
    groups, (n, g) = len(damped), grid.scale.shape
    if isinstance(grid.scheme.granularity, PerTensor):
        b, a = _systems(values, target, damped, g)
        scale = _moved(grid.scale[:1], b.sum(0, True), a.sum(0, True), grid.dtype).expand(n, g).contiguous()
        return replace(grid, scale=scale)
    step = max(1, SYSTEM // (g * max(g, values.shape[1]))) if groups == 1 else n
    parts = []
    for first in range(0, n, step):
        b, a = _systems(values[first : first + step], target[first : first + step], damped, g)
        parts.append(_moved(grid.scale[first : first + step], b, a, grid.dtype))
    return replace(grid, scale=torch.cat(parts))


def _systems(values: Tensor, target: Tensor, damped: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Makes (b `[N, G]`, A `[N, G, G]`) of `values [N, K]` and their target."""
    groups, k = damped.shape[:2]
    size = k // n_groups
    q = values.view(groups, -1, k)
    pull = (q - target.view_as(q)) @ damped
    b = (pull * q).unflatten(2, (n_groups, size)).sum(3).flatten(0, 1)
    a = q.new_empty(*q.shape[:2], n_groups, n_groups)
    for g in range(n_groups):
        first = g * size
        row = q[:, :, first : first + size] @ damped[:, first : first + size, first:]
        row = row.mul_(q[:, :, first:]).unflatten(2, (-1, size)).sum(3)
        a[:, :, g, g:] = row
        a[:, :, g:, g] = row
    return b, a.flatten(0, 1)


def _moved(scale: Tensor, b: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """Solves the systems for `scale [N, G]` and returns the scales, where they gain."""
    diagonal = a.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros has no say
    diagonal.masked_fill_(empty, 1.0)
    lower, info = torch.linalg.cholesky_ex(a)
    change = torch.cholesky_solve(-b.unsqueeze(2), lower).squeeze(2)
    kept = empty | (info != 0).unsqueeze(1) | ~(change + 1 >= 1 / LARGEST_CHANGE) | ~(change + 1 <= LARGEST_CHANGE)
    moved = torch.where(kept, scale, scale * (1 + change)).to(dtype).float()
    moved = torch.where(moved.isfinite() & (moved != 0), moved, scale)
    change = torch.where(scale == 0, 0.0, moved / scale - 1)
    gain = (change * (2 * b + (a @ change.unsqueeze(2)).squeeze(2))).sum(1, keepdim=True)
    return torch.where(gain < 0, moved, scale)
