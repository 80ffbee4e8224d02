"""Multiplies 8-bit rows with a packed weight: sums of integers, scaled once a group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import code_block, code_factor, code_middle, load_grid
from gs_kernels.qmatmul.checks import sums_fit
from gs_kernels.qmatmul.kernel.dequantize import grouping, kernel_tensors
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import can_split, epilogue, is_whole, real_sums, reduce_partials, twice


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


@triton.jit(do_not_specialize=["M", "turns"])
def _qmatmul_int8_kernel(
    y_ptr,
    x_ptr, x_scale_ptr, x_sums_ptr, x_zero_ptr, code_sums_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr,
    M, N, K, turns,
    stride_xm, stride_xs, stride_sn, stride_sg, stride_cn,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Computes a tile of y; if PARTIAL, a sum over `turns` blocks of K, `[parts, M, N]`, not yet scaled by row.

    GROUP: 0 if there is one group. WHOLE: its sums stay int32 to the end, partial ones twice that of
    `(code - zero) * x`; others are scaled, in fp32, and added.
    """
    WIDTH: tl.constexpr = 8 * BITS
    T: tl.constexpr = x_ptr.dtype.element_ty
    FP8: tl.constexpr = x_ptr.dtype.element_ty != tl.int8
    SUM: tl.constexpr = tl.float32 if FP8 else tl.int32
    MIDDLE: tl.constexpr = code_middle(BITS)
    FACTOR: tl.constexpr = code_factor(BITS, FP8, ASM)
    CENTRED: tl.constexpr = zero_ptr is None and ZERO == MIDDLE
    MIDDLE2: tl.constexpr = int(2 * MIDDLE)
    STEPS: tl.constexpr = 2 if zero_ptr is None and is_whole(2 * ZERO) else 1
    BLOCKS: tl.constexpr = GROUP // 128  # of a group; 0 if there is one, or if groups end inside a block
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    first_m = (pid % tiles_m).to(tl.int64) * BLOCK_M
    first_n = (pid // tiles_m).to(tl.int64) * BLOCK_N
    first = tl.program_id(1) * turns
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
    if x_zero_ptr is None:
        x_zero = None
    else:
        x_zero = tl.load(x_zero_ptr).to(tl.int32)
        code_sums_ptr += first_n * stride_cn

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    x_sums = tl.zeros((BLOCK_M,), SUM)
    count = tl.maximum(tl.minimum(turns, tl.cdiv(K, 128) - first), 1)
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
    if x_zero is not None and not WHOLE:
        # once, by the first of the programs that share a tile
        for g in range(tl.where(tl.program_id(1) == 0, tl.cdiv(K, GROUP) if GROUP > 0 else 1, 0)):
            scale, zero = load_grid(scale_ptr, zero_ptr, offs_s + g * stride_sg, ZERO)
            sums = tl.load(code_sums_ptr + cols * stride_cn + g).to(tl.float32) - zero * (GROUP if GROUP > 0 else K)
            acc -= (x_zero.to(tl.float32) * scale * sums)[:, None]

    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    if WHOLE and PARTIAL:
        sums = twice(part, int(FACTOR))
        if not CENTRED:
            sums += (MIDDLE2 - int(2 * ZERO)) * x_sums[None, :]
        y = tl.trans(sums)
    elif WHOLE:
        sums = real_sums(
            twice(part, int(FACTOR)), x_sums, code_sums_ptr, x_zero, K, scale_ptr, zero_ptr, offs_s, cols * stride_cn,
            ZERO, MIDDLE2, STEPS,
        )
        y = tl.trans(sums)
    else:
        y = tl.trans(acc)
    if PARTIAL:
        y_ptr += tl.program_id(1).to(tl.int64) * M * N
    else:
        y = epilogue(
            y, offs_m, offs_n, offs_m < M, offs_n < N, None, None, None, stride_xs, 0, 0, 0, 0,
            x_scale_ptr, bias_ptr, None, None, None, None, None, ACTIVATION, 1,
        )
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


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
    blocks, group = -(-k // 128), 0 if scale.shape[1] == 1 else grouping(k, weight.group_size)
    y = fresh(x.new_empty(m, n, dtype=dtype))
    whole = x.dtype == torch.int8 and sums_fit(weight, x_zero is not None)
    split = plan.partials(blocks) if not whole or can_split(weight) else 1
    sums = y
    if split > 1:
        sums = fresh(x.new_empty(split, m, n, dtype=torch.int32 if whole else torch.float32))
    x_grid = (None, None) if x_zero is None else x_zero
    stride_xs = 1 if x_scale.shape[0] == m else 0
    tiles = -(-m // plan.block_m) * -(-n // plan.block_n)
    launch(
        _qmatmul_int8_kernel, (tiles, split),
        sums, x, x_scale, x_sums, *x_grid, codes, scale, zero_points, bias,
        m, n, k, -(-blocks // split),
        x.stride(0), stride_xs, *scale.stride(), scale.shape[1],
        BITS=weight.bits, GROUP=group, ZERO=zero, ASM=asm, ACTIVATION=activation,
        WHOLE=whole, EVEN_K=k % 128 == 0, PARTIAL=split > 1, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        num_warps=plan.warps, num_stages=plan.stages,
    )
    if split > 1:
        held = ((scale, zero, k), *x_grid) if whole else (None, None, None)
        reduce_partials(
            y, sums, bias, activation,
            weight=held[0], x_zero=held[1], code_sums=held[2], x_scale=x_scale, stride_xs=stride_xs,
        )
    return y
