"""Launches products with packed weights, under the names that the ops look for."""

from functools import cache

import torch
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import code_middle
from gs_kernels.qmatmul.kernel.dense import multiply_dense, multiply_dense_dx
from gs_kernels.qmatmul.kernel.dequantize import grouping, has_table
from gs_kernels.qmatmul.kernel.int8 import multiply_int8
from gs_kernels.qmatmul.kernel.matmul import multiply
from gs_kernels.qmatmul.kernel.quantize_rows import quantize
from gs_kernels.qmatmul.ref import code_sums_ref
from gs_kernels.qmatmul.tiles import choose_int8_plan, choose_plan
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.device import AMD_SM, capabilities
from gs_kernels.runtime.dispatch import INTERPRET
from gs_kernels.runtime.torch_private import is_eager
from gs_kernels.tuning.gpu_specs import assumed_card

MAX_STRIDE = 1 << 22  # offsets inside a tile of x are 32-bit


@cache
def _device(index: int) -> tuple[bool, int, int]:
    gpu = capabilities(index)
    return torch.version.hip is None, gpu.sm, gpu.sm_count


def device_of(x: Tensor) -> tuple[bool, int, int]:
    """Returns whether inline PTX runs where x is, its compute capability, and its number of processors."""
    if INTERPRET:
        return False, 90, 132
    if x.device.type == "cuda" and (is_eager(x) or torch.cuda.is_available()):
        return _device(x.device.index or 0)
    from triton.runtime import driver

    target = driver.active.get_current_target()
    card = assumed_card()
    sm_count = 132 if card is None else card.sm_count
    return target.backend == "cuda", target.arch if target.backend == "cuda" else AMD_SM, sm_count


def rows_of(x: Tensor) -> Tensor:
    """Reshapes x to `[M, K]`, contiguous along K: a view if its rows are evenly spaced, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) <= MAX_STRIDE else rows.contiguous()


def qmatmul_triton(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    rows, (n, k) = rows_of(x), weight.shape
    asm, sm, sm_count = device_of(x)
    symmetric = not isinstance(weight.zero, Tensor) and weight.zero == code_middle(weight.bits)
    plan = choose_plan(
        rows.shape[0], n, k, weight.bits,
        x_bits=8 * x.itemsize, levels=has_table(weight), symmetric=symmetric, sm=sm, sm_count=sm_count,
    )
    if rows.shape[0] == 0:
        y = x.new_empty(0, n)
    elif plan.dense:
        y = multiply_dense(rows, weight, bias, activation)
    else:
        y = multiply(rows, weight, bias, activation, plan, asm)
    return y.view(*x.shape[:-1], n)


def qmatmul_dx_triton(dy: Tensor, weight: PackedWeight) -> Tensor:
    return multiply_dense_dx(dy, weight)


def quantize_rows_triton(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = rows_of(x)
    if rows.shape[0] == 0:
        return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    codes, scale = quantize(rows, dtype)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def qmatmul_int8_triton(
    x: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, x_zero: Tensor | None,
    code_sums: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:
    rows, (n, k) = rows_of(x), weight.shape
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n, dtype=dtype)
    asm, sm, sm_count = device_of(x)
    group = grouping(k, weight.group_size)
    points = isinstance(weight.zero, Tensor)
    plan = choose_int8_plan(
        rows.shape[0], n, k, weight.bits, group, points=points, fp8=False, sm=sm, sm_count=sm_count
    )
    x_grid = None
    if x_zero is not None:
        if code_sums is None or code_sums.dtype != torch.int32:  # older exported programs have sums of floats
            code_sums = code_sums_ref(weight)
        x_grid = x_zero, code_sums.contiguous()
    y = multiply_int8(rows, x_scale.reshape(-1), None, x_grid, weight, bias, activation, dtype, plan, asm)
    return y.view(*x.shape[:-1], n)


def qmatmul_fp8_triton(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    rows, (n, k) = rows_of(x), weight.shape
    m = rows.shape[0]
    if m == 0:
        return x.new_empty(*x.shape[:-1], n)
    asm, sm, sm_count = device_of(x)
    group = grouping(k, weight.group_size)
    points = isinstance(weight.zero, Tensor)
    plan = choose_int8_plan(m, n, k, weight.bits, group, points=points, fp8=True, sm=sm, sm_count=sm_count)
    sums = fresh(x.new_empty(-(-k // 128), m, dtype=torch.float32))
    x8, x_scale = quantize(rows, torch.float8_e4m3fn, sums)
    y = multiply_int8(x8, x_scale, sums, None, weight, bias, activation, x.dtype, plan, asm)
    return y.view(*x.shape[:-1], n)
