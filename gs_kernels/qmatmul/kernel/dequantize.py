"""Turns a packed weight back to real values: for products with so many rows that doing it once is cheapest."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.schema import Tensors, tensors_of
from gs_kernels.pack.triton_unpack import dequantize_block
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch

BLOCK_N, BLOCK_K = 32, 128
BYTES = {torch.float8_e8m0fnu: torch.uint8, torch.float8_e4m3fn: torch.int8}  # that 8-bit scales are read as


@triton.jit
def _dequantize_kernel(
    w_ptr,
    codes_ptr, scale_ptr, zero_ptr, levels_ptr, divisor_ptr,
    N, K, G, first_n, first_k, divided,
    stride_cb, stride_sn, stride_sg,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Dequantizes `[BLOCK_N, BLOCK_K]` of a slab `[N, K]` in fp32, by plain shifts, since the store takes longer.

    It begins at row first_n and column first_k of the weight. Codes are those of the slab, grids those of its rows.
    """
    WIDTH: tl.constexpr = BITS * BLOCK_K // 16
    block = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_N
    cols = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - row).to(tl.int32))
    words = tl.load(codes_ptr + block * stride_cb + row * WIDTH + cols[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    offs_s = (row + cols) * stride_sn
    grid = (scale_ptr, zero_ptr, levels_ptr, offs_s, stride_sg, (first_k + block * BLOCK_K).to(tl.int32), G)
    w, _ = dequantize_block(words, grid, BITS, GROUP, ZERO, tl.float32, False, True)
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr + (first_n + row + cols) // divided)
        w = tl.div_rn(w, tl.broadcast_to(divisor[:, None], w.shape))
    offs_n = row + tl.arange(0, BLOCK_N)
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(w_ptr + offs_n[:, None] * K + offs_k[None, :], w.to(w_ptr.dtype.element_ty), mask=mask)


def grouping(k: int, group_size: int) -> int:
    """Returns the group size that kernels know: with one group, any that covers the row."""
    return -(-k // 128) * 128 if group_size == k else group_size


def same_strides(scale: Tensor, zero_points: Tensor | None) -> Tensor | None:
    """Returns the zero points, copied if they are not laid out as the scales are."""
    if zero_points is None or zero_points.stride() == scale.stride():
        return zero_points
    return torch.empty_strided(scale.shape, scale.stride(), dtype=zero_points.dtype, device=scale.device).copy_(
        zero_points
    )


def kernel_tensors(weight: PackedWeight) -> Tensors:
    """Returns the tensors of a weight as kernels read them: zero points are laid out as the scales are.

    Scales of 8 bits are bytes: with a sign if they are e4m3, without if e8m0.
    """
    codes, scale, zero_points, zero, levels = tensors_of(weight)
    kind = BYTES.get(scale.dtype)
    return codes, scale if kind is None else scale.view(kind), same_strides(scale, zero_points), zero, levels


def has_table(weight: PackedWeight) -> bool:
    """Says whether kernels look values of codes up: those of 4-bit floats they compute."""
    return weight.levels is not None and weight.scale.dtype not in BYTES


def rows_a_divisor(weight: PackedWeight) -> int:
    """Returns how many rows in turn one divisor is for."""
    return weight.shape[0] // (1 if weight.divisor is None else weight.divisor.shape[0])


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Gives the real values `[N, K]` of a weight, in dtype."""
    return dequantize_slab(fresh(weight.codes.new_empty(weight.shape, dtype=dtype)), weight, 0, 0)


def dequantize_slab(w: Tensor, weight: PackedWeight, first_n: int, first_k: int) -> Tensor:
    """Writes real values of a weight, from a row and a column on, into w, contiguous, and returns it.

    Args:
        first_k: a multiple of `BLOCK_K`.
    """
    codes, scale, zero_points, zero, levels = kernel_tensors(weight)
    n, k = w.shape
    group, blocks = grouping(weight.shape[1], weight.group_size), -(-k // BLOCK_K)
    if w.shape != weight.shape:
        rows, first_block = slice(first_n, first_n + n), first_k // BLOCK_K
        codes, scale = codes[first_block : first_block + blocks, rows], scale[rows]
        zero_points = None if zero_points is None else zero_points[rows]
    launch(
        _dequantize_kernel, (blocks, -(-n // BLOCK_N)),
        w, codes, scale, zero_points, levels, weight.divisor,
        n, k, scale.shape[1], first_n, first_k, rows_a_divisor(weight), codes.stride(0), *scale.stride(),
        BITS=weight.bits, GROUP=group, ZERO=zero, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
    )
    return w
