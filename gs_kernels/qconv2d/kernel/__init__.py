"""Launchers of convolutions with packed weights, under the names that the ops look for."""

import torch
from torch import Tensor

from gs_kernels.qconv2d.dense import convolve_dense, convolve_dx, empty_image
from gs_kernels.qconv2d.kernel.conv import convolve
from gs_kernels.qconv2d.kernel.depthwise import convolve_depthwise
from gs_kernels.qconv2d.kernel.int8 import can_split, convolve_int8
from gs_kernels.qconv2d.ref import code_sums_ref
from gs_kernels.qconv2d.tiles import choose_plan
from gs_kernels.qconv2d.window import Window
from gs_kernels.qmatmul.flat import packed
from gs_kernels.qmatmul.kernel import device_of, grouping, same_strides
from gs_kernels.qmatmul.kernel.dequant import dequantize

NOTHING = (None, None, None, None)


def qconv2d_triton(
    x: Tensor, codes: Tensor, scale: Tensor, zero_points: Tensor | None, zero: float, levels: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, bits: int, n: int, k: int, group_size: int, layout: str,
    window: list[int], activation: str, keep: bool,
) -> Tensor:
    about = Window(*window)
    parts = (codes, scale, same_strides(scale, zero_points), zero, levels)
    group = grouping(k, group_size)
    asm, sm, sm_count = device_of(x)
    y = empty_image(x, n, about, x.dtype)
    m = y.shape[0] * y.shape[2] * y.shape[3]
    if m == 0:
        return y
    if k == about.taps:
        convolve_depthwise(y, x, None, None, parts, bias, (residual, *NOTHING), bits, k, about, activation)
        return y
    plan = choose_plan(
        m, n // about.groups, k, about.groups,
        channels=k // about.taps, x_bits=8 * x.itemsize, levels=levels is not None, sm=sm, sm_count=sm_count,
    )
    if plan.dense:
        return convolve_dense(x, dequantize(parts, bits, n, k, group, x.dtype), bias, residual, about, activation)
    convolve(y, x, parts, bias, residual, bits, k, group, about, activation, plan, asm)
    return y


def qconv2d_dx_triton(
    dy: Tensor, codes: Tensor, scale: Tensor, zero_points: Tensor | None, zero: float, levels: Tensor | None,
    bits: int, n: int, k: int, group_size: int, layout: str, window: list[int], h: int, w: int,
) -> Tensor:
    parts = (codes, scale, same_strides(scale, zero_points), zero, levels)
    dense = dequantize(parts, bits, n, k, grouping(k, group_size), dy.dtype)
    return convolve_dx(dy, dense, Window(*window), h, w)


def qconv2d_int8_triton(
    x: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight_sums: Tensor | None,
    codes: Tensor, scale: Tensor, zero_points: Tensor | None, zero: float, levels: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, residual_scale: Tensor | None, residual_zero: Tensor | None,
    out_scale: Tensor | None, out_zero: Tensor | None,
    bits: int, n: int, k: int, group_size: int, layout: str, window: list[int], activation: str, dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    about = Window(*window)
    parts = (codes, scale, same_strides(scale, zero_points), zero, levels)
    into = (residual, residual_scale, residual_zero, out_scale, out_zero)
    y = empty_image(x, n, about, dtype if out_scale is None else torch.int8)
    m = y.shape[0] * y.shape[2] * y.shape[3]
    if m == 0:
        return y
    if k == about.taps:
        convolve_depthwise(y, x, x_scale, x_zero, parts, bias, into, bits, k, about, activation)
        return y
    asm, sm, sm_count = device_of(x)
    one = scale.shape[1] == 1
    plan = choose_plan(
        m, n // about.groups, k, about.groups,
        channels=k // about.taps, x_bits=8, levels=False, sm=sm, sm_count=sm_count, int8_group=0 if one else group_size,
        splits=can_split(scale, zero_points, zero),
    )
    sums = weight_sums
    if x_zero is not None and sums is None:
        sums = code_sums_ref(packed(codes, scale, zero_points, zero, levels, bits, n, k, group_size, layout))
    sums = None if sums is None or x_zero is None else sums.contiguous()
    group = grouping(k, group_size)
    convolve_int8(y, x, x_scale, x_zero, sums, parts, bias, into, bits, k, group, about, activation, plan, asm)
    return y
