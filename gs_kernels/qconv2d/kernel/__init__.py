"""Launches convolutions with packed weights, under the names that the ops look for."""

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.qconv2d.dense import convolve_dense, convolve_dx, empty_image
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.kernel.conv import convolve
from gs_kernels.qconv2d.kernel.depthwise import convolve_depthwise
from gs_kernels.qconv2d.kernel.int8 import convolve_int8
from gs_kernels.qconv2d.tiles import choose_plan
from gs_kernels.qmatmul.kernel import device_of
from gs_kernels.qmatmul.kernel.dequantize import dequantize, has_table
from gs_kernels.qmatmul.ref import code_sums_ref
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.triton_epilogue import can_split

NOTHING = (None, None, None, None)


def qconv2d_triton(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, geometry: ConvGeometry,
    activation: str, keep: bool,
) -> Tensor:
    n, k = weight.shape
    asm, sm, sm_count = device_of(x)
    y = fresh(empty_image(x, n, geometry, x.dtype))
    m = y.shape[0] * y.shape[2] * y.shape[3]
    if m == 0:
        return y
    if k == geometry.taps:
        convolve_depthwise(y, x, None, None, weight, bias, (residual, *NOTHING), geometry, activation)
        return y
    plan = choose_plan(
        m, n // geometry.groups, k, geometry.groups,
        channels=k // geometry.taps, x_bits=8 * x.itemsize, levels=has_table(weight), sm=sm, sm_count=sm_count,
    )
    if plan.dense:
        return convolve_dense(x, dequantize(weight, x.dtype), bias, residual, geometry, activation)
    convolve(y, x, weight, bias, residual, geometry, activation, plan, asm)
    return y


def qconv2d_dx_triton(dy: Tensor, weight: PackedWeight, geometry: ConvGeometry, h: int, w: int) -> Tensor:
    return convolve_dx(dy, dequantize(weight, dy.dtype), geometry, h, w)


def qconv2d_int8_triton(
    x: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, geometry: ConvGeometry,
    x_zero: Tensor | None, code_sums: Tensor | None,
    residual: Tensor | None, residual_scale: Tensor | None, residual_zero: Tensor | None,
    out_scale: Tensor | None, out_zero: Tensor | None,
    activation: str, dtype: torch.dtype, keep: bool,
) -> Tensor:
    n, k = weight.shape
    requant = (residual, residual_scale, residual_zero, out_scale, out_zero)
    y = fresh(empty_image(x, n, geometry, dtype if out_scale is None else torch.int8))
    m = y.shape[0] * y.shape[2] * y.shape[3]
    if m == 0:
        return y
    if k == geometry.taps:
        convolve_depthwise(y, x, x_scale, x_zero, weight, bias, requant, geometry, activation)
        return y
    asm, sm, sm_count = device_of(x)
    one = weight.scale.shape[1] == 1
    plan = choose_plan(
        m, n // geometry.groups, k, geometry.groups,
        channels=k // geometry.taps, x_bits=8, levels=False, sm=sm, sm_count=sm_count,
        int8_group=0 if one else weight.group_size, splits=can_split(weight),
    )
    sums = code_sums
    if x_zero is not None and sums is None:
        sums = code_sums_ref(weight)
    sums = None if sums is None or x_zero is None else sums.contiguous()
    convolve_int8(y, x, x_scale, x_zero, sums, weight, bias, requant, geometry, activation, plan, asm)
    return y
