"""What the observers compute, in the shortest torch that says it."""

from __future__ import annotations

from torch import Tensor

from gs_kernels.fake_quant.ref import fake_quant_ref, spread
from gs_kernels.formats import PER_TENSOR, Granularity
from gs_kernels.observe.qparams import choose_qparams


def minmax_ref(x: Tensor, *, granularity: Granularity = PER_TENSOR) -> tuple[Tensor, Tensor]:
    rows, shape = spread(x.detach().float(), granularity)
    dims = [d for d, n in enumerate(shape) if n == 1]
    if not dims:
        return rows.clone(), rows.clone()
    return rows.amin(dims).view(-1), rows.amax(dims).view(-1)


def dynamic_fake_quant_ref(
    x: Tensor, *, qmin: int, qmax: int, symmetric: bool, granularity: Granularity = PER_TENSOR
) -> tuple[Tensor, Tensor, Tensor]:
    x_min, x_max = minmax_ref(x, granularity=granularity)
    scale, zero = choose_qparams(x_min, x_max, qmin=qmin, qmax=qmax, symmetric=symmetric)
    return fake_quant_ref(x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity), scale, zero


def observe_fake_quant_ref(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quant_ref(x, scale, zero, qmin=qmin, qmax=qmax), *minmax_ref(x)
