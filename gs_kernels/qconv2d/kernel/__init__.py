"""Launchers of convolutions with packed weights, under the names that the ops look for."""

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.qconv2d.dense import convolve_dense, convolve_dx, empty_image
from gs_kernels.qconv2d.kernel.conv import convolve
from gs_kernels.qconv2d.kernel.depthwise import convolve_depthwise
from gs_kernels.qconv2d.kernel.int8 import can_split, convolve_int8
from gs_kernels.qconv2d.ref import code_sums_ref
from gs_kernels.qconv2d.tiles import choose_plan
from gs_kernels.qconv2d.window import Window
from gs_kernels.qmatmul.kernel import device_of, grouping, parts_of
from gs_kernels.qmatmul.kernel.dequant import dequantize

NOTHING = (None, None, None, None)


def qconv2d_triton(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, window: Window, activation: str,
    keep: bool,
) -> Tensor:
    parts, bits, (n, k) = parts_of(weight), weight.bits, weight.shape
    group = grouping(k, weight.group_size)
    asm, sm, sm_count = device_of(x)
    y = empty_image(x, n, window, x.dtype)
    m = y.shape[0] * y.shape[2] * y.shape[3]
    if m == 0:
        return y
    if k == window.taps:
        convolve_depthwise(y, x, None, None, parts, bias, (residual, *NOTHING), bits, k, window, activation)
        return y
    plan = choose_plan(
        m, n // window.groups, k, window.groups,
        channels=k // window.taps, x_bits=8 * x.itemsize, levels=weight.levels is not None, sm=sm, sm_count=sm_count,
    )
    if plan.dense:
        return convolve_dense(x, dequantize(parts, bits, n, k, group, x.dtype), bias, residual, window, activation)
    convolve(y, x, parts, bias, residual, bits, k, group, window, activation, plan, asm)
    return y


def qconv2d_dx_triton(dy: Tensor, weight: PackedWeight, window: Window, h: int, w: int) -> Tensor:
    n, k = weight.shape
    dense = dequantize(parts_of(weight), weight.bits, n, k, grouping(k, weight.group_size), dy.dtype)
    return convolve_dx(dy, dense, window, h, w)


def qconv2d_int8_triton(
    x: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, window: Window,
    x_zero: Tensor | None, weight_sums: Tensor | None,
    residual: Tensor | None, residual_scale: Tensor | None, residual_zero: Tensor | None,
    out_scale: Tensor | None, out_zero: Tensor | None,
    activation: str, dtype: torch.dtype, keep: bool,
) -> Tensor:
    parts, bits, (n, k) = parts_of(weight), weight.bits, weight.shape
    into = (residual, residual_scale, residual_zero, out_scale, out_zero)
    y = empty_image(x, n, window, dtype if out_scale is None else torch.int8)
    m = y.shape[0] * y.shape[2] * y.shape[3]
    if m == 0:
        return y
    if k == window.taps:
        convolve_depthwise(y, x, x_scale, x_zero, parts, bias, into, bits, k, window, activation)
        return y
    asm, sm, sm_count = device_of(x)
    _, scale, zero_points, zero, _ = parts
    one = scale.shape[1] == 1
    plan = choose_plan(
        m, n // window.groups, k, window.groups,
        channels=k // window.taps, x_bits=8, levels=False, sm=sm, sm_count=sm_count,
        int8_group=0 if one else weight.group_size, splits=can_split(scale, zero_points, zero),
    )
    sums = weight_sums
    if x_zero is not None and sums is None:
        sums = code_sums_ref(weight)
    sums = None if sums is None or x_zero is None else sums.contiguous()
    group = grouping(k, weight.group_size)
    convolve_int8(y, x, x_scale, x_zero, sums, parts, bias, into, bits, k, group, window, activation, plan, asm)
    return y
