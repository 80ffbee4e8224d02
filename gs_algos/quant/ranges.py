"""Finds the range that a tensor is clipped to: its extremes, a percentile, or the range of least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_algos.quant.scheme import Scheme
from gs_kernels import PerChannel, fake_quant, search_clip_ratio

MSE_STEPS = 80  # ratios tried, from 1 down to MSE_SMALLEST
MSE_SMALLEST = 0.2


@torch.no_grad()
def clip_ratio(rows: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Tensor:
    """Finds the share of each row's extremes to keep, `[C]` in (0, 1], from `rows [C, n]` fp32.

    percentile: the quantile of |x| over its maximum. mse: the ratio r of MSE_STEPS whose grid, stretched over
    [r*min, r*max], gives the least sum of squared errors, each times its importance `[C, n]`; 1 for the other
    observers.
    """
    if scheme.observer == "percentile":
        share = float(scheme.argument or 100.0) / 100.0
        largest = rows.abs().amax(1)
        # torch.quantile takes at most 16M elements: kthvalue has no such limit and needs no interpolation
        k = max(1, min(rows.shape[1], round(share * rows.shape[1])))
        bound = rows.abs().kthvalue(k, dim=1).values
        return torch.where(largest > 0, bound / largest, torch.ones_like(bound)).clamp(min=1e-3)
    if scheme.observer != "mse" and not scheme.learned:
        return rows.new_ones(rows.shape[0])
    ratios = torch.linspace(1.0, MSE_SMALLEST, MSE_STEPS, dtype=torch.float32, device=rows.device)
    limits = {"qmin": scheme.qmin, "qmax": scheme.qmax}
    return search_clip_ratio(rows, ratios, importance, **limits, symmetric=scheme.symmetric)


def squared_error(rows: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, importance: Tensor | None) -> Tensor:
    """Sums the squared errors of `rows [C, n]` on the grid of each, times their importance `[C, n]`, to `[C]`."""
    grid = fake_quant(rows, scale, zero, qmin=scheme.qmin, qmax=scheme.qmax, granularity=PerChannel(0))
    error = (grid - rows).square()
    return (error if importance is None else error * importance).sum(1)


@torch.no_grad()
def search_range(rows: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns (min, max) `[C]` of `rows [C, n]` fp32 by the scheme's observer; least error if it is learnt.

    importance: `[C, n]` fp32, how many times each squared error counts; None for once.
    """
    ratio = clip_ratio(rows, scheme, importance)
    return rows.amin(1) * ratio, rows.amax(1) * ratio
