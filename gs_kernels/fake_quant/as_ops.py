"""Gives the references the arguments and results of the ops: what runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.ref import dequantize_ref, fake_quant_backward_ref, fake_quant_ref, quantize_ref
from gs_kernels.fake_quant.strided_rows import like
from gs_kernels.formats import granularity_of


def plain_fake_quant(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    return like(fake_quant_ref(x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity_of(axis, group)), x)


def plain_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    for_scale: bool,
    for_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    granularity = granularity_of(axis, group)
    dx, ds, dz = fake_quant_backward_ref(dy, x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity)
    return like(dx, x), ds if for_scale else scale.new_empty(0), dz if for_zero else scale.new_empty(0)


def plain_quantize(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    return like(quantize_ref(x, scale, zero, qmin=qmin, qmax=qmax, granularity=granularity_of(axis, group)), x)


def plain_dequantize(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    return like(dequantize_ref(codes, scale, zero, granularity=granularity_of(axis, group), dtype=dtype), codes)
