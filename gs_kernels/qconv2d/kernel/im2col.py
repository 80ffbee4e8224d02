"""Shares device functions of convolutions: where pixels are, and im2col tiles."""

import triton
import triton.language as tl

from gs_kernels.triton_epilogue import in_units, pixels


@triton.jit
def is_inside(h, H):
    """Says whether 0 <= h < H."""
    return h.to(tl.uint32) < H


@triton.jit
def place_tile(
    M, OG, P, Q, stride_xb, stride_xc, stride_xh, stride_xw,
    CG: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Places this program: its pixels, where they are, and where x is read; its channels of y, and which of them exist.

    Takes no pointer: compilers would think that x is written where its results tell where to write.
    offs_n are the columns, those behind the last of their group being the last: read, not stored.

    Returns:
        offs_m, image, p, q, first_h, first_w, offs_x `[BLOCK_M]`; columns of y, offs_n, mask_n `[BLOCK_N]`.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(OG, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = pid // tiles_m
    group = tile_n // tiles_n
    cols = tile_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image, p, q = pixels(offs_m, M, P, Q)
    first_h, first_w = p * STRIDE_H - TOP, q * STRIDE_W - LEFT
    offs_x = image.to(tl.int64) * in_units(stride_xb, UNIT) + group.to(tl.int64) * CG * stride_xc
    offs_x += first_h.to(tl.int64) * in_units(stride_xh, UNIT) + first_w.to(tl.int64) * in_units(stride_xw, UNIT)
    offs_n = group * OG + tl.minimum(cols, OG - 1)
    return offs_m, image, p, q, first_h, first_w, offs_x, group * OG + cols, offs_n, cols < OG


@triton.jit
def taps_inside(
    first_h, first_w, H, W,
    TAPS: tl.constexpr, S: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
):
    """Tells which taps of each pixel, the first at first_h, first_w, lie in x: a bit each, if 32 are enough."""
    bits = tl.zeros(first_h.shape, tl.int32)
    if PADDED and TAPS <= 32:
        for t in tl.static_range(TAPS):
            inside = is_inside(first_h + t // S * DILATION_H, H) & is_inside(first_w + t % S * DILATION_W, W)
            bits |= inside.to(tl.int32) << t
    return bits


@triton.jit
def load_im2col(
    x_ptr, first_h, first_w, bits, k, H, W, stride_xc, stride_xh, stride_xw, outside_ptr,
    K: tl.constexpr, CG: tl.constexpr, S: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PADDED: tl.constexpr, UNIT: tl.constexpr,
):
    """Loads columns k to k + 128 of im2col(x), `[BLOCK_M, 128]`: 0 behind K and, without outside_ptr, beside x.

    Column k is channel k % CG of tap k // CG. If CG is a multiple of 128 there is one tap, the same for all threads; if
    it is one of 8, 16 bytes are one load; else columns are gathered in smaller pieces, down to one by one.

    Args:
        x_ptr: `[BLOCK_M]`, the first tap of each pixel, channel 0; it can lie beside x.
        first_h, first_w: `[BLOCK_M]`, where that is; bits: `taps_inside`.
        outside_ptr: 128 elements to read instead of those beside x: so that these are not put in after the load, by
            threads, between memory and tensor cores.
        PADDED: whether a pixel can see what is beside x.
    """
    offs = tl.arange(0, 128)
    if CG % 128 == 0:
        at = k  # a number: what does not depend on it can leave the loop
        c = k // 128 % (CG // 128) * 128  # k % CG, and the compiler sees that 128 divides it
        ptrs = x_ptr[:, None] + (offs * stride_xc)[None, :]
    else:
        at = k + offs[None, :]
        c = at % CG
        ptrs = tl.broadcast_to(x_ptr[:, None], (x_ptr.shape[0], 128))
    tap = at // CG
    r = tap // S * DILATION_H
    s = tap % S * DILATION_W
    # what one pixel of y sees is less than 2**31 elements apart: `conv_refuses` looks
    ptrs = ptrs + (r * in_units(stride_xh, UNIT) + s * in_units(stride_xw, UNIT) + c * stride_xc)
    exists = tl.broadcast_to(at < K, ptrs.shape)
    if PADDED:
        if K // CG <= 32:
            inside = ((bits[:, None] >> tl.minimum(tap, 31)) & 1) != 0
        else:
            inside = is_inside(first_h[:, None] + r, H) & is_inside(first_w[:, None] + s, W)
        inside = tl.broadcast_to(inside, ptrs.shape)
        if outside_ptr is None:
            x = tl.load(ptrs, mask=inside if K % 128 == 0 else inside & exists, other=0.0)
        elif K % 128 == 0:
            x = tl.load(tl.where(inside, ptrs, outside_ptr + offs[None, :]))
        else:
            x = tl.load(tl.where(inside, ptrs, outside_ptr + offs[None, :]), mask=exists, other=0.0)
    elif K % 128 != 0:
        x = tl.load(ptrs, mask=exists, other=0.0)
    else:
        x = tl.load(ptrs)
    return x
