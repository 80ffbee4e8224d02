"""Measures ranges on the CPU, alone or in the pass of fake-quant."""

from __future__ import annotations

from torch import Tensor

from gs_kernels.fake_quant.cpu import DenseView, fake_quant_cpu, fused_fake_quant
from gs_kernels.observe.qparams import choose_qparams


def fused_range(x: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """Returns the smallest and largest of x, `[n]`, or of its rows, `[..., C, cols]`, or of its columns, `[n, C]`."""
    if not by_row:
        low, high = x.amin(0), x.amax(0)
    else:
        low, high = x.amin(-1), x.amax(-1)
        if x.dim() == 3:
            low, high = low.amin(0), high.amax(0)
    return low.float().view(-1), high.float().view(-1)


def fused_fake_quant_and_range(x: Tensor, *grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fused_fake_quant(x, *grid), *fused_range(x, by_row=True)


def minmax_cpu(x: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor]:
    view = DenseView(x, axis, group)
    return view.run(fused_range, view.x, view.kind != "col")


def dynamic_fake_quant_cpu(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = choose_qparams(*minmax_cpu(x, axis, group), qmin=qmin, qmax=qmax, symmetric=symmetric)
    return fake_quant_cpu(x, scale, zero, qmin, qmax, axis, group), scale, zero


def observe_fake_quant_cpu(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    view = DenseView(x, -1, 0)
    y, x_min, x_max = view.run(fused_fake_quant_and_range, view.x, *view.grid(scale, zero, qmin, qmax))
    return view.restore(y), x_min, x_max
