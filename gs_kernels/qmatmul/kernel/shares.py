"""Says in kernels which blocks of K a program has that takes an equal share of those of all tiles, and adds its parts.

Blocks of K are counted tile by tile, and program r takes those from `r * total // programs` on: its share ends a tile,
does whole ones, begins another. Programs r and r + 1 that follow one another are on one processor, whose share is even
to a block. The part of tile t by program r is number t + r of the parts.

No two programs write the same part, none reads one, and `_add_parts_kernel` reads only when all are there, in their
order: no order of programs changes a bit. A counter by which the last program of a tile would add its parts could save
that launch, in the same loop; but it has to be zero before each launch. Calls on other streams and replays of graphs
would share it, and a launch cannot zero it first for all its programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import epilogue, scale_twice


@triton.jit
def share_of(tiles, blocks, programs, per_sm, EARLY: tl.constexpr):
    """Returns the rank of this program, and its first block and the end of its blocks, of all of `tiles` tiles."""
    if EARLY:
        # once all programs are here, none of which waits for another, those of `_add_parts_kernel` may take what room
        # they leave; on parts they wait by themselves
        gdc_launch_dependents()
    pid = tl.program_id(0)
    total = tl.cast(tiles, tl.int64) * blocks
    processors = programs // per_sm
    rank = pid % processors * per_sm + pid // processors
    return rank, rank * total // programs, (rank + 1) * total // programs


@triton.jit
def part_of(tile, begin, end, blocks):
    """Returns from which block of a tile to which a share from `begin` to `end` of all blocks goes."""
    first = tl.maximum(begin - tile.to(tl.int64) * blocks, 0).to(tl.int32)
    last = tl.minimum(end - tile.to(tl.int64) * blocks, blocks).to(tl.int32)
    return first, last


@triton.jit
def store_part(parts_ptr, acc, tile, rank, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores the part `[BLOCK_M, BLOCK_N]` of a tile, of it the rows that there are."""
    size = tl.minimum(M, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    # offsets that differ from tile to tile hold no registers while blocks are summed
    offs_m = (tile + rank).to(tl.int64) * size + rows
    offs = offs_m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(parts_ptr + offs, acc, mask=(rows < size)[:, None])


@triton.jit
def store_tile(
    y_ptr, acc, bias_ptr, keep, first_m, first_n, rows_end, N,
    x_scale_ptr, stride_xs,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Stores sums `[BLOCK_M, BLOCK_N]` after the epilogue; zeros instead if keep, where it is not None, is false."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    acc = epilogue(
        acc, offs_m, offs_n, offs_m < rows_end, offs_n < N, None, None, None, stride_xs, 0, 0, 0, 0,
        x_scale_ptr, bias_ptr, None, None, None, None, None, ACTIVATION, 1,
    )
    if keep is not None:
        acc = tl.where(keep, acc, 0.0)
    mask = (offs_m < rows_end)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "programs"])
def _add_parts_kernel(
    y_ptr,
    parts_ptr, scale_ptr, x_zero_ptr, code_sums_ptr, x_scale_ptr, bias_ptr,
    M, N, K, programs,
    stride_sn, stride_xs,
    ZERO: tl.constexpr, ACTIVATION: tl.constexpr, EARLY: tl.constexpr, MOST: tl.constexpr,
    TILE_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Adds the parts of a tile `[TILE_M, BLOCK_N]` in their order, at most MOST, of BLOCK_M rows, then the epilogue.

    scale_ptr: of a weight, whose zero point is ZERO, if parts are int32: twice the sums of `(code - zero) * x`.
    """
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
    acc = tl.load(parts_ptr + offs, mask=mask, other=0)
    for i in tl.static_range(1, MOST):  # all on their way at once
        exist = tl.where(first + i <= last, size, 0)
        acc += tl.load(parts_ptr + i * size * BLOCK_N + offs, mask=(rows < exist)[:, None], other=0)
    first_m = (tile % tiles_m).to(tl.int64) * TILE_M
    first_n = (tile // tiles_m).to(tl.int64) * BLOCK_N
    if scale_ptr is not None:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        acc = scale_twice(acc, offs_n, N, K, scale_ptr, stride_sn, x_zero_ptr, code_sums_ptr, ZERO)
    rows_end = tl.minimum(first_m + TILE_M, M)
    store_tile(
        y_ptr, acc, bias_ptr, None, first_m + tl.program_id(1) * BLOCK_M, first_n, rows_end, N,
        x_scale_ptr, stride_xs, ACTIVATION, BLOCK_M, BLOCK_N,
    )


def make_parts(x: Tensor, m: int, tiles: int, plan: Plan, dtype: torch.dtype) -> Tensor | None:
    """Allocates the parts of a plan's shares on the device of x, None if each program does a tile."""
    if not plan.shares:
        return None
    size = m if m <= plan.block_m else plan.block_m
    return fresh(x.new_empty(tiles + plan.shares, size, plan.block_n, dtype=dtype))


def add_parts(
    y: Tensor, parts: Tensor, bias: Tensor | None, activation: str, k: int, tiles: int, plan: Plan, early: bool, *,
    weight: tuple[Tensor, float] | None = None, x_zero: Tensor | None = None, code_sums: Tensor | None = None,
    x_scale: Tensor | None = None, stride_xs: int | None = None,
) -> None:
    """Writes y `[M, N]` from the parts of its tiles.

    Args:
        early: whether the launch that makes the parts allows this one to start before it ends.
        weight: scale and zero point of the weight that int32 parts still have to be scaled by.
        x_zero, code_sums, x_scale, stride_xs: as `reduce_partials` takes them.
    """
    (m, n), size = y.shape, parts.shape[1]
    scale, zero = (None, 0.0) if weight is None else weight
    block_m = power_of_two(size, 4)
    launch(
        _add_parts_kernel, (tiles, -(-size // block_m)),
        y, parts, scale, x_zero, code_sums, x_scale, bias,
        m, n, k, plan.shares,
        0 if scale is None else scale.stride(0), stride_xs,
        ZERO=zero, ACTIVATION=activation, EARLY=early, MOST=plan.parts(tiles, -(-k // 128)),
        TILE_M=plan.block_m, BLOCK_M=block_m, BLOCK_N=plan.block_n, num_warps=4, early=early,
    )
