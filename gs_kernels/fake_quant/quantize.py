"""Turns real values into integer codes and back: implementations, registration, the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.fake_quant.as_ops import plain_dequantize, plain_quantize
from gs_kernels.fake_quant.checks import check_codes, check_granularity, check_input, check_qparams, check_values
from gs_kernels.fake_quant.cpu import dequantize_cpu, quantize_cpu
from gs_kernels.formats import PER_TENSOR, Granularity
from gs_kernels.runtime.dispatch import implementations
from gs_kernels.runtime.torch_op import register
from gs_kernels.runtime.torch_private import is_eager

QUANTIZE = implementations("quantize", plain_quantize, quantize_cpu)
DEQUANTIZE = implementations("dequantize", plain_dequantize, dequantize_cpu)


def _quantize_fake(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, *_: object) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8 if qmin < 0 else torch.uint8)


def _dequantize_fake(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


_quantize = register(
    "quantize(Tensor x, Tensor scale, Tensor zero, int qmin, int qmax, int axis, int group) -> Tensor",
    QUANTIZE,
    _quantize_fake,
)
_dequantize = register(
    "dequantize(Tensor codes, Tensor scale, Tensor zero, int axis, int group, ScalarType dtype) -> Tensor",
    DEQUANTIZE,
    _dequantize_fake,
)


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor, *, qmin: int, qmax: int, granularity: Granularity = PER_TENSOR
) -> Tensor:
    """Returns the integer codes of x: `clamp(round(x / s) + z, qmin, qmax)`, rounded as `fake_quant` does. No gradient.

    NaN has no code: it becomes qmin.

    Args:
        x: `[...]`, fp32 / fp16 / bf16, as for `fake_quant`.
        scale: `[C]` fp32, as for `fake_quant`.
        zero: `[C]` fp32, as for `fake_quant`.
        qmin: smallest level, >= -128, or >= 0 for uint8 codes.
        qmax: largest level, <= 127, or <= 255 for uint8 codes.
        granularity: which elements share a scale.

    Returns:
        shape and strides of x, int8 if qmin < 0 else uint8.

    Raises:
        ValueError, TypeError: as `fake_quant`, and if the levels do not fit the codes.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. (1).
    """
    check_input("quantize", x)
    check_codes("quantize", qmin, qmax)
    axis, group, channels = check_granularity("quantize", x, granularity)
    check_qparams("quantize", x, scale, zero, channels)
    if scale.device.type == "cpu" and is_eager(x, scale, zero):
        check_values("quantize", scale, zero)
    return _quantize(x.detach(), scale.detach(), zero.detach(), qmin, qmax, axis, group)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the real values of codes: `(q - z) * s`. No gradient.

    Args:
        codes: `[...]`, int8 or uint8.
        scale: `[C]` fp32, as for `fake_quant`.
        zero: `[C]` fp32, as for `fake_quant`.
        granularity: which elements share a scale.
        dtype: of the result: fp32 / fp16 / bf16.

    Returns:
        shape and strides of codes.

    Raises:
        ValueError, TypeError: as `fake_quant`.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. (1).
    """
    check_input("dequantize", codes, (torch.int8, torch.uint8))
    axis, group, channels = check_granularity("dequantize", codes, granularity)
    check_qparams("dequantize", codes, scale, zero, channels)
    return _dequantize(codes, scale.detach(), zero.detach(), axis, group, dtype)
