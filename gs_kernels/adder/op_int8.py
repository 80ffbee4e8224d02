"""L1 products of 8-bit codes: implementations, registration, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.adder.checks import check_conv, check_epilogue
from gs_kernels.adder.cpu.int8 import Int8Adder, adder_int8_cpu, whole_zero
from gs_kernels.adder.unfolded import int8_by_operations
from gs_kernels.pack.derived import UnsuitableError
from gs_kernels.qconv2d.dense import empty_image
from gs_kernels.qconv2d.geometry import GEOMETRY, ConvGeometry, Padding, Pair
from gs_kernels.qconv2d.ref import requant_params
from gs_kernels.runtime.dispatch import implementations, takes_cpu
from gs_kernels.runtime.torch_op import register

WHO = "adder_int8"


def _ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    zero: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    requant = requant_params(residual, residual_scale, residual_zero, out_scale, out_zero)
    return int8_by_operations(x, weight, scale, bias, geometry, zero, requant, activation, dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    zero: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    made = torch.int32 if scale is None else dtype if out_scale is None else torch.int8
    return empty_image(x, weight.shape[0], geometry, made)


ADDER_INT8 = implementations("adder_int8", _ref, adder_int8_cpu)
_run = register(
    "adder_int8(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, ConvGeometry geometry, Tensor? zero,"
    " Tensor? residual, Tensor? residual_scale, Tensor? residual_zero, Tensor? out_scale, Tensor? out_zero,"
    " str activation, ScalarType dtype) -> Tensor",
    ADDER_INT8,
    _fake,
    carried=(GEOMETRY,),
)


def prepared_adder_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    zero: Tensor | None,
    activation: str,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    dtype: torch.dtype,
) -> Int8Adder | None:
    """Prepares `adder_int8(x, ...)` for many images like x: checks all but image and residual once.

    The weight is arranged once too. The result is the function of images, of any sizes, and of a residual, its scale
    and zero point; nothing looks at changes of the other tensors any more. None where the implementation of this device
    prepares nothing.
    """
    who = "prepared_adder_int8"
    geometry = check_conv(who, x, weight, (torch.int8,), stride, padding, dilation)
    tensors = {"scale": scale, "bias": bias, "zero": zero, "out_scale": out_scale, "out_zero": out_zero}
    tensors |= dict.fromkeys(("residual", "residual_scale", "residual_zero"))
    check_epilogue(who, x, weight, geometry, activation, dtype, tensors)
    if not takes_cpu(x):
        return None
    out = requant_params(None, None, None, out_scale, out_zero)[3:]
    try:
        return Int8Adder(weight, geometry, scale, bias, whole_zero(zero), out, activation, dtype)
    except UnsuitableError:
        return None


def adder_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    zero: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compares images of 8-bit codes with filters of codes: `-sum |x - w|` exactly, then scaled. No gradient.

    x and weight are codes of one grid: its scale leaves the sum, its zero point the differences. Without scale y is the
    sums. With one it is `act(scale * sums + bias + residual)` in fp32, in that order, and one cast or, with out_scale,
    the codes `clamp(round(y / out_scale) + out_zero, -128, 127)`, rounded as `quantize` does. A batch norm behind the
    product goes into scale and bias, of a channel each. Codes 0..255 of an unsigned grid are given 128 lower.

    Args:
        x: `[B, C, H, W]` int8, any strides; channels-last is read fastest, and a CPU copies what is not.
        weight: `[O, C, R, S]` int8, K = C * R * S at most 8421504.
        scale: `[1]` or `[O]` fp32: of the grid, times what a batch norm multiplies by.
        bias: `[O]` fp32 / fp16 / bf16.
        stride, padding, dilation: see `adder_conv2d`.
        zero: `[1]` fp32 of an integer in -128..127, the code that stands for 0.0: what padding is. None is 0.
        activation: `none`, `relu`, `relu6`, `hardswish`, `gelu` (exact) or `silu`.
        residual: the shape of y: fp32 / fp16 / bf16, or int8 with residual_scale.
        residual_scale: `[1]` fp32.
        residual_zero: `[1]` fp32. None is 0.
        out_scale: `[1]` fp32 of an int8 result.
        out_zero: `[1]` fp32. None is 0.
        dtype: of the result with scale and without out_scale: fp32 / fp16 / bf16.

    Returns:
        `[B, O, P, Q]`, int32 without scale, int8 with out_scale, else dtype; channels-last.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, or an argument is none of the above.
    """
    geometry = check_conv(WHO, x, weight, (torch.int8,), stride, padding, dilation)
    requant = {"residual": residual, "residual_scale": residual_scale, "residual_zero": residual_zero}
    requant |= {"out_scale": out_scale, "out_zero": out_zero}
    tensors = {"scale": scale, "bias": bias, "zero": zero, **requant}
    check_epilogue(WHO, x, weight, geometry, activation, dtype, tensors)
    return _run(x, weight, scale, bias, geometry, zero, *requant.values(), activation, dtype)  # type: ignore[no-any-return]
