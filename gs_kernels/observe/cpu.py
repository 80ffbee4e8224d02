"""Ranges on the CPU, alone or in the pass of fake-quant."""

from __future__ import annotations

from torch import Tensor

from gs_kernels.fake_quant.cpu import Canonical, fake_quant_cpu, forward_chain
from gs_kernels.observe.qparams import choose_qparams


def range_chain(x: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest of x, `[n]`, or of its rows, `[..., C, cols]`, or of its columns, `[n, C]`."""
    if not by_row:
        low, high = x.amin(0), x.amax(0)
    else:
        low, high = x.amin(-1), x.amax(-1)
        if x.dim() == 3:
            low, high = low.amin(0), high.amax(0)
    return low.float().view(-1), high.float().view(-1)


def observe_chain(x: Tensor, *grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return forward_chain(x, *grid), *range_chain(x, by_row=True)


def minmax_cpu(x: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor]:
    c = Canonical(x, axis, group)
    return c.run(range_chain, c.x, c.kind != "col")


def dynamic_fake_quant_cpu(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = choose_qparams(*minmax_cpu(x, axis, group), qmin=qmin, qmax=qmax, symmetric=symmetric)
    return fake_quant_cpu(x, scale, zero, qmin, qmax, axis, group), scale, zero


def observe_fake_quant_cpu(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    c = Canonical(x, -1, 0)
    y, x_min, x_max = c.run(observe_chain, c.x, *c.grid(scale, zero, qmin, qmax))
    return c.restore(y), x_min, x_max
