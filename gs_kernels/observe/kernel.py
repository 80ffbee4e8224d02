"""Finds ranges and grids on a GPU; a row that fits one program is read once for both its range and its fake-quant."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.fake_quant.kernel import addressing, fake_quant_triton, flags, forward, store_partial
from gs_kernels.fake_quant.strided_rows import BY_COL, BY_CYCLE, BY_TENSOR, Rows, like, readable
from gs_kernels.fake_quant.tiles import ELEMENTS, WARPS, Tile, choose_tile, power_of_two
from gs_kernels.observe.ref import symmetric_zero
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import BY_COL as COL
from gs_kernels.triton_lib import BY_TENSOR as TENSOR
from gs_kernels.triton_lib import dense_offsets, inverse, nearest_level, offsets, qparams, reduce_range, row_range, tile

ROW_MAX = 16384  # elements of a row that one program holds: 32 per thread of 16 warps


@triton.jit
def _minmax_kernel(
    low_ptr, high_ptr,
    x_ptr,
    M, N, C,
    per, stride_outer, stride_inner,
    BY: tl.constexpr, STRIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):
    first_m, first_n, rows, cols, mask_m, mask_n = tile(M, N, BLOCK_M, BLOCK_N, CHUNK, WHOLE)
    mask = mask_m & mask_n
    begin, offs = offsets(first_m, first_n, rows, cols, N, per, stride_outer, stride_inner, STRIDED)
    x = tl.load(x_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32)
    if BY == TENSOR:
        low, high = reduce_range(x, mask, None)
    elif BY == COL:
        low, high = reduce_range(x, mask, 1)
        low, high = low[:, None, :], high[:, None, :]
    else:
        low, high = row_range(x, mask)
    store_partial(low_ptr, low, first_m, first_n, rows, cols, mask_m, mask_n, N, BY)
    store_partial(high_ptr, high, first_m, first_n, rows, cols, mask_m, mask_n, N, BY)


@triton.jit
def _choose_qparams_kernel(
    scale_ptr, zero_ptr,
    low_ptr, high_ptr,
    C,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < C
    low = tl.load(low_ptr + offs, mask=mask, other=0.0)
    high = tl.load(high_ptr + offs, mask=mask, other=0.0)
    scale, zero = qparams(low, high, QMIN, QMAX, SYMMETRIC, ZERO)
    tl.store(scale_ptr + offs, scale, mask=mask)
    tl.store(zero_ptr + offs, zero, mask=mask)


@triton.jit
def _dynamic_fake_quant_kernel(
    y_ptr, scale_ptr, zero_ptr,
    x_ptr,
    M, N, C,
    per, stride_outer, stride_inner,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, ZERO: tl.constexpr,
    BY: tl.constexpr, STRIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):
    """Fake-quantizes whole rows, each with the scale and zero of its own range."""
    first_m, first_n, rows, cols, mask_m, mask_n = tile(M, N, BLOCK_M, BLOCK_N, CHUNK, WHOLE)
    mask = mask_m & mask_n
    begin_x, offs_x = offsets(first_m, first_n, rows, cols, N, per, stride_outer, stride_inner, STRIDED)
    x = tl.load(x_ptr + begin_x + offs_x, mask=mask, other=0.0).to(tl.float32)

    low, high = row_range(x, mask)
    scale, zero = qparams(low, high, QMIN, QMAX, SYMMETRIC, ZERO)
    tl.store(scale_ptr + first_m + rows, scale, mask=mask_m)
    tl.store(zero_ptr + first_m + rows, zero, mask=mask_m)
    y = (nearest_level(x, inverse(scale, zero), zero, QMIN, QMAX) - zero) * scale
    begin, offs = dense_offsets(first_m, first_n, rows, cols, N)
    tl.store(y_ptr + begin + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def _partials(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return fresh(x.new_empty(shape, dtype=torch.float32)), fresh(x.new_empty(shape, dtype=torch.float32))


def _merge_tiles(low: Tensor, high: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Merges the ranges of tiles, `[tiles]`, `[rows, tiles]` or by column `[tiles, C]`, to those of channels `[C]`."""
    if rows.by == BY_CYCLE:
        shape = (-1, rows.channels, low.shape[1])
        return low.view(shape).amin((0, 2)), high.view(shape).amax((0, 2))
    if rows.by == BY_TENSOR:
        return low.amin().view(1), high.amax().view(1)
    axis = 0 if rows.by == BY_COL else 1
    return low.amin(axis), high.amax(axis)


def _range(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    cut = choose_tile(rows)
    low, high = _partials(x, cut.partials(rows))
    launch(_minmax_kernel, cut.grid(rows), low, high, x, *addressing(rows), **flags(rows, cut))
    return _merge_tiles(low, high, rows)


def minmax_triton(x: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor]:
    return _range(*readable(x, axis, group))


def choose_qparams_triton(
    x_min: Tensor, x_max: Tensor, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    scale, zero = fresh(torch.empty_like(x_min)), fresh(torch.empty_like(x_min))
    block = 256
    launch(
        _choose_qparams_kernel, (triton.cdiv(scale.shape[0], block),),
        scale, zero, x_min, x_max, scale.shape[0],
        BLOCK=block, **_grid(qmin, qmax, symmetric),
    )
    return scale, zero


def _grid(qmin: int, qmax: int, symmetric: bool) -> dict[str, float]:
    return {
        "QMIN": int(qmin), "QMAX": int(qmax),
        "SYMMETRIC": symmetric, "ZERO": symmetric_zero(qmin, qmax) if symmetric else 0.0,
    }


def dynamic_fake_quant_triton(
    x: Tensor, qmin: int, qmax: int, symmetric: bool, axis: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    source, rows = readable(x, axis, group)
    whole_rows = rows.rows == rows.channels and rows.by != BY_COL
    if not whole_rows or rows.cols > ROW_MAX:
        scale, zero = choose_qparams_triton(*_range(source, rows), qmin, qmax, symmetric)
        return fake_quant_triton(x, scale, zero, qmin, qmax, axis, group), scale, zero
    y = fresh(torch.empty_like(source))
    scale, zero = _partials(x, (rows.channels,))
    cut = _whole_rows(rows)
    launch(
        _dynamic_fake_quant_kernel, cut.grid(rows), y, scale, zero, source, *addressing(rows),
        **_grid(qmin, qmax, symmetric), **flags(rows, cut),
    )
    return y if source is x else like(y, x), scale, zero


def _whole_rows(rows: Rows) -> Tile:
    cols = power_of_two(rows.cols, ROW_MAX)
    height = power_of_two(rows.rows, max(1, ELEMENTS // cols))
    return Tile(height, cols, warps=16 if cols > 8192 else 8 if cols > ELEMENTS else WARPS)


def observe_fake_quant_triton(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    source, rows = readable(x, -1, 0)
    y = fresh(torch.empty_like(source))
    cut = choose_tile(rows)
    low, high = _partials(x, cut.partials(rows))
    forward(y, low, high, source, scale, zero, rows, cut, int(qmin), int(qmax))
    return y if source is x else like(y, x), *_merge_tiles(low, high, rows)
