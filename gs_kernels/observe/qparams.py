"""From a range of real values to the scale and zero point of an integer grid."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_FLOOR = 2.0**-100


def symmetric_zero(qmin: int, qmax: int) -> float:
    """The level of 0.0 on a symmetric grid: 0 if signed, the upper middle if unsigned, a half with two levels."""
    return (qmin + qmax) / 2 if qmax - qmin == 1 else float((qmin + qmax + 1) // 2)


def choose_qparams(x_min: Tensor, x_max: Tensor, *, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid of a range: `scale = (x_max - x_min) / (qmax - qmin)`, `zero = clamp(round(qmin - x_min / scale))`.

    The range is first made to hold 0, so that 0.0 is exactly a level (padding, ReLU). Symmetric takes the range
    ±max(|x_min|, |x_max|) and a constant zero: 0 on a signed grid, (qmin + qmax + 1) // 2 on an unsigned one, and
    (qmin + qmax) / 2 on a grid of two levels, whose values are then ±scale / 2. A range of 0 gives scale 1; no scale
    is below 2**-100. NaN or Inf in the range gives NaN or Inf scales.

    Args:
        x_min: `[C]` fp32, smallest value of each channel.
        x_max: `[C]` fp32, largest value of each channel.
        qmin: smallest integer level, e.g. -128.
        qmax: largest integer level, e.g. 127.
        symmetric: range centred on 0.

    Returns:
        scale, zero: `[C]` fp32.

    Raises:
        ValueError: if shapes disagree or qmin >= qmax.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.
    Differs from the paper: a symmetric zero is a constant, since rounding qmin - x_min / scale = -0.5 could give -1.
    """
    if x_min.shape != x_max.shape:
        raise ValueError(
            f"choose_qparams: x_min and x_max must have one shape, got {tuple(x_min.shape)} and {tuple(x_max.shape)}"
        )
    if qmin >= qmax:
        raise ValueError(f"choose_qparams: qmin must be below qmax, got qmin={qmin}, qmax={qmax}")
    mn, mx = x_min.float().clamp(max=0.0), x_max.float().clamp(min=0.0)
    if symmetric:
        mx = torch.maximum(-mn, mx)
        mn = -mx
    span = mx - mn
    # a tensor divisor: with a Python number, CUDA multiplies by a rounded reciprocal instead
    step = (span / torch.full_like(span, qmax - qmin)).clamp(min=SCALE_FLOOR)
    scale = torch.where(span == 0, 1.0, step)
    if symmetric:
        return scale, torch.full_like(scale, symmetric_zero(qmin, qmax))
    return scale, torch.round(qmin - mn / scale).clamp(qmin, qmax)
