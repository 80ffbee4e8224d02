"""Computes products with a packed weight in the shortest torch that says it: the oracle of every implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.fake_quant.ref import inverse
from gs_kernels.observe.ref import SCALE_FLOOR, choose_qparams_ref
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.pack import dequantize_packed, unpack_codes

LEVELS = 127  # of a quantized row on either side of 0
FP8_MAX = 448.0  # the largest float8_e4m3fn


def qmatmul_ref(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    y = x.float() @ dequantize_packed(weight).T
    return ACTIVATIONS[activation].function(y if bias is None else y + bias.float()).to(x.dtype)


def quantize_rows_ref(x: Tensor, *, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    rows = x.float()
    low, high = rows.aminmax(dim=-1)
    if dtype == torch.int8:
        scale, _ = choose_qparams_ref(low, high, qmin=-LEVELS, qmax=LEVELS, symmetric=True)
    else:
        absmax = torch.maximum(-low, high)
        step = (absmax / torch.full_like(absmax, FP8_MAX)).clamp(min=SCALE_FLOOR)
        scale = torch.where(absmax == 0, 1.0, step)
    scaled = rows * inverse(scale, torch.zeros_like(scale)).unsqueeze(-1)
    if dtype == torch.int8:
        codes = torch.round(scaled).clamp(-LEVELS, LEVELS)
        return torch.where(codes.isnan(), -LEVELS, codes).to(dtype), scale
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(dtype), scale


def exact_weight(weight: PackedWeight) -> Tensor:
    """Returns `(code - zero) * scale` in fp64: integers times a scale, as good as exact."""
    codes = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout)
    zero = weight.zero.double().unsqueeze(-1) if isinstance(weight.zero, Tensor) else weight.zero
    grouped = codes.double().unflatten(1, (-1, weight.group_size)) - zero
    return (grouped * weight.scale.double().unsqueeze(-1)).flatten(1)


def code_sums_ref(weight: PackedWeight) -> Tensor:
    """Sums the codes of each group, to int32 `[N, G]`."""
    codes = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout)
    return codes.unflatten(1, (-1, weight.group_size)).sum(2, dtype=torch.int32)


def integer_sums(x: Tensor, weight: PackedWeight) -> Tensor:
    """Sums `scale * (code - zero) * x` over groups, of whole numbers x `[..., K]` in fp64, to `[..., N]` fp32.

    A group's sum is exact, rounded to fp32 once, and scaled; the sum of several is rounded once more.
    """
    codes, size = unpack_codes(weight.codes, weight.bits, weight.shape, weight.layout).double(), weight.group_size
    y = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for g, scale in enumerate(weight.scale.unbind(1)):
        zero = weight.zero[:, g, None] if isinstance(weight.zero, Tensor) else weight.zero
        sums = x[..., g * size : (g + 1) * size] @ (codes[:, g * size : (g + 1) * size] - zero).T
        y = y + sums.float() * scale.double()
    return y.float()


def qmatmul_int8_ref(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    x_zero: Tensor | None = None,
    code_sums: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    centered = x.double() if x_zero is None else x.double() - x_zero.double()
    # one scale for all is no row's: x may be a single row without an axis of rows
    y = integer_sums(centered, weight) * (x_scale.unsqueeze(-1) if x_scale.shape == x.shape[:-1] else x_scale)
    return ACTIVATIONS[activation].function(y if bias is None else y + bias.float()).to(dtype)


def qmatmul_fp8_ref(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    codes, scale = quantize_rows_ref(x, dtype=torch.float8_e4m3fn)
    return qmatmul_int8_ref(codes, scale, weight, bias, activation=activation, dtype=x.dtype)
