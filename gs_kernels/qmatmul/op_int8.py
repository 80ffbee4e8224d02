"""Quantizes rows to 8 bits, and multiplies them with a packed weight: implementations, registration, functions."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gs_kernels.pack.checks import FLOATS, check_packed, check_tensor
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.schema import PACKED_WEIGHT
from gs_kernels.qmatmul.checks import check_operands, check_row_scales
from gs_kernels.qmatmul.cpu.int8 import Int8Product, qmatmul_int8_cpu
from gs_kernels.qmatmul.cpu.quantize_rows import quantize_rows_cpu
from gs_kernels.qmatmul.op import planar_refuses
from gs_kernels.qmatmul.ref import code_sums_ref, exact_weight, qmatmul_int8_ref, quantize_rows_ref
from gs_kernels.runtime.dispatch import choose, implementations
from gs_kernels.runtime.torch_op import register


def _rows_ref(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows_ref(x, dtype=dtype)
    return codes.contiguous(), scale.contiguous()


def _int8_refuses(x: Tensor, x_scale: Tensor, weight: PackedWeight, *_: object) -> list[str]:
    return planar_refuses(x, weight)


def _int8_ref(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    x_zero: Tensor | None,
    code_sums: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return qmatmul_int8_ref(x, x_scale, weight, bias, x_zero=x_zero, activation=activation, dtype=dtype)


ROWS = implementations("quantize_rows", _rows_ref, quantize_rows_cpu)
INT8 = implementations("qmatmul_int8", _int8_ref, qmatmul_int8_cpu, _int8_refuses, Int8Product)


def _rows_fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _int8_fake(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    x_zero: Tensor | None,
    code_sums: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


_quantize = register("quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)", ROWS, _rows_fake)
# "weight_sums" stays there: files of torch.export name the arguments of ops
_run = register(
    "qmatmul_int8(Tensor x, Tensor x_scale, PackedWeight weight, Tensor? bias, Tensor? x_zero, Tensor? weight_sums,"
    " str activation, ScalarType dtype) -> Tensor",
    INT8,
    _int8_fake,
    carried=(PACKED_WEIGHT,),
)


def quantize_rows(x: Tensor, *, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Quantizes each row to 8 bits with its own scale: `codes = round(x / scale)`, `scale = max |x| / 127` (fp8: 448).

    int8 codes are -127..127, those of a symmetric dynamic fake-quant per row. One pass over x. No gradient.

    Args:
        x: `[..., K]` fp32 / fp16 / bf16, any strides.
        dtype: int8, or float8_e4m3fn for GPUs that multiply it (compute capability 8.9 and above).

    Returns:
        codes `[..., K]` of dtype, contiguous; scale `[...]` fp32: 1 for a row of zeros, NaN or Inf if x is.

    Raises:
        TypeError, ValueError: if a dtype is none of the above, or x has no rows to speak of.
    """
    if (y := _quantize.repeat(x, dtype)) is not None:
        return y
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"quantize_rows: x must be a float32 / float16 / bfloat16 tensor, got {getattr(x, 'dtype', x)}")
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"quantize_rows: dtype must be int8 or float8_e4m3fn, got {dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize_rows: x must be [..., K] with K >= 1, got {list(x.shape)}")
    return _quantize(x.detach(), dtype)


def code_sums(weight: PackedWeight) -> Tensor:
    """Sums the codes of each group to `[N, G]` int32, which products of 8-bit codes with a zero point take."""
    check_packed("code_sums", weight)
    return code_sums_ref(weight)


def row_sums(weight: PackedWeight) -> Tensor:
    """Sums each row's real values to `[N]` fp32. Deprecated: `qmatmul_int8` takes `code_sums`."""
    warnings.warn("row_sums: qmatmul_int8 now takes code_sums(weight)", DeprecationWarning, stacklevel=2)
    return exact_weight(weight).sum(1).float()


def qmatmul_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    x_zero: Tensor | None = None,
    code_sums: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    weight_sums: Tensor | None = None,
) -> Tensor:
    """`act((x - x_zero) * x_scale @ W^T + bias)` with integer codes on both sides. No gradient.

    Codes are multiplied and summed as integers, exactly, within each group of the weight; scales, bias and activation
    follow in fp32, and one cast. Zero points are part of the exact sums on a CPU and, of a weight with one group, on a
    GPU: then both give the same bits. There, of several groups, they follow in fp32.

    Args:
        x: `[..., K]` int8, e.g. of `quantize_rows`.
        x_scale: fp32, one per row of x, `x.shape[:-1]`, or `[1]` for all.
        weight: `[N, K]`, without levels.
        bias: `[N]` fp32 / fp16 / bf16.
        x_zero: `[1]` fp32 of an integer, the code that stands for 0.0; a CPU looks. None is 0.
        code_sums: `[N, G]` int32, `code_sums(weight)`, to make it once per weight: else a call with x_zero does.
        activation: `none`, `relu`, `relu6`, `hardswish`, `gelu` (exact) or `silu`.
        dtype: of the result: fp32 / fp16 / bf16.
        weight_sums: deprecated, without effect: code_sums takes its place.

    Returns:
        `[..., N]`, contiguous.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit together, the weight has levels, or activation or
            dtype is none of the above.
    """
    who = "qmatmul_int8"
    if (y := _run.repeat(x, x_scale, weight, bias, x_zero, code_sums, activation, dtype)) is not None:
        return y
    _check(who, x, x_scale, weight, bias, x_zero, activation, dtype)
    if weight_sums is not None:
        warnings.warn(f"{who}: weight_sums is no longer used; give code_sums", DeprecationWarning, stacklevel=2)
    if code_sums is not None:
        check_tensor(who, "code_sums", code_sums, (torch.int32,), tuple(weight.scale.shape))
    return _run(x, x_scale, weight, bias, x_zero, code_sums, activation, dtype)


def _check(
    who: str,
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    x_zero: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> None:
    check_operands(who, x, (torch.int8,), weight, bias, activation)
    check_row_scales(who, x, x_scale, x_zero)
    if weight.levels is not None:
        raise ValueError(f"{who}: weight must have an evenly spaced grid, got levels; use qmatmul")
    if dtype not in FLOATS:
        raise TypeError(f"{who}: dtype must be float32 / float16 / bfloat16, got {dtype}")


def prepared_qmatmul_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    *,
    x_zero: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
) -> Int8Product | None:
    """Prepares `qmatmul_int8` for all rows like x; `at(shape)` of the result is the function of rows and their scale.

    Takes and refuses what `qmatmul_int8` does. The tensors must not change while the product is used. None where the
    implementation of this device prepares nothing.
    """
    _check("qmatmul_int8", x, x_scale, weight, bias, x_zero, activation, dtype)
    prepare = choose("qmatmul_int8", INT8, x, x_scale, weight).prepare
    return prepare and prepare(weight, bias, x_zero, activation, dtype)
