"""Launchers of products with packed weights, under the names that the ops look for."""

from functools import cache, lru_cache

import torch
from torch import Tensor

from gs_kernels.activations import ACTIVATIONS
from gs_kernels.device import capabilities
from gs_kernels.dispatch import INTERPRET
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.schema import Tensors, tensors_of
from gs_kernels.qmatmul.kernel.dequant import dequantize
from gs_kernels.qmatmul.kernel.int8 import multiply_int8
from gs_kernels.qmatmul.kernel.matmul import multiply
from gs_kernels.qmatmul.kernel.rows import quantize
from gs_kernels.qmatmul.tiles import choose_int8_plan, choose_plan
from gs_kernels.runtime.torch_private import is_eager

MAX_STRIDE = 1 << 22  # offsets inside a tile of x are 32-bit


_known_plan = lru_cache(maxsize=4096)(choose_plan)


@cache
def _device(index: int) -> tuple[bool, int, int]:
    about = capabilities(index)
    return torch.version.hip is None, about.sm, about.sm_count


def device_of(x: Tensor) -> tuple[bool, int, int]:
    """Whether inline PTX runs where x is, its compute capability, and its number of processors."""
    if INTERPRET:
        return False, 90, 132
    if x.device.type == "cuda" and (is_eager(x) or torch.cuda.is_available()):
        return _device(x.device.index or 0)
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return target.backend == "cuda", target.arch if target.backend == "cuda" else 80, 132


def rows_of(x: Tensor) -> Tensor:
    """x as `[M, K]`, contiguous along K: a view if its rows are evenly spaced, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) <= MAX_STRIDE else rows.contiguous()


def grouping(k: int, group_size: int) -> int:
    """The group size that kernels know: with one group, any that covers the row."""
    return -(-k // 128) * 128 if group_size == k else group_size


def same_strides(scale: Tensor, zero_points: Tensor | None) -> Tensor | None:
    """The zero points, a copy of them if they are not laid out as the scales are."""
    if zero_points is None or zero_points.stride() == scale.stride():
        return zero_points
    return torch.empty_strided(scale.shape, scale.stride(), dtype=zero_points.dtype, device=scale.device).copy_(
        zero_points
    )


def parts_of(weight: PackedWeight) -> Tensors:
    """The tensors of a weight as kernels read them: zero points are laid out as the scales are."""
    codes, scale, zero_points, zero, levels = tensors_of(weight)
    return codes, scale, same_strides(scale, zero_points), zero, levels


def qmatmul_triton(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    rows, parts, bits, (n, k) = rows_of(x), parts_of(weight), weight.bits, weight.shape
    group = grouping(k, weight.group_size)
    asm, sm, sm_count = device_of(x)
    # sizes that are symbols cannot be hashed
    find = _known_plan if is_eager(x) else choose_plan
    plan = find(
        rows.shape[0], n, k, bits, x_bits=8 * x.itemsize, levels=weight.levels is not None, sm=sm, sm_count=sm_count
    )
    if rows.shape[0] == 0:
        y = x.new_empty(0, n)
    elif plan.dense:
        w = dequantize(parts, bits, n, k, group, x.dtype)
        y = torch.nn.functional.linear(rows, w, None if bias is None else bias.to(x.dtype))
        y = ACTIVATIONS[activation].function(y)
    else:
        y = multiply(rows, parts, bias, bits, n, k, group, activation, plan, asm)
    return y.view(*x.shape[:-1], n)


def qmatmul_dx_triton(dy: Tensor, weight: PackedWeight) -> Tensor:
    n, k = weight.shape
    return dy @ dequantize(parts_of(weight), weight.bits, n, k, grouping(k, weight.group_size), dy.dtype)


def quantize_rows_triton(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = rows_of(x)
    if rows.shape[0] == 0:
        return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    codes, scale = quantize(rows, dtype)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def qmatmul_int8_triton(
    x: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, x_zero: Tensor | None,
    weight_sums: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:
    rows, (n, k) = rows_of(x), weight.shape
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n, dtype=dtype)
    parts = parts_of(weight)
    asm, _, sm_count = device_of(x)
    group = grouping(k, weight.group_size)
    plan = choose_int8_plan(rows.shape[0], n, k, group, sm_count=sm_count)
    shift = None if x_zero is None or weight_sums is None else x_zero * weight_sums
    y = multiply_int8(
        rows, x_scale.reshape(-1), None, shift, parts, bias, weight.bits, n, k, group, activation, dtype, plan, asm
    )
    return y.view(*x.shape[:-1], n)


def qmatmul_fp8_triton(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    rows, (n, k) = rows_of(x), weight.shape
    m = rows.shape[0]
    if m == 0:
        return x.new_empty(*x.shape[:-1], n)
    parts = parts_of(weight)
    asm, _, sm_count = device_of(x)
    group = grouping(k, weight.group_size)
    plan = choose_int8_plan(m, n, k, group, sm_count=sm_count)
    sums = x.new_empty(-(-k // 128), m, dtype=torch.float32)
    x8, x_scale = quantize(rows, torch.float8_e4m3fn, sums)
    y = multiply_int8(x8, x_scale, sums, None, parts, bias, weight.bits, n, k, group, activation, x.dtype, plan, asm)
    return y.view(*x.shape[:-1], n)
