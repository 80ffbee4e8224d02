"""Rounds columns in turn on a GPU: a program keeps all columns of its rows in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import clamp, round_half_even

ROWS = 8  # of a program, which is one warp: a sum over columns then needs no other, and 4,096 rows fill the processors


@triton.jit
def _gptq_block_kernel(
    change_ptr,
    values_ptr, start_ptr, factor_ptr, scale_ptr, zero_ptr,
    columns, groups, N, tiles,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    group = pid // tiles
    offs_n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < N
    offs_c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    row = group * N + offs_n  # of one column
    step = tl.cast(groups, tl.int64) * N  # to the next column
    mask = (offs_c < columns)[:, None] & mask_n[None, :]
    values = tl.load(values_ptr + (offs_c * step)[:, None] + row[None, :], mask=mask, other=0.0)  # [BLOCK_C, BLOCK_N]
    factor_ptr += group * columns * columns

    for j in range(columns):
        behind = (offs_c > j) & (offs_c < columns)
        worth = tl.load(factor_ptr + offs_c, mask=behind, other=0.0)  # [BLOCK_C]
        scale = tl.load(scale_ptr + row, mask=mask_n, other=0.0)
        start = tl.load(start_ptr + row, mask=mask_n, other=0.0)
        v = tl.sum(tl.where((offs_c == j)[:, None], values, 0.0), 0)  # [BLOCK_N]
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale == 0.0, 1.0, scale))
        v *= tl.where(scale == 0.0, 0.0, inverse)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + row, mask=mask_n, other=0.0)
            v = round_half_even(clamp(v + zero, QMIN, QMAX)) - zero
        else:
            v = round_half_even(clamp(v, QMIN, QMAX))
        change = v * scale - start
        tl.store(change_ptr + row, change, mask=mask_n)
        values -= worth[:, None] * change[None, :]
        factor_ptr += columns
        row += step


def gptq_block_triton(
    values: Tensor, start: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    change = fresh(torch.empty_like(values))
    columns, groups, n = values.shape
    if not n or not groups:
        return change
    tiles = triton.cdiv(n, ROWS)
    launch(
        _gptq_block_kernel, (groups * tiles,),
        change, values, start, factor, scale, zero, columns, groups, n, tiles,
        QMIN=int(qmin), QMAX=int(qmax), BLOCK_C=power_of_two(max(columns, 16), 128), BLOCK_N=ROWS, num_warps=1,
    )
    return change
