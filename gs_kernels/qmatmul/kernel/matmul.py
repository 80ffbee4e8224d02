"""Multiplies float rows with a packed weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import dequantize_block, weight_unit
from gs_kernels.qmatmul.kernel.dequantize import grouping, kernel_tensors, rows_a_divisor
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import epilogue


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
    EVEN_K: tl.constexpr, SCALE_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Returns the sum of `count` blocks of K, at least one, from block `first` on, fp32 `[BLOCK_M, BLOCK_N]`.

    y^T = W x^T: on sm_90 the left operand goes to wgmma from registers, and a product that feeds the sum only is not
    waited for: scales then belong on the weights. With SCALE_PARTS they are put on the product of each block instead:
    one multiplication less a weight, for few rows, where the product is small and other programs fill the wait.
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
        if EVEN_K:
            x = tl.load(x_ptr + offs_x)
        else:
            x = tl.load(x_ptr + offs_x, mask=offs_k[None, :] < K - k, other=0.0)
        grid = (scale_ptr, zero_ptr, levels_ptr, offs_s, stride_sg, k, G)
        w, scale = dequantize_block(words, grid, BITS, GROUP, ZERO, T, ASM, not SCALE_PARTS)
        if SCALE_PARTS:
            part = tl.dot(w, tl.trans(x), input_precision="ieee")
            acc = tl.fma(part, tl.broadcast_to(scale, part.shape), acc)
        else:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        x_ptr += 128
        codes_ptr += stacked * WIDTH

    UNIT: tl.constexpr = weight_unit(ZERO, zero_ptr is None and levels_ptr is None, T, ASM, not SCALE_PARTS)
    if divisor_ptr is not None:
        acc = acc / tl.load(divisor_ptr + (first_w + cols) // divided)[:, None]
    return tl.trans(acc) * UNIT


@triton.jit
def _store_tile(
    y_ptr, acc, bias_ptr, keep, first_m, first_n, rows_end, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Stores sums `[BLOCK_M, BLOCK_N]` after the epilogue; zeros instead if keep, where it is not None, is false."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    acc = epilogue(
        acc, offs_m, offs_n, offs_m < rows_end, offs_n < N, None, None, None, None, 0, 0, 0, 0,
        None, bias_ptr, None, None, None, None, None, ACTIVATION, 1,
    )
    if keep is not None:
        acc = tl.where(keep, acc, 0.0)
    mask = (offs_m < rows_end)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


# row counts that a server meets, and shares of K, have their code in common
@triton.jit(do_not_specialize=["M", "tiles", "programs", "per_sm"])
def _qmatmul_kernel(
    y_ptr, parts_ptr,
    x_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, divisor_ptr, bias_ptr, offsets_ptr,
    M, N, K, G, divided, E, tiles, programs, per_sm,
    stride_xm, stride_sn, stride_sg,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, SCALE_PARTS: tl.constexpr, EARLY: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Computes a tile of y; if parts_ptr is not None, a share of all blocks of all tiles, without the epilogue.

    With EXPERTS, a power of two above E, the weight is that of E experts, N rows each, and offsets say where the rows
    of x of each end; `tiles` is at least the number of tiles of rows. Else offsets_ptr is None.

    Blocks of K are counted tile by tile, and program r takes those from `r * total // programs` on: its share ends a
    tile, does whole ones, begins another. Programs r and r + 1 that follow one another are on one processor, whose
    share is even to a block. The part of tile t by program r is number t + r of the parts.

    No two programs write the same part, none reads one, and `_add_parts_kernel` reads only when all are there, in their
    order: no order of programs changes a bit. A counter by which the last program of a tile would add its parts could
    save that launch, in the same loop; but it has to be zero before each launch. Calls on other streams and replays of
    graphs would share it, and a launch cannot zero it first for all its programs.
    """
    pid = tl.program_id(0)
    if parts_ptr is not None:
        if EARLY:
            # once all programs are here, none of which waits for another, those of `_add_parts_kernel` may take what
            # room they leave; on parts they wait by themselves
            gdc_launch_dependents()
        tiles_m = tl.cdiv(M, BLOCK_M)
        blocks = tl.cdiv(K, 128)
        total = tl.cast(tiles_m * tl.cdiv(N, BLOCK_N), tl.int64) * blocks
        processors = programs // per_sm
        rank = pid % processors * per_sm + pid // processors
        begin = rank * total // programs
        end = (rank + 1) * total // programs
        size = tl.minimum(M, BLOCK_M)
        mask = (tl.arange(0, BLOCK_M) < size)[:, None]
        offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        first_tile = (begin // blocks).to(tl.int32)
        for i in range(tl.cdiv(end, blocks).to(tl.int32) - first_tile):
            tile = first_tile + i
            first = tl.maximum(begin - tile.to(tl.int64) * blocks, 0).to(tl.int32)
            last = tl.minimum(end - tile.to(tl.int64) * blocks, blocks).to(tl.int32)
            first_m = (tile % tiles_m).to(tl.int64) * BLOCK_M
            first_n = (tile // tiles_m).to(tl.int64) * BLOCK_N
            acc = _sum_blocks(
                x_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, divisor_ptr,
                first_m, first_n, first_n, first, last - first, M, N, N, K, G, divided,
                stride_xm, stride_sn, stride_sg,
                BITS, GROUP, ZERO, ASM, EVEN_K, SCALE_PARTS, BLOCK_M, BLOCK_N,
            )
            tl.store(parts_ptr + (tile + rank).to(tl.int64) * size * BLOCK_N + offs, acc, mask=mask)
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
            BITS, GROUP, ZERO, ASM, EVEN_K, SCALE_PARTS, BLOCK_M, BLOCK_N,
        )
        if bias_ptr is not None:
            bias_ptr += first_w - first_n
        if EXPERTS == 0:
            keep = None
        else:
            keep = expert < E
        _store_tile(y_ptr, acc, bias_ptr, keep, first_m, first_n, rows_end, N, ACTIVATION, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "programs"])
def _add_parts_kernel(
    y_ptr,
    parts_ptr, bias_ptr,
    M, N, K, programs,
    ACTIVATION: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr,
    TILE_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Adds the parts of a tile `[TILE_M, BLOCK_N]` in their order, at most MOST, of BLOCK_M rows, then the epilogue."""
    tiles_m = tl.cdiv(M, TILE_M)
    blocks = tl.cdiv(K, 128)
    total = tl.cast(tiles_m * tl.cdiv(N, BLOCK_N), tl.int64) * blocks
    tile = tl.program_id(0)
    begin = tile.to(tl.int64) * blocks
    # who has block b: the last whose share begins at b or before
    first = ((begin + 1) * programs - 1) // total
    last = ((begin + blocks) * programs - 1) // total
    size = tl.minimum(M, TILE_M)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < size)[:, None]
    parts_ptr += (first + tile) * size * BLOCK_N
    if EARLY:
        # until all programs of the launch before have ended, and what they wrote is seen here. Launched without the
        # attribute that lets it start early (by torch.compile), this waits for nothing: that launch has ended
        gdc_wait()
    offs = rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    for i in tl.static_range(1, MOST):  # all on their way at once
        exist = tl.where(first + i <= last, size, 0)
        acc += tl.load(parts_ptr + i * size * BLOCK_N + offs, mask=(rows < exist)[:, None], other=0.0)
    first_m = (tile % tiles_m).to(tl.int64) * TILE_M
    first_n = (tile // tiles_m).to(tl.int64) * BLOCK_N
    rows_end = tl.minimum(first_m + TILE_M, M)
    _store_tile(
        y_ptr, acc, bias_ptr, None, first_m + tl.program_id(1) * BLOCK_M, first_n, rows_end, N,
        ACTIVATION, BLOCK_M, BLOCK_N,
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
    parts, size, early = None, m if m <= plan.block_m else plan.block_m, plan.early and asm
    if plan.shares:
        parts = fresh(x.new_empty(tiles + plan.shares, size, plan.block_n, dtype=torch.float32))
    launch(
        _qmatmul_kernel, (plan.shares or tiles,),
        y, parts, x, codes, scale, zero_points, levels, weight.divisor, bias, offsets,
        m, n, k, scale.shape[1], rows_a_divisor(weight), experts, tiles_m, plan.shares, plan.per_sm,
        x.stride(0), *scale.stride(),
        BITS=weight.bits, GROUP=group, ZERO=zero, ASM=asm, ACTIVATION=activation,
        EVEN_K=k % 128 == 0, SCALE_PARTS=plan.scale_parts and group % 128 == 0, EARLY=early,
        EXPERTS=0 if offsets is None else power_of_two(experts + 1, 1 << 20),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=plan.warps, num_stages=plan.stages,
    )
    if plan.shares:
        block_m = power_of_two(size, 4)
        launch(
            _add_parts_kernel, (tiles, -(-size // block_m)), y, parts, bias, m, n, k, plan.shares,
            ACTIVATION=activation, EARLY=early, MOST=plan.parts(tiles, -(-k // 128)),
            TILE_M=plan.block_m, BLOCK_M=block_m, BLOCK_N=plan.block_n, num_warps=4, early=early,
        )
    return y
