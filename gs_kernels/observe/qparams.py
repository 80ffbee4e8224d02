"""Turns a range of real values into the scale and zero point of an integer grid: one launch on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.checks import check_grid
from gs_kernels.observe.ref import choose_qparams_ref
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register


def qparams_ref(x_min: Tensor, x_max: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    return choose_qparams_ref(x_min, x_max, qmin=qmin, qmax=qmax, symmetric=symmetric)


def _qparams_fake(x_min: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_min), torch.empty_like(x_min)


QPARAMS = implementations("choose_qparams", qparams_ref)
_run = register(
    "choose_qparams(Tensor x_min, Tensor x_max, int qmin, int qmax, bool symmetric) -> (Tensor, Tensor)",
    QPARAMS,
    _qparams_fake,
)


def choose_qparams(x_min: Tensor, x_max: Tensor, *, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Fits a grid to a range: `scale = (x_max - x_min) / (qmax - qmin)`, `zero = clamp(round(qmin - x_min / scale))`.

    The range is first made to hold 0, so that 0.0 is exactly a level (padding, ReLU). Symmetric takes the range
    ±max(|x_min|, |x_max|) and a constant zero: 0 on a signed grid, (qmin + qmax + 1) // 2 on an unsigned one, and
    (qmin + qmax) / 2 on a grid of two levels, whose values are then ±scale / 2. A range of 0 gives scale 1; no scale
    is below 2**-100. NaN or Inf in the range gives NaN or Inf scales.

    Args:
        x_min: `[C]` fp32, smallest value of each channel, as `minmax` gives it.
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
    for name, t in (("x_min", x_min), ("x_max", x_max)):
        if not isinstance(t, Tensor) or t.dtype != torch.float32:
            raise TypeError(f"choose_qparams: {name} must be a float32 tensor, got {getattr(t, 'dtype', type(t))}")
    if x_min.shape != x_max.shape or x_min.dim() != 1:
        raise ValueError(
            f"choose_qparams: x_min and x_max must have one shape, [C], got {list(x_min.shape)} and {list(x_max.shape)}"
        )
    check_grid("choose_qparams", qmin, qmax)
    return _run(x_min.detach(), x_max.detach(), qmin, qmax, symmetric)
