"""Computes fake-quant in the shortest torch that says it: the oracle of every other implementation.

The order of operations is part of the definition. scale = absmax / qmax puts the extreme element exactly on the edge of
the grid, where x / s and x * (1 / s) disagree about the straight-through mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gs_kernels.formats import PER_TENSOR, Granularity, PerChannel, PerGroup

SCALE_MIN = 2.0**-126  # the smallest fp32 whose reciprocal is surely finite
SCALE_MAX = torch.finfo(torch.float32).max
ZERO_MAX = 2.0**20  # below 2**22, up to which adding and subtracting 1.5 * 2**23 rounds exactly


class _RoundThrough(torch.autograd.Function):
    """Rounds half to even; its gradient is one (straight through)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return torch.round(v)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def spread(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, ...]]:
    """Returns x with one axis that owns the scales, and the shape with which a `[C]` scale broadcasts against it."""
    if isinstance(granularity, PerGroup):
        return x.reshape(-1, granularity.size), (-1, 1)
    if isinstance(granularity, PerChannel):
        axis = granularity.axis % x.dim()
        return x, tuple(-1 if d == axis else 1 for d in range(x.dim()))
    return x, (1,) * x.dim()


def inverse(scale: Tensor, zero: Tensor) -> Tensor:
    """Computes 1 / scale, NaN where scale is not in [2**-126, inf) or zero not in [-2**20, 2**20]."""
    valid = (scale >= SCALE_MIN) & (scale <= SCALE_MAX) & (zero.abs() <= ZERO_MAX)
    return torch.where(valid, 1.0 / scale, torch.nan)


def _steps(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Computes the level of x before clamping: `round(x / s + frac(z)) + round(z)`."""
    zi = torch.round(zero).detach()
    return _RoundThrough.apply(x.float() * inverse(scale, zero) + (zero - zi)) + zi


def fake_quant_ref(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, granularity: Granularity = PER_TENSOR
) -> Tensor:
    rows, shape = spread(x, granularity)
    s, z = scale.view(shape), zero.view(shape)
    r = _steps(rows, s, z)
    # a gradient of one on the ends of the grid too, where that of clamp is another since PyTorch 2.14
    q = torch.where(r < qmin, float(qmin), torch.where(r > qmax, float(qmax), r))
    return ((q - z) * s).to(x.dtype).view(x.shape)


def fake_quant_backward_ref(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    qmin: int,
    qmax: int,
    granularity: Granularity = PER_TENSOR,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dx, dscale, dzero, straight through inside the grid; dscale: Esser et al. 2020, arXiv:1902.08153 (3)."""
    rows, shape = spread(x, granularity)
    dy_rows, _ = spread(dy, granularity)
    s, z = scale.view(shape), zero.view(shape)
    g = dy_rows.float()
    r = _steps(rows, s, z)
    inside = (r >= qmin) & (r <= qmax)
    level = r.clamp(qmin, qmax) - z
    dims = [d for d, n in enumerate(shape) if n == 1]
    dx = torch.where(inside, g, 0.0).to(x.dtype).view(x.shape)
    ds = g * torch.where(inside, level - rows.float() * inverse(s, z), level)
    dz = g * torch.where(inside, 0.0, -s)
    if dims:
        ds, dz = ds.sum(dims), dz.sum(dims)
    return dx, ds.view(-1), dz.view(-1)


def quantize_ref(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, granularity: Granularity = PER_TENSOR
) -> Tensor:
    rows, shape = spread(x, granularity)
    r = _steps(rows, scale.view(shape), zero.view(shape))
    codes = torch.where(r.isnan(), qmin, r.clamp(qmin, qmax))
    return codes.to(torch.int8 if qmin < 0 else torch.uint8).view(x.shape)


def dequantize_ref(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    rows, shape = spread(codes, granularity)
    return ((rows.float() - zero.view(shape)) * scale.view(shape)).to(dtype).view(codes.shape)
