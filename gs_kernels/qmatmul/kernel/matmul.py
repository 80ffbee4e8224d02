"""Multiplies float rows with a packed weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import dequantize_block, weight_unit
from gs_kernels.qmatmul.kernel.dequantize import grouping, kernel_tensors, rows_a_divisor
from gs_kernels.qmatmul.kernel.shares import add_parts, make_parts, part_of, share_of, store_part, store_tile
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch


@triton.jit
def _tile_of_expert(offsets_ptr, tile, M, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns expert, first row and the end of the rows of a tile, when tiles are counted expert by expert.

    Rows behind the last offset are those of an expert E, and tiles behind the last one of an expert behind that.
    """
    e = tl.arange(0, EXPERTS)  # more than E
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0).to(tl.int64)
    ends = tl.where(e < E, ends, M)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e <= E), other=0).to(tl.int64)
    starts = tl.where(e <= E, starts, M)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = e == expert
    first_m = tl.sum(tl.where(mine, starts + (tile - upto + tiles) * BLOCK_M, 0), 0)
    return expert, first_m, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def _sum_blocks(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, divisor_ptr,
    first_m, first_n, first_w, first, count, rows_end, stacked, N, K, G, divided,
    stride_xm, stride_sn, stride_sg,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr,
    EVEN_K: tl.constexpr, SCALE_PARTS: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Returns the sum of `count` blocks of K, at least one, from block `first` on, fp32 `[BLOCK_M, BLOCK_N]`.

    y^T = W x^T: on sm_90 the left operand goes to wgmma from registers, and a product that feeds the sum only is not
    waited for: scales then belong on the weights. With SCALE_PARTS they are put on the product of each block instead:
    one multiplication less a weight, for few rows, where the product is small and other programs fill the wait.
    With OFFSETS, x is addressed by 32 bits from its first block on: an instruction more a load, and half the registers.
    """
    WIDTH: tl.constexpr = 8 * BITS
    T: tl.constexpr = x_ptr.dtype.element_ty
    # rows behind the last are the last: read, not stored
    rows = tl.minimum(tl.arange(0, BLOCK_M), (rows_end - 1 - first_m).to(tl.int32))
    cols = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_n).to(tl.int32))
    offs_k = tl.arange(0, 128)
    offs_x = rows[:, None] * stride_xm + offs_k[None, :]  # [BLOCK_M, 128]
    offs_w = cols[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [BLOCK_N, WIDTH]
    offs_s = cols * stride_sn  # [BLOCK_N]
    x_ptr += first_m * stride_xm + first * 128
    codes_ptr += (first.to(tl.int64) * stacked + first_w) * WIDTH
    scale_ptr += first_w * stride_sn
    if zero_ptr is not None:
        zero_ptr += first_w * stride_sn

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # at least one turn, and the compiler must see it: else acc = 0 has a path of its own around the loop, and ptxas
    # waits for each wgmma
    for turn in range(tl.maximum(count, 1)):
        k = (first + turn) * 128
        words = tl.load(codes_ptr + offs_w)
        if OFFSETS:
            offs = offs_x + turn * 128
        else:
            offs = offs_x
        if EVEN_K:
            x = tl.load(x_ptr + offs)
        else:
            x = tl.load(x_ptr + offs, mask=offs_k[None, :] < K - k, other=0.0)
        grid = (scale_ptr, zero_ptr, levels_ptr, offs_s, stride_sg, k, G)
        w, scale = dequantize_block(words, grid, BITS, GROUP, ZERO, T, ASM, not SCALE_PARTS)
        if SCALE_PARTS:
            part = tl.dot(w, tl.trans(x), input_precision="ieee")
            acc = tl.fma(part, tl.broadcast_to(scale, part.shape), acc)
        else:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        if not OFFSETS:
            x_ptr += 128
        codes_ptr += stacked * WIDTH

    UNIT: tl.constexpr = weight_unit(ZERO, zero_ptr is None and levels_ptr is None, T, ASM, not SCALE_PARTS)
    if divisor_ptr is not None:
        acc = acc / tl.load(divisor_ptr + (first_w + cols) // divided)[:, None]
    return tl.trans(acc) * UNIT


# row counts that a server meets, and shares of K, have their code in common
@triton.jit(do_not_specialize=["M", "tiles", "programs", "per_sm"])
def _qmatmul_kernel(
    y_ptr, parts_ptr,
    x_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, divisor_ptr, bias_ptr, offsets_ptr,
    M, N, K, G, divided, E, tiles, programs, per_sm,
    stride_xm, stride_sn, stride_sg,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, SCALE_PARTS: tl.constexpr, OFFSETS: tl.constexpr, EARLY: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Computes a tile of y; if parts_ptr is not None, parts of tiles, a share of the blocks of all of them.

    With EXPERTS, a power of two above E, the weight is that of E experts, N rows each, and offsets say where the rows
    of x of each end; `tiles` is at least the number of tiles of rows. Else offsets_ptr is None.
    """
    pid = tl.program_id(0)
    if parts_ptr is not None:
        tiles_m = tl.cdiv(M, BLOCK_M)
        blocks = tl.cdiv(K, 128)
        rank, begin, end = share_of(tiles_m * tl.cdiv(N, BLOCK_N), blocks, programs, per_sm, EARLY)
        first_tile = (begin // blocks).to(tl.int32)
        for i in range(tl.cdiv(end, blocks).to(tl.int32) - first_tile):
            tile = first_tile + i
            first, last = part_of(tile, begin, end, blocks)
            first_m = (tile % tiles_m).to(tl.int64) * BLOCK_M
            first_n = (tile // tiles_m).to(tl.int64) * BLOCK_N
            acc = _sum_blocks(
                x_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, divisor_ptr,
                first_m, first_n, first_n, first, last - first, M, N, N, K, G, divided,
                stride_xm, stride_sn, stride_sg,
                BITS, GROUP, ZERO, ASM, EVEN_K, SCALE_PARTS, OFFSETS, BLOCK_M, BLOCK_N,
            )
            store_part(parts_ptr, acc, tile, rank, M, BLOCK_M, BLOCK_N)
    else:
        if EXPERTS == 0:
            tiles_m = tl.cdiv(M, BLOCK_M)
            first_m = (pid % tiles_m).to(tl.int64) * BLOCK_M
            rows_end = M
            stacked = N
        else:
            tiles_m = tiles
            expert, first_m, rows_end = _tile_of_expert(offsets_ptr, pid % tiles, M, E, EXPERTS, BLOCK_M)
            if expert > E:
                return
            stacked = N * E
        first_n = (pid // tiles_m).to(tl.int64) * BLOCK_N
        first_w = first_n
        if EXPERTS > 0:
            first_w += tl.minimum(expert, E - 1).to(tl.int64) * N
        acc = _sum_blocks(
            x_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, divisor_ptr,
            first_m, first_n, first_w, pid * 0, tl.cdiv(K, 128), rows_end, stacked, N, K, G, divided,
            stride_xm, stride_sn, stride_sg,
            BITS, GROUP, ZERO, ASM, EVEN_K, SCALE_PARTS, OFFSETS, BLOCK_M, BLOCK_N,
        )
        if bias_ptr is not None:
            bias_ptr += first_w - first_n
        if EXPERTS == 0:
            keep = None
        else:
            keep = expert < E
        store_tile(
            y_ptr, acc, bias_ptr, keep, first_m, first_n, rows_end, N, None, None, ACTIVATION, BLOCK_M, BLOCK_N
        )


def multiply(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str, plan: Plan, asm: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    """Multiplies x `[M, K]`, contiguous along K, by the plan's tiles: `[M, N]`.

    offsets: of experts, whose weights are below one another, then a tile each; None for one weight.
    """
    codes, scale, zero_points, zero, levels = kernel_tensors(weight)
    experts = 0 if offsets is None else offsets.shape[0]
    n, k = weight.shape[0] // max(1, experts), weight.shape[1]
    group, m = grouping(k, weight.group_size), x.shape[0]
    y = fresh(x.new_empty(m, n))
    # of each expert the last tile may hold few rows, and so may the one of rows that go to none
    tiles_m = -(-m // plan.block_m) if offsets is None else m // plan.block_m + 1 + (experts if experts < m else m)
    tiles = tiles_m * -(-n // plan.block_n)
    parts, early = make_parts(x, m, tiles, plan, torch.float32), plan.early and asm
    launch(
        _qmatmul_kernel, (plan.shares or tiles,),
        y, parts, x, codes, scale, zero_points, levels, weight.divisor, bias, offsets,
        m, n, k, scale.shape[1], rows_a_divisor(weight), experts, tiles_m, plan.shares, plan.per_sm,
        x.stride(0), *scale.stride(),
        BITS=weight.bits, GROUP=group, ZERO=zero, ASM=asm, ACTIVATION=activation,
        EVEN_K=k % 128 == 0, SCALE_PARTS=plan.scale_parts and group % 128 == 0, OFFSETS=plan.crowded,
        EARLY=early,
        EXPERTS=0 if offsets is None else power_of_two(experts + 1, 1 << 20),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps, num_stages=plan.stages,
    )
    if parts is not None:
        add_parts(y, parts, bias, activation, k, tiles, plan, early)
    return y
