"""Multiplies 8-bit rows with a packed weight: sums of integers, scaled once a group."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import code_block, code_factor, code_middle, load_grid
from gs_kernels.qmatmul.checks import sums_fit
from gs_kernels.qmatmul.kernel.dequantize import grouping, kernel_tensors
from gs_kernels.qmatmul.kernel.shares import add_parts, make_parts, part_of, share_of, store_part, store_tile
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import can_split, is_whole, real_sums, twice


@triton.jit
def _add_group(
    acc, part, x_sums, scale_ptr, zero_ptr, offs,
    ZERO: tl.constexpr, MIDDLE: tl.constexpr, FACTOR: tl.constexpr, CENTRED: tl.constexpr,
):
    """Returns acc + scale * (part / factor + (middle - zero) * sum of x): part holds `(code - middle) * factor * x`."""
    scale, zero = load_grid(scale_ptr, zero_ptr, offs, ZERO)
    part = part.to(tl.float32)
    if not CENTRED:
        part += ((MIDDLE - zero) * FACTOR)[:, None] * x_sums.to(tl.float32)[None, :]
    return tl.fma(part, tl.broadcast_to((scale * (1.0 / FACTOR))[:, None], part.shape), acc)


@triton.jit
def _sum_blocks(
    x_ptr, x_sums_ptr, codes_ptr, scale_ptr, zero_ptr,
    first_m, first_n, first, count, M, N, K,
    stride_xm, stride_sn, stride_sg,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr,
    WHOLE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sums `count` blocks of K, at least one, from block `first` on.

    Returns sums that are scaled by group, fp32 `[BLOCK_N, BLOCK_M]`; those that are not, of `(code - middle) * factor *
    x`, int32 of int8; and the sums of x that belong to the latter. WHOLE: all are of the second kind.
    """
    WIDTH: tl.constexpr = 8 * BITS
    T: tl.constexpr = x_ptr.dtype.element_ty
    FP8: tl.constexpr = x_ptr.dtype.element_ty != tl.int8
    SUM: tl.constexpr = tl.float32 if FP8 else tl.int32
    MIDDLE: tl.constexpr = code_middle(BITS)
    FACTOR: tl.constexpr = code_factor(BITS, FP8, ASM)
    CENTRED: tl.constexpr = zero_ptr is None and ZERO == MIDDLE
    BLOCKS: tl.constexpr = GROUP // 128  # of a group; 0 if there is one, or if groups end inside a block
    rows = tl.minimum(tl.arange(0, BLOCK_M), (M - 1 - first_m).to(tl.int32))
    cols = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_n).to(tl.int32))
    offs_k = tl.arange(0, 128)
    offs_x = rows[:, None] * stride_xm + offs_k[None, :]  # [BLOCK_M, 128]
    offs_w = cols[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [BLOCK_N, WIDTH]
    offs_s = cols * stride_sn  # [BLOCK_N]
    x_ptr += first_m * stride_xm + first * 128
    codes_ptr += (first.to(tl.int64) * N + first_n) * WIDTH
    scale_ptr += first_n * stride_sn
    if zero_ptr is not None:
        zero_ptr += first_n * stride_sn

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    x_sums = tl.zeros((BLOCK_M,), SUM)
    count = tl.maximum(count, 1)
    for turn in range(count):
        k = (first + turn) * 128
        words = tl.load(codes_ptr + offs_w)
        if EVEN_K:
            x = tl.load(x_ptr + offs_x)
        else:
            x = tl.load(x_ptr + offs_x, mask=offs_k[None, :] < K - k, other=0.0)
        w = code_block(words, BITS, T, FP8, ASM, BLOCK_M <= 64)
        if GROUP % 128 == 0:
            part = tl.dot(w, tl.trans(x), part, out_dtype=SUM)
            if not CENTRED:
                if x_sums_ptr is not None:
                    x_sums += tl.load(x_sums_ptr + (first + turn).to(tl.int64) * M + first_m + rows)
                else:
                    x_sums += tl.sum(x.to(SUM), 1)
            if GROUP > 0 and ((first + turn + 1) % BLOCKS == 0 or turn + 1 == count):
                offs = offs_s + k // GROUP * stride_sg
                acc = _add_group(acc, part, x_sums, scale_ptr, zero_ptr, offs, ZERO, MIDDLE, FACTOR, CENTRED)
                part = tl.zeros((BLOCK_N, BLOCK_M), SUM)
                x_sums = tl.zeros((BLOCK_M,), SUM)
        else:
            for i in tl.static_range(4):
                mine = (offs_k // 32 == i)[None, :]
                x_mine = tl.where(mine, x.to(tl.float32), 0.0).to(T)
                offs = offs_s + tl.minimum((k + 32 * i) // GROUP, tl.cdiv(K, GROUP) - 1) * stride_sg
                part = tl.dot(w, tl.trans(x_mine), out_dtype=SUM)
                x_sums = tl.sum(x_mine.to(SUM), 1)
                acc = _add_group(acc, part, x_sums, scale_ptr, zero_ptr, offs, ZERO, MIDDLE, FACTOR, CENTRED)
        x_ptr += 128
        codes_ptr += N * WIDTH
    if GROUP == 0 and not WHOLE:
        acc = _add_group(acc, part, x_sums, scale_ptr, zero_ptr, offs_s, ZERO, MIDDLE, FACTOR, CENTRED)
    return acc, part, x_sums


@triton.jit
def _take_zero(
    acc, x_zero, code_sums_ptr, scale_ptr, zero_ptr, first_n, groups, N, K,
    stride_sn, stride_sg, stride_cn,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Returns acc `[BLOCK_N, BLOCK_M]` less what the zero point of x adds in so many groups, fp32."""
    cols = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_n).to(tl.int32))
    code_sums_ptr += first_n * stride_cn
    scale_ptr += first_n * stride_sn
    if zero_ptr is not None:
        zero_ptr += first_n * stride_sn
    for g in range(groups):
        scale, zero = load_grid(scale_ptr, zero_ptr, cols * stride_sn + g * stride_sg, ZERO)
        sums = tl.load(code_sums_ptr + cols * stride_cn + g).to(tl.float32) - zero * (GROUP if GROUP > 0 else K)
        acc -= (x_zero.to(tl.float32) * scale * sums)[:, None]
    return acc


@triton.jit(do_not_specialize=["M", "programs", "per_sm"])
def _qmatmul_int8_kernel(
    y_ptr, parts_ptr,
    x_ptr, x_scale_ptr, x_sums_ptr, x_zero_ptr, code_sums_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr,
    M, N, K, programs, per_sm,
    stride_xm, stride_xs, stride_sn, stride_sg, stride_cn,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr, EVEN_K: tl.constexpr, EARLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Computes a tile of y; if parts_ptr is not None, parts of tiles, a share of the blocks of all of them.

    GROUP: 0 if there is one group. WHOLE: its sums stay int32 to the end, parts twice that of `(code - zero) * x`;
    others are scaled, in fp32, and added. Parts are not yet scaled by row.
    """
    FP8: tl.constexpr = x_ptr.dtype.element_ty != tl.int8
    MIDDLE: tl.constexpr = code_middle(BITS)
    FACTOR: tl.constexpr = code_factor(BITS, FP8, ASM)
    CENTRED: tl.constexpr = zero_ptr is None and ZERO == MIDDLE
    MIDDLE2: tl.constexpr = int(2 * MIDDLE)
    STEPS: tl.constexpr = 2 if zero_ptr is None and is_whole(2 * ZERO) else 1
    tiles_m = tl.cdiv(M, BLOCK_M)
    blocks = tl.cdiv(K, 128)
    groups = tl.cdiv(K, GROUP) if GROUP > 0 else 1
    if x_zero_ptr is None:
        x_zero = None
    else:
        x_zero = tl.load(x_zero_ptr).to(tl.int32)
    if parts_ptr is not None:
        rank, begin, end = share_of(tiles_m * tl.cdiv(N, BLOCK_N), blocks, programs, per_sm, EARLY)
        first_tile = (begin // blocks).to(tl.int32)
        for i in range(tl.cdiv(end, blocks).to(tl.int32) - first_tile):
            tile = first_tile + i
            first, last = part_of(tile, begin, end, blocks)
            first_m = (tile % tiles_m).to(tl.int64) * BLOCK_M
            first_n = (tile // tiles_m).to(tl.int64) * BLOCK_N
            acc, part, x_sums = _sum_blocks(
                x_ptr, x_sums_ptr, codes_ptr, scale_ptr, zero_ptr,
                first_m, first_n, first, last - first, M, N, K, stride_xm, stride_sn, stride_sg,
                BITS, GROUP, ZERO, ASM, WHOLE, EVEN_K, BLOCK_M, BLOCK_N,
            )
            if WHOLE:
                sums = twice(part, int(FACTOR))
                if not CENTRED:
                    sums += (MIDDLE2 - int(2 * ZERO)) * x_sums[None, :]
                store_part(parts_ptr, tl.trans(sums), tile, rank, M, BLOCK_M, BLOCK_N)
            else:
                if x_zero is not None:
                    once = groups * tl.maximum(1 - first, 0)  # in the first part of a tile
                    acc = _take_zero(
                        acc, x_zero, code_sums_ptr, scale_ptr, zero_ptr, first_n, once, N, K,
                        stride_sn, stride_sg, stride_cn, GROUP, ZERO, BLOCK_N,
                    )
                store_part(parts_ptr, tl.trans(acc), tile, rank, M, BLOCK_M, BLOCK_N)
    else:
        pid = tl.program_id(0)
        first_m = (pid % tiles_m).to(tl.int64) * BLOCK_M
        first_n = (pid // tiles_m).to(tl.int64) * BLOCK_N
        acc, part, x_sums = _sum_blocks(
            x_ptr, x_sums_ptr, codes_ptr, scale_ptr, zero_ptr,
            first_m, first_n, pid * 0, blocks, M, N, K, stride_xm, stride_sn, stride_sg,
            BITS, GROUP, ZERO, ASM, WHOLE, EVEN_K, BLOCK_M, BLOCK_N,
        )
        if WHOLE:
            cols = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_n).to(tl.int32))
            scale_ptr += first_n * stride_sn
            if zero_ptr is not None:
                zero_ptr += first_n * stride_sn
            if x_zero is not None:
                code_sums_ptr += first_n * stride_cn
            acc = real_sums(
                twice(part, int(FACTOR)), x_sums, code_sums_ptr, x_zero, K, scale_ptr, zero_ptr, cols * stride_sn,
                cols * stride_cn, ZERO, MIDDLE2, STEPS,
            )
        elif x_zero is not None:
            acc = _take_zero(
                acc, x_zero, code_sums_ptr, scale_ptr, zero_ptr, first_n, groups, N, K,
                stride_sn, stride_sg, stride_cn, GROUP, ZERO, BLOCK_N,
            )
        store_tile(
            y_ptr, tl.trans(acc), bias_ptr, None, first_m, first_n, M, N, x_scale_ptr, stride_xs,
            ACTIVATION, BLOCK_M, BLOCK_N,
        )


def multiply_int8(
    x: Tensor, x_scale: Tensor, x_sums: Tensor | None, x_zero: tuple[Tensor, Tensor] | None,
    weight: PackedWeight, bias: Tensor | None, activation: str, dtype: torch.dtype, plan: Plan, asm: bool,
) -> Tensor:
    """Multiplies x `[M, K]`, contiguous along K, with scales `[M]` or `[1]`, by the plan's tiles: `[M, N]` of dtype.

    Of int8 and a weight with one group, sums are exact, as a CPU's.

    x_sums: of each 128 codes of a row of x, `[ceil(K / 128), M]`, fp32 for fp8, if they are known.
    x_zero: the zero point of x, a whole number, and the sums of the weight's codes, int32 `[N, G]`, contiguous.
    """
    codes, scale, zero_points, zero, _ = kernel_tensors(weight)
    (n, k), m = weight.shape, x.shape[0]
    group = 0 if scale.shape[1] == 1 else grouping(k, weight.group_size)
    y = fresh(x.new_empty(m, n, dtype=dtype))
    whole = x.dtype == torch.int8 and sums_fit(weight, x_zero is not None)
    # with zero points of groups too, a share of so many rows would hold more than there are registers
    crowded = not whole and zero_points is not None and plan.block_m > 32
    if crowded or (whole and not can_split(weight)):
        plan = replace(plan, shares=0)
    tiles, early = -(-m // plan.block_m) * -(-n // plan.block_n), plan.early and asm
    parts = make_parts(x, m, tiles, plan, torch.int32 if whole else torch.float32)
    x_grid = (None, None) if x_zero is None else x_zero
    stride_xs = 1 if x_scale.shape[0] == m else 0
    launch(
        _qmatmul_int8_kernel, (plan.shares or tiles,),
        y, parts, x, x_scale, x_sums, *x_grid, codes, scale, zero_points, bias,
        m, n, k, plan.shares, plan.per_sm,
        x.stride(0), stride_xs, *scale.stride(), scale.shape[1],
        BITS=weight.bits, GROUP=group, ZERO=zero, ASM=asm, ACTIVATION=activation,
        WHOLE=whole, EVEN_K=k % 128 == 0, EARLY=early, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        num_warps=plan.warps, num_stages=plan.stages,
    )
    if parts is not None:
        held = ((scale, zero), *x_grid) if whole else (None, None, None)
        add_parts(
            y, parts, bias, activation, k, tiles, plan, early,
            weight=held[0], x_zero=held[1], code_sums=held[2], x_scale=x_scale, stride_xs=stride_xs,
        )
    return y
