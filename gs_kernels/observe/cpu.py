"""Measures ranges on the CPU, alone or in the pass of fake-quant."""

from __future__ import annotations

from torch import Tensor

from gs_kernels.fake_quant.cpu import fake_quant_cpu, fake_quant_with_range, range_cpu
from gs_kernels.formats import granularity_of
from gs_kernels.observe.qparams import choose_qparams
from gs_kernels.observe.ref import minmax_ref


def minmax_cpu(x: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor]:
    return range_cpu(x, axis, group) or minmax_ref(x, granularity=granularity_of(axis, group))


def dynamic_fake_quant_cpu(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = choose_qparams(*minmax_cpu(x, axis, group), qmin=qmin, qmax=qmax, symmetric=symmetric)
    return fake_quant_cpu(x, scale, zero, qmin, qmax, axis, group), scale, zero


def observe_fake_quant_cpu(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    in_one_pass = fake_quant_with_range(x, scale, zero, qmin, qmax)
    return in_one_pass or (fake_quant_cpu(x, scale, zero, qmin, qmax, -1, 0), *minmax_cpu(x, -1, 0))
