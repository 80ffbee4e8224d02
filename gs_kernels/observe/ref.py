"""Computes what the observers do, in the shortest torch that says it."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import fake_quant_ref, spread
from gs_kernels.formats import PER_TENSOR, Granularity

SCALE_FLOOR = 2.0**-100


def minmax_ref(x: Tensor, *, granularity: Granularity = PER_TENSOR) -> tuple[Tensor, Tensor]:
    rows, shape = spread(x.detach().float(), granularity)
    dims = [d for d, n in enumerate(shape) if n == 1]
    if not dims:
        return rows.clone().view(-1), rows.clone().view(-1)
    return rows.amin(dims).view(-1), rows.amax(dims).view(-1)


def symmetric_zero(qmin: int, qmax: int) -> float:
    """Returns the level of 0.0 on a symmetric grid: 0 if signed, the upper middle if unsigned, a half of two levels."""
    return (qmin + qmax) / 2 if qmax - qmin == 1 else float((qmin + qmax + 1) // 2)


def choose_qparams_ref(x_min: Tensor, x_max: Tensor, *, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    mn, mx = x_min.clamp(max=0.0), x_max.clamp(min=0.0)
    if symmetric:
        mx = torch.maximum(-mn, mx)
        mn = -mx
    span = mx - mn
    # a tensor divisor: by a Python number, CUDA multiplies with a rounded reciprocal instead
    step = (span / torch.full_like(span, qmax - qmin)).clamp(min=SCALE_FLOOR)
    scale = torch.where(span == 0, 1.0, step)
    if symmetric:
        return scale, torch.full_like(scale, symmetric_zero(qmin, qmax))
    return scale, torch.round(qmin - mn / scale).clamp(qmin, qmax)


def dynamic_fake_quant_ref(
    x: Tensor, *, qmin: int, qmax: int, symmetric: bool, granularity: Granularity = PER_TENSOR
) -> tuple[Tensor, Tensor, Tensor]:
    x_min, x_max = minmax_ref(x, granularity=granularity)
    scale, zero = choose_qparams_ref(x_min, x_max, qmin=qmin, qmax=qmax, symmetric=symmetric)
    return fake_quant_ref(x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity), scale, zero


def observe_fake_quant_ref(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quant_ref(x, scale, zero, qmin=qmin, qmax=qmax), *minmax_ref(x)
