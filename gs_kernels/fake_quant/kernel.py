"""Computes fake-quant, its gradient and codes on a GPU: elements are read and written once, sums need no atomics."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.fake_quant.strided_rows import BY_COL, BY_CYCLE, BY_TENSOR, Rows, like, readable, same_layout
from gs_kernels.fake_quant.tiles import Tile, choose_tile
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import BY_COL as COL
from gs_kernels.triton_lib import BY_TENSOR as TENSOR
from gs_kernels.triton_lib import (
    clamp,
    dense_offsets,
    inverse,
    load_channel,
    nearest_level,
    offsets,
    reduce_range,
    steps,
    tile,
)


@triton.jit
def _fake_quant_fwd_kernel(
    y_ptr, low_ptr, high_ptr,
    x_ptr, scale_ptr, zero_ptr,
    M, N, C,
    per, stride_outer, stride_inner,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
    BY: tl.constexpr, STRIDED: tl.constexpr, CODES: tl.constexpr, RANGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):
    first_m, first_n, rows, cols, mask_m, mask_n = tile(M, N, BLOCK_M, BLOCK_N, CHUNK, WHOLE)
    mask = mask_m & mask_n
    scale = load_channel(scale_ptr, first_m, first_n, rows, cols, mask_m, mask_n, C, BY)
    zero = load_channel(zero_ptr, first_m, first_n, rows, cols, mask_m, mask_n, C, BY)
    begin_x, offs_x = offsets(first_m, first_n, rows, cols, N, per, stride_outer, stride_inner, STRIDED)
    begin, offs = dense_offsets(first_m, first_n, rows, cols, N)
    x = tl.load(x_ptr + begin_x + offs_x, mask=mask, other=0.0).to(tl.float32)

    q = nearest_level(x, inverse(scale, zero), zero, QMIN, QMAX)
    if CODES:
        q = tl.where(q == q, q, QMIN)
        y = q.to(y_ptr.dtype.element_ty)
    else:
        y = ((q - zero) * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + begin + offs, y, mask=mask)
    if RANGE:
        low, high = reduce_range(x, mask, None)
        tl.store(low_ptr + tl.program_id(0), low)
        tl.store(high_ptr + tl.program_id(0), high)


@triton.jit
def _fake_quant_bwd_kernel(
    dx_ptr, dscale_ptr, dzero_ptr,
    dy_ptr, x_ptr, scale_ptr, zero_ptr,
    M, N, C,
    per, stride_outer, stride_inner,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
    BY: tl.constexpr, STRIDED: tl.constexpr, FOR_SCALE: tl.constexpr, FOR_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):
    first_m, first_n, rows, cols, mask_m, mask_n = tile(M, N, BLOCK_M, BLOCK_N, CHUNK, WHOLE)
    mask = mask_m & mask_n
    scale = load_channel(scale_ptr, first_m, first_n, rows, cols, mask_m, mask_n, C, BY)
    zero = load_channel(zero_ptr, first_m, first_n, rows, cols, mask_m, mask_n, C, BY)
    begin_x, offs_x = offsets(first_m, first_n, rows, cols, N, per, stride_outer, stride_inner, STRIDED)
    begin, offs = dense_offsets(first_m, first_n, rows, cols, N)
    x = tl.load(x_ptr + begin_x + offs_x, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)

    t, r = steps(x, inverse(scale, zero), zero, QMIN, QMAX)
    q = clamp(r, QMIN, QMAX)
    inside = q == r
    dx = tl.where(inside, dy, 0.0)
    tl.store(dx_ptr + begin + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if FOR_SCALE:
        # inside the grid t did not saturate
        v = dy * ((q - zero) - tl.where(inside, t, 0.0))
        store_partial(dscale_ptr, _sum(v, BY), first_m, first_n, rows, cols, mask_m, mask_n, N, BY)
    if FOR_ZERO:
        v = -scale * _sum(dy - dx, BY)
        store_partial(dzero_ptr, v, first_m, first_n, rows, cols, mask_m, mask_n, N, BY)


@triton.jit
def _sum(v, BY: tl.constexpr):
    """Sums elements over this tile, to what broadcasts against them: by tensor a number, else one per row or column."""
    if BY == TENSOR:
        v = tl.sum(v)
    elif BY == COL:
        v = tl.sum(v, 1, keep_dims=True)
    else:
        v = tl.sum(tl.sum(v, 0, keep_dims=True), 2, keep_dims=True)
    return v


@triton.jit
def store_partial(ptr, v, first_m, first_n, rows, cols, mask_m, mask_n, N, BY: tl.constexpr):
    """Stores what is one number for this tile by tensor, one per row `[rows, tiles]` or column `[tiles, N]`."""
    BLOCK_M: tl.constexpr = rows.shape[1]
    BLOCK_N: tl.constexpr = cols.shape[0] * cols.shape[2]
    if BY == TENSOR:
        tl.store(ptr + tl.program_id(0), v)
    elif BY == COL:
        tl.store(ptr + first_m // BLOCK_M * N + first_n + cols, v, mask=mask_n)
    else:
        tl.store(ptr + (first_m + rows) * tl.cdiv(N, BLOCK_N) + first_n // BLOCK_N, v, mask=mask_m)


@triton.jit
def _dequantize_kernel(
    y_ptr,
    codes_ptr, scale_ptr, zero_ptr,
    M, N, C,
    per, stride_outer, stride_inner,
    BY: tl.constexpr, STRIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):
    first_m, first_n, rows, cols, mask_m, mask_n = tile(M, N, BLOCK_M, BLOCK_N, CHUNK, WHOLE)
    mask = mask_m & mask_n
    scale = load_channel(scale_ptr, first_m, first_n, rows, cols, mask_m, mask_n, C, BY)
    zero = load_channel(zero_ptr, first_m, first_n, rows, cols, mask_m, mask_n, C, BY)
    begin_x, offs_x = offsets(first_m, first_n, rows, cols, N, per, stride_outer, stride_inner, STRIDED)
    begin, offs = dense_offsets(first_m, first_n, rows, cols, N)
    q = tl.load(codes_ptr + begin_x + offs_x, mask=mask, other=0).to(tl.float32)
    y = ((q - zero) * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + begin + offs, y, mask=mask)


def addressing(rows: Rows) -> tuple[int, ...]:
    return rows.rows, rows.cols, rows.channels, rows.per, rows.outer, rows.inner


def flags(rows: Rows, cut: Tile) -> dict[str, Any]:
    return {
        "BY": rows.by, "STRIDED": not rows.dense,
        "BLOCK_M": cut.rows, "BLOCK_N": cut.cols, "CHUNK": cut.chunk(rows), "WHOLE": cut.cols >= rows.cols,
        "num_warps": cut.warps,
    }


def forward(
    y: Tensor, low: Tensor | None, high: Tensor | None, x: Tensor, scale: Tensor, zero: Tensor,
    rows: Rows, cut: Tile, qmin: int, qmax: int,
) -> None:
    """Writes values to y, or codes if y is of integers; by tensor, also each tile's range to low and high, if given."""
    launch(
        _fake_quant_fwd_kernel, cut.grid(rows), y, low, high, x, scale, zero, *addressing(rows),
        QMIN=qmin, QMAX=qmax, CODES=not y.is_floating_point(), RANGE=low is not None, **flags(rows, cut),
    )


def fake_quant_triton(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    source, rows = readable(x, axis, group)
    y = fresh(torch.empty_like(source))
    forward(y, None, None, source, scale, zero, rows, choose_tile(rows), int(qmin), int(qmax))
    return y if source is x else like(y, x)


def quantize_triton(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, axis: int, group: int) -> Tensor:
    source, rows = readable(x, axis, group)
    codes = fresh(torch.empty_like(source, dtype=torch.int8 if qmin < 0 else torch.uint8))
    forward(codes, None, None, source, scale, zero, rows, choose_tile(rows), int(qmin), int(qmax))
    return codes if source is x else like(codes, x)


def dequantize_triton(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    source, rows = readable(codes, axis, group)
    y = fresh(torch.empty_like(source, dtype=dtype))
    cut = choose_tile(rows)
    launch(_dequantize_kernel, cut.grid(rows), y, source, scale, zero, *addressing(rows), **flags(rows, cut))
    return y if source is codes else like(y, codes)


def fake_quant_backward_triton(
    dy: Tensor, x: Tensor, scale: Tensor, zero: Tensor,
    qmin: int, qmax: int, axis: int, group: int, for_scale: bool, for_zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    source, rows = readable(x, axis, group)
    dx = fresh(torch.empty_like(source))
    dy = dy if same_layout(dy, dx) else torch.empty_like(dx).copy_(dy)
    cut = choose_tile(rows)
    dscale = scale.new_empty(cut.partials(rows) if for_scale else 0)
    dzero = scale.new_empty(cut.partials(rows) if for_zero else 0)
    launch(
        _fake_quant_bwd_kernel, cut.grid(rows),
        dx, dscale if for_scale else None, dzero if for_zero else None, dy, source, scale, zero, *addressing(rows),
        QMIN=int(qmin), QMAX=int(qmax), FOR_SCALE=for_scale, FOR_ZERO=for_zero, **flags(rows, cut),
    )
    dscale = _sum_of_tiles(dscale, rows) if for_scale else dscale
    dzero = _sum_of_tiles(dzero, rows) if for_zero else dzero
    return dx if source is x else like(dx, x), dscale, dzero


def _sum_of_tiles(partial: Tensor, rows: Rows) -> Tensor:
    """Adds what `_store_sum` stored for each tile to `[C]`, always in one order, so that runs give the same bits."""
    if rows.by == BY_TENSOR:
        return partial.sum().view(1)
    if rows.by == BY_COL:
        return partial.sum(0)
    if rows.by == BY_CYCLE:
        return partial.view(-1, rows.channels, partial.shape[1]).sum((0, 2))
    return partial.sum(1)
