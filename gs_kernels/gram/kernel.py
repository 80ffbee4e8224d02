"""Sums products of columns on a GPU: matrix products over tokens, added to fp32 sums that are there."""

import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.gram.tiles import choose_tile
from gs_kernels.runtime.dispatch import launch


@triton.jit
def _columns(ptr, offs_t, offs_k, stride_t, stride_k, mask, BY_TOKEN: tl.constexpr):
    """Loads `[BLOCK_T, BLOCK_K]` of tokens and columns, or its transpose; 0 outside."""
    if BY_TOKEN:
        offs = offs_t[:, None] * stride_t + (offs_k * stride_k)[None, :]
    else:
        offs = (offs_k * stride_k)[:, None] + offs_t[None, :] * stride_t
    return tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def _gram_kernel(
    total_ptr,
    x_ptr, floats_ptr,
    T, K, tiles,
    stride_xg, stride_xt, stride_xk, stride_fg, stride_ft, stride_fk,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """Adds one tile of x^T x, on or above the diagonal, and its mirror image; with floats, of (floats - x)^T x."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    if floats_ptr is None:
        # the upper triangle as a rectangle: row r holds what is left of it and, before that, of row tiles - even - r
        even = 1 - tiles % 2
        width, count = tiles + even, (tiles + 1) // 2 * (tiles + even)
        row, at = pid % count // width, pid % count % width - even
        above = at >= row
        tile_i, tile_j = tl.where(above, row, tiles - even - row), tl.where(above, at, tiles - row + at)
    else:
        count = tiles * tiles
        tile_i, tile_j = pid % count // tiles, pid % count % tiles
    group = pid // count
    offs_i = tile_i * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    offs_j = tile_j * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_i, mask_j = offs_i < K, offs_j < K
    x_ptr += group * stride_xg
    if floats_ptr is not None:
        floats_ptr += group * stride_fg

    acc = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for first in range(0, T, BLOCK_T):
        offs_t = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        counts = offs_t < T
        left = _columns(x_ptr, offs_t, offs_i, stride_xt, stride_xk, mask_i[:, None] & counts[None, :], False)
        if floats_ptr is not None:
            inside = mask_i[:, None] & counts[None, :]
            floats = _columns(floats_ptr, offs_t, offs_i, stride_ft, stride_fk, inside, False)
            left = (floats.to(tl.float32) - left.to(tl.float32)).to(DTYPE)
        right = _columns(x_ptr, offs_t, offs_j, stride_xt, stride_xk, counts[:, None] & mask_j[None, :], True)
        acc = tl.dot(left, right, acc, input_precision="ieee")

    total_ptr += group * K * K
    offs = (offs_i * K)[:, None] + offs_j[None, :]
    mask = mask_i[:, None] & mask_j[None, :]
    acc += tl.load(total_ptr + offs, mask=mask, other=0.0)
    tl.store(total_ptr + offs, acc, mask=mask)
    if floats_ptr is None and tile_i != tile_j:
        mirrored = (offs_j * K)[:, None] + offs_i[None, :]
        tl.store(total_ptr + mirrored, tl.trans(acc), mask=mask_j[:, None] & mask_i[None, :])


def gram__triton(total: Tensor, x: Tensor, floats: Tensor | None) -> None:
    groups, tokens, k = x.shape
    if not x.numel():
        return
    tile = choose_tile(k, x.dtype, floats is not None)
    tiles = triton.cdiv(k, tile.block_k)
    count = (tiles + 1) // 2 * (tiles + 1 - tiles % 2) if floats is None else tiles * tiles
    launch(
        _gram_kernel, (groups * count,),
        total, x, floats,
        tokens, k, tiles,
        *x.stride(), *((0, 0, 0) if floats is None else floats.stride()),
        BLOCK_K=tile.block_k, BLOCK_T=tile.block_t, num_warps=tile.warps, num_stages=tile.stages,
    )
