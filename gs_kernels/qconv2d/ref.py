"""Computes convolutions with a packed weight in the shortest torch that says it: the oracle of every other.

`W [O, K]` has its K in the order (R, S, C / groups), channels fastest.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.fake_quant.ref import inverse
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed, unpack_codes
from gs_kernels.qconv2d.geometry import ConvGeometry, Padding, Pair, make_geometry

# residual, its scale and zero point; inverse of the scale of the result, its zero point: whole steps, and the rest
RequantParams: TypeAlias = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def im2col(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Copies the inputs of each pixel of y side by side: `[B, groups, K, P * Q]`, in the order of a row of W."""
    x = pad(x, geometry.sides)
    patches = unfold(x, (geometry.r, geometry.s), geometry.dilation, 0, geometry.stride)
    return patches.view(x.shape[0], geometry.groups, -1, geometry.taps, patches.shape[2]).transpose(2, 3).flatten(2, 3)


def _multiply(w: Tensor, patches: Tensor) -> Tensor:
    """Multiplies w `[O, K]` with patches as `im2col` gives them: `[B, O, P * Q]`."""
    return (w.view(patches.shape[1], -1, w.shape[1]) @ patches).flatten(1, 2)


def _image(y: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    return y.unflatten(2, geometry.output(*x.shape[2:])).contiguous(memory_format=torch.channels_last)


def qconv2d_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    geometry = make_geometry("qconv2d_ref", kernel_size, stride, padding, dilation, groups)
    y = _image(_multiply(dequantize_packed(weight), im2col(x.float(), geometry)), x, geometry)
    y = y if bias is None else y + bias.float().view(-1, 1, 1)
    y = y if residual is None else y + residual.float()
    return ACTIVATIONS[activation].function(y).to(x.dtype)


def integer_sums(x: Tensor, x_zero: Tensor | None, weight: PackedWeight, geometry: ConvGeometry) -> Tensor:
    """Returns `[B, O, P, Q]` fp32: the sum over groups of `scale * sum((code - zero) * (x - x_zero))`, each sum exact.

    fp64 holds every integer and half that can occur, so that products and sums are those of int64. A group's sum is
    rounded to fp32 once; zero points go in before, to half steps, and what is left of them after. Groups add in order.
    """
    centered = x.double() if x_zero is None else x.double() - x_zero.double()
    patches = im2col(centered, geometry)
    codes = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout).double()
    zero = (
        weight.zero.float() if isinstance(weight.zero, Tensor) else torch.full_like(weight.scale.float(), weight.zero)
    )
    near, size = torch.round(2 * zero) / 2, weight.group_size
    y = torch.zeros(x.shape[0], weight.shape[0], patches.shape[3], dtype=torch.float32, device=x.device)
    for g in range(weight.scale.shape[1]):
        part = patches[:, :, g * size : (g + 1) * size]
        sums = _multiply(codes[:, g * size : (g + 1) * size] - near[:, g, None].double(), part).float()
        fraction = (zero - near)[:, g, None]
        x_sums = part.sum(2).float().repeat_interleave(weight.shape[0] // geometry.groups, 1)  # [B, O, P * Q]
        y = y + (sums - fraction * x_sums) * weight.scale[:, g, None].float()
    return _image(y, x, geometry)


def requant_params(
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
) -> RequantParams:
    """Turns residual and output grid of the op into what `int8_epilogue` needs."""
    if out_scale is None:
        return residual, residual_scale, residual_zero, None, None, None
    zero = torch.zeros_like(out_scale) if out_zero is None else out_zero
    whole = torch.round(zero)
    return residual, residual_scale, residual_zero, inverse(out_scale, zero), whole, zero - whole


def int8_epilogue(
    y: Tensor, x_scale: Tensor, bias: Tensor | None, requant: RequantParams, activation: str, dtype: torch.dtype
) -> Tensor:
    """Makes the result of the sums of `integer_sums`, `[..., O]`: everything in fp32, in this order.

    Codes are those of `quantize_ref`, in a form that compilers keep in registers.
    """
    residual, residual_scale, residual_zero, out_inverse, out_whole, out_fraction = requant
    y = y * x_scale
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        real = residual.float()
        if residual_scale is not None:
            real = (real if residual_zero is None else real - residual_zero) * residual_scale
        y = y + real
    y = ACTIVATIONS[activation].function(y)
    if out_inverse is None or out_whole is None or out_fraction is None:
        return y.to(dtype)
    level = torch.round(y * out_inverse + out_fraction) + out_whole
    return torch.where(level >= -128, level, -128.0).clamp(max=127).to(torch.int8)  # also of NaN


def convolve_int8_ref(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: PackedWeight,
    bias: Tensor | None,
    requant: RequantParams,
    geometry: ConvGeometry,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    y = integer_sums(x, x_zero, weight, geometry).permute(0, 2, 3, 1)
    rows = (None if requant[0] is None else requant[0].permute(0, 2, 3, 1), *requant[1:])
    return int8_epilogue(y, x_scale, bias, rows, activation, dtype).contiguous().permute(0, 3, 1, 2)


def qconv2d_int8_ref(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    x_zero: Tensor | None = None,
    code_sums: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    geometry = make_geometry("qconv2d_int8_ref", kernel_size, stride, padding, dilation, groups)
    requant = requant_params(residual, residual_scale, residual_zero, out_scale, out_zero)
    return convolve_int8_ref(x, x_scale, x_zero, weight, bias, requant, geometry, activation, dtype)
