"""Searches clip ratios in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import fake_quant_ref
from gs_kernels.formats import PerChannel
from gs_kernels.observe.ref import choose_qparams_ref


def squared_error_ref(
    x: Tensor, ratio: Tensor, importance: Tensor | None, qmin: int, qmax: int, symmetric: bool
) -> Tensor:
    """Sums the squared errors of each row, its range times a ratio `[C]` or `[1]`, to `[C]`."""
    rows = x.float()
    scale, zero = choose_qparams_ref(
        rows.amin(1) * ratio, rows.amax(1) * ratio, qmin=qmin, qmax=qmax, symmetric=symmetric
    )
    error = (fake_quant_ref(rows, scale, zero, qmin=qmin, qmax=qmax, granularity=PerChannel(0)) - rows).square()
    return (error if importance is None else error * importance).sum(1)


def search_clip_ratio_ref(
    x: Tensor, ratios: Tensor, importance: Tensor | None = None, *, qmin: int, qmax: int, symmetric: bool
) -> Tensor:
    found = x.new_ones(len(x), dtype=torch.float32)
    best = torch.full_like(found, torch.inf)
    for ratio in ratios:
        error = squared_error_ref(x, ratio, importance, qmin, qmax, symmetric)
        found, best = torch.where(error < best, ratio, found), torch.minimum(error, best)
    return found
