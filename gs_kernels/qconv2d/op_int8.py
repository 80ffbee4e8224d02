"""Convolves images of 8-bit codes with a packed weight: implementations, registration, public functions."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.schema import PACKED_WEIGHT
from gs_kernels.qconv2d.checks import check_int8, check_operands
from gs_kernels.qconv2d.cpu.int8 import Int8Convolution, qconv2d_int8_cpu
from gs_kernels.qconv2d.dense import empty_image
from gs_kernels.qconv2d.geometry import GEOMETRY, ConvGeometry, Padding, Pair, make_geometry
from gs_kernels.qconv2d.op import conv_refuses
from gs_kernels.qconv2d.ref import convolve_int8_ref, requant_params
from gs_kernels.runtime.dispatch import choose, implementations
from gs_kernels.runtime.torch_op import register


def _int8_refuses(x: Tensor, x_scale: Tensor, weight: PackedWeight, *rest: object) -> list[str]:
    return conv_refuses(x, weight, *rest)


def _int8_ref(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    x_zero: Tensor | None,
    code_sums: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    requant = requant_params(residual, residual_scale, residual_zero, out_scale, out_zero)
    return convolve_int8_ref(x, x_scale, x_zero, weight, bias, requant, geometry, activation, dtype)


INT8 = implementations("qconv2d_int8", _int8_ref, qconv2d_int8_cpu, _int8_refuses, Int8Convolution)


def _int8_fake(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    x_zero: Tensor | None,
    code_sums: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    return empty_image(x, weight.shape[0], geometry, dtype if out_scale is None else torch.int8)


# "weight_sums" stays there: files of torch.export name the arguments of ops
_run = register(
    "qconv2d_int8(Tensor x, Tensor x_scale, PackedWeight weight, Tensor? bias, ConvGeometry geometry, Tensor? x_zero,"
    " Tensor? weight_sums, Tensor? residual, Tensor? residual_scale, Tensor? residual_zero, Tensor? out_scale,"
    " Tensor? out_zero, str activation, ScalarType dtype, bool keep) -> Tensor",
    INT8,
    _int8_fake,
    carried=(PACKED_WEIGHT, GEOMETRY),
)


def prepared_qconv2d_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    x_zero: Tensor | None,
    activation: str,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    out_limits: tuple[int, int] = (-128, 127),
    dtype: torch.dtype,
) -> Int8Convolution | None:
    """Prepares `qconv2d_int8(x, ...)` for many images like x: checks all but image and residual once.

    `at(shape, dtype of residuals)` of the result is the function of images; nothing looks at their shapes, and at
    changes of the other tensors, any more. out_limits: the least and largest code of a grid that has fewer than int8.
    None where the implementation of this device prepares nothing.
    """
    who = "prepared_qconv2d_int8"
    geometry = make_geometry(who, kernel_size, stride, padding, dilation, groups)
    shape = check_operands(who, x, (torch.int8,), weight, bias, activation, geometry)
    tensors: dict[str, Tensor | None] = {"x_zero": x_zero, "out_scale": out_scale, "out_zero": out_zero}
    tensors |= dict.fromkeys(("residual", "residual_scale", "residual_zero", "code_sums"))
    check_int8(who, x, x_scale, weight, dtype, shape, tensors)
    prepare = choose("qconv2d_int8", INT8, x, x_scale, weight).prepare
    out = requant_params(None, None, None, out_scale, out_zero)[3:]
    try:
        return prepare and prepare(
            weight, geometry, x_scale, x_zero, bias, out, activation, dtype, keep=True, limits=out_limits
        )
    except UnsuitableError:
        return None


def qconv2d_int8(
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
    keep_dense: bool = False,
    weight_sums: Tensor | None = None,
) -> Tensor:
    """`act(conv2d((x - x_zero) * x_scale, W) + bias + residual)` with integer codes on both sides. No gradient.

    Codes are multiplied and summed as integers, exactly, within each group of the weight; the rest follows in fp32 in a
    fixed order: scale of the weight, x_scale, bias, residual, activation, and one cast or, with out_scale, the codes
    `clamp(round(y / out_scale) + out_zero, -128, 127)`, rounded as `quantize` does: layers follow each other without
    floats in between. Padding is with x_zero: with real zeros.
    Codes 0..255 of an unsigned grid are given 128 lower, and so is their zero point; they come out that way too.

    Args:
        x: `[B, C, H, W]` int8, any strides; see `qconv2d`, also for those that are not named here. A CPU copies what is
            not channels-last: a byte an element.
        x_scale: `[1]` fp32.
        weight: `[O, K]`, without levels, groups of at most 16384 elements.
        x_zero: `[1]` fp32 of an integer in -128..127, the code that stands for 0.0; a CPU looks. None is 0.
        code_sums: `[O, G]` int32, `code_sums(weight)`, to make it once per weight: else a call with x_zero does.
        residual: the shape of y: fp32 / fp16 / bf16, or int8 with residual_scale.
        residual_scale: `[1]` fp32.
        residual_zero: `[1]` fp32. None is 0.
        out_scale: `[1]` fp32 of an int8 result.
        out_zero: `[1]` fp32. None is 0.
        dtype: of the result without out_scale: fp32 / fp16 / bf16.
        weight_sums: deprecated, the old name of code_sums.

    Returns:
        `[B, O, P, Q]`, int8 with out_scale, else dtype, channels-last.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or an argument is none of the above.
    """
    who = "qconv2d_int8"
    if weight_sums is not None:
        warnings.warn(f"{who}: weight_sums is now code_sums", DeprecationWarning, stacklevel=2)
        if code_sums is not None:
            raise TypeError(f"{who}: one of code_sums and weight_sums must be given, got both; use code_sums")
        code_sums = weight_sums
    geometry = make_geometry(who, kernel_size, stride, padding, dilation, groups)
    requant = {"residual": residual, "residual_scale": residual_scale, "residual_zero": residual_zero}
    requant |= {"out_scale": out_scale, "out_zero": out_zero}
    args = (x, x_scale, weight, bias, geometry, x_zero, code_sums, *requant.values(), activation, dtype, keep_dense)
    if (y := _run.repeat(*args)) is not None:
        return y
    shape = check_operands(who, x, (torch.int8,), weight, bias, activation, geometry)
    check_int8(who, x, x_scale, weight, dtype, shape, {"x_zero": x_zero, "code_sums": code_sums, **requant})
    return _run(*args)
