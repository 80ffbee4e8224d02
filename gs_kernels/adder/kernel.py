"""Computes L1 products and their gradient on a GPU.

No tensor core subtracts, so a pair of numbers costs two instructions, a difference and a sum, and all else must be
little beside them: a program holds a tile of sums in registers, loads both operands, K after K, in the form that the
sums have, and no operand needs a mask. So images with padding are copied with their zeros, filters as `[K, channels]`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.adder.geometry import forward_axis, gradient_axis
from gs_kernels.adder.tiles import choose_gradient_tile, choose_tile
from gs_kernels.qconv2d.dense import empty_image
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qmatmul.kernel import device_of
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import epilogue, strides_of

SIGNS = tl.constexpr(-2139062144)  # 0x80808080
VABSDIFF4 = tl.constexpr("vabsdiff4.u32.u32.u32.add $0, $1, $2, $3;")


@triton.jit
def _lay_image_kernel(
    to_ptr,
    x_ptr, zero_ptr,
    C, H, W, LC, LH, LW, phases_h, phases_w, stride_h, stride_w, top, left, tiles,
    stride_xb, stride_xc, stride_xh, stride_xw,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Copies images into `[B, LC, phases_h, phases_w, LH, LW]`, zeros around: of phase (i, j) each stride-th pixel.

    WORDS: copies codes, four channels in a word, each 128 higher, zero around.
    """
    pid = tl.program_id(0).to(tl.int64)
    plane = pid // tiles
    offs = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    phase, image = plane % (phases_h * phases_w), plane // (phases_h * phases_w)
    b, c = image // LC, image % LC
    h = offs // LW * stride_h + (phase // phases_w - top)
    w = offs % LW * stride_w + (phase % phases_w - left)
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x_ptr += b * stride_xb
    at = h * stride_xh + w * stride_xw
    if WORDS:
        if zero_ptr is None:
            zero = 0
        else:
            zero = tl.load(zero_ptr).to(tl.int32)
        value = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(4):
            channel = c * 4 + i
            code = tl.load(x_ptr + tl.minimum(channel, C - 1) * stride_xc + at, mask=inside, other=0).to(tl.int32)
            code = tl.where(channel < C, tl.where(inside, code, zero), 0)
            value |= (code & 255) << 8 * i
        value = value ^ SIGNS
    else:
        value = tl.load(x_ptr + c * stride_xc + at, mask=inside, other=0.0)
    tl.store(to_ptr + plane * LH * LW + offs, value, mask=offs < LH * LW)


@triton.jit
def _lay_filters_kernel(
    to_ptr,
    w_ptr,
    N, K, S, LN, factor,
    stride_wn, stride_wk, stride_wr, stride_ws,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Copies filters into `[R * S, K, LN]` fp32, times a factor; WORDS: `[R * S, ceil(K / 4), LN]`, of four codes."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LN, BLOCK)
    LK = tl.cdiv(K, 4) if WORDS else K
    row = pid // tiles
    offs_n = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    tap, k = row // LK, row % LK
    w_ptr += tap // S * stride_wr + tap % S * stride_ws
    mask = offs_n < N
    if WORDS:
        value = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(4):
            channel = k * 4 + i
            code = tl.load(w_ptr + tl.minimum(channel, K - 1) * stride_wk + offs_n * stride_wn, mask=mask, other=0)
            value |= (tl.where(channel < K, code.to(tl.int32), 0) & 255) << 8 * i
        value = value ^ SIGNS
    else:
        value = tl.load(w_ptr + k * stride_wk + offs_n * stride_wn, mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(to_ptr + row * LN + offs_n, value, mask=offs_n < LN)


@triton.jit
def _byte_differences(a, b):
    """Sums the differences of the four bytes of words."""
    total = tl.abs((a & 255) - (b & 255))
    for i in tl.static_range(1, 4):
        total += tl.abs((a >> 8 * i & 255) - (b >> 8 * i & 255))
    return total


@triton.jit
def _add_differences(acc, x_ptr, w_ptr, stride_xc, LN, ASM: tl.constexpr, COUNT: tl.constexpr):
    """Adds `|x - w|` of COUNT channels, of numbers or of words of codes."""
    for i in tl.static_range(COUNT):
        x, w = tl.load(x_ptr + i * stride_xc), tl.load(w_ptr + i * LN)
        if acc.dtype == tl.float32:
            acc += tl.abs(x.to(tl.float32) - w)
        elif ASM:
            x, w = tl.broadcast_to(x, acc.shape), tl.broadcast_to(w, acc.shape)
            acc = tl.inline_asm_elementwise(VABSDIFF4, "=r,r,r,r", [x, w, acc], dtype=tl.int32, is_pure=True, pack=1)
        else:
            acc += _byte_differences(x, w)
    return acc


@triton.jit
def _place(
    pid, N, length, tiles_m, ALIGN: tl.constexpr, BACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Returns the image of a program, its pixels, of those that lie side by side, and its channels.

    BACK: the last tile begins earlier, so that it ends with the image. ALIGN: what places of tiles are a multiple of.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = pid // tiles_n
    start = tile % tiles_m * BLOCK_M
    if BACK:
        start = tl.multiple_of(tl.minimum(start, length - BLOCK_M), ALIGN)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return (tile // tiles_m).to(tl.int64), start + tl.arange(0, BLOCK_M), offs_n


@triton.jit
def _l1_sums(
    x_ptr, w_ptr, offs_m, offs_n,
    C, LN, stride_xc, stride_ph, stride_pw, pitch,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ASM: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):
    """Computes `sum |x - w|` of a tile, one tap of the filter after the other."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    x_ptrs = x_ptr + offs_m[None, :]
    w_ptrs = w_ptr + offs_n[:, None]
    whole = C // UNROLL * UNROLL
    for tap in range(R * S):
        h, w = tap // S * DILATION_H, tap % S * DILATION_W
        start = h % STRIDE_H * stride_ph + w % STRIDE_W * stride_pw + h // STRIDE_H * pitch + w // STRIDE_W
        xs, ws = x_ptrs + start, w_ptrs + tl.cast(tap, tl.int64) * C * LN
        for _ in range(0, whole, UNROLL):
            acc = _add_differences(acc, xs, ws, stride_xc, LN, ASM, UNROLL)
            xs += UNROLL * stride_xc
            ws += UNROLL * LN
        for _ in range(whole, C):
            acc = _add_differences(acc, xs, ws, stride_xc, LN, ASM, 1)
            xs += stride_xc
            ws += LN
    return acc


@triton.jit
def _adder_kernel(
    y_ptr,
    x_ptr, w_ptr,
    N, P, Q, C, LN, length, pitch, tiles_m,
    stride_yb, stride_yn, stride_yp, stride_yq, stride_xb, stride_xc, stride_ph, stride_pw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ALIGN: tl.constexpr, BACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):
    """Writes a tile of `-sum |x - w|`, `[pixels, channels]`."""
    image, offs_m, offs_n = _place(tl.program_id(0), N, length, tiles_m, ALIGN, BACK, BLOCK_M, BLOCK_N)
    acc = _l1_sums(
        x_ptr + image * stride_xb, w_ptr, offs_m, offs_n, C, LN, stride_xc, stride_ph, stride_pw, pitch,
        R, S, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, False, tl.float32, BLOCK_M, BLOCK_N, UNROLL,
    )
    p, q = offs_m // pitch, offs_m % pitch
    offs_y = p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
    offs = (offs_n.to(tl.int64) * stride_yn)[:, None] + offs_y[None, :]
    mask = (offs_n < N)[:, None] & ((p < P) & (q < Q))[None, :]
    tl.store(y_ptr + image * stride_yb + offs, (-acc).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adder_int8_kernel(
    y_ptr,
    x_ptr, w_ptr, scale_ptr, bias_ptr,
    residual_ptr, residual_scale_ptr, residual_zero_ptr, out_scale_ptr, out_zero_ptr,
    N, P, Q, C, LN, length, pitch, tiles_m, stride_sn,
    stride_xb, stride_xc, stride_ph, stride_pw, stride_rb, stride_rc, stride_rh, stride_rw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ASM: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):
    """Writes a tile of `-sum |x - w|` of codes, x and w being words of four, and what follows, channels-last."""
    image, offs_m, offs_n = _place(tl.program_id(0), N, length, tiles_m, 1, False, BLOCK_M, BLOCK_N)
    sums = _l1_sums(
        x_ptr + image * stride_xb, w_ptr, offs_m, offs_n, C, LN, stride_xc, stride_ph, stride_pw, pitch,
        R, S, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, ASM, tl.int32, BLOCK_M, BLOCK_N, UNROLL,
    )
    y = -tl.trans(sums)
    p, q = offs_m // pitch, offs_m % pitch
    mask_m, mask_n = (p < P) & (q < Q), offs_n < N
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n * stride_sn, mask=mask_n, other=0.0)
        y = epilogue(
            y.to(tl.float32) * scale[None, :], offs_m, offs_n, mask_m, mask_n, image, p, q,
            None, stride_rb, stride_rc, stride_rh, stride_rw, None, bias_ptr,
            residual_ptr, residual_scale_ptr, residual_zero_ptr, out_scale_ptr, out_zero_ptr, ACTIVATION, 1,
        )
    offs_y = ((image * P + p) * Q + q) * N
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_y[:, None] + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_channels_kernel(to_ptr, dy_ptr, N, PIXELS, tiles, BLOCK: tl.constexpr):
    """Writes the sums of dy `[B, N, PIXELS]` over its channels, `[B, PIXELS]` fp32."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    offs = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = offs < PIXELS
    dy_ptr += b * N * PIXELS
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(N):
        acc += tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy_ptr += PIXELS
    tl.store(to_ptr + b * PIXELS + offs, acc, mask=mask)


@triton.jit
def _add_gradients(acc, x, dy_ptr, w_ptr, PIXELS, LN, COUNT: tl.constexpr):
    """Adds `(clamp(w - x, -1, 1) + 1) / 2 * dy` of COUNT channels, x being `(1 - x) / 2` and w being `w / 2`."""
    for i in tl.static_range(COUNT):
        dy, w = tl.load(dy_ptr + i * PIXELS).to(tl.float32), tl.load(w_ptr + i * LN)
        share = tl.minimum(tl.maximum(x + w, 0.0), 1.0)  # a sum that saturates, in one instruction
        acc = tl.fma(share, tl.broadcast_to(dy, acc.shape), acc)
    return acc


@triton.jit
def _adder_dx_kernel(
    dx_ptr,
    x_ptr, dy_ptr, dy_sum_ptr, w_ptr,
    C, H, W, N, LC, LH, LW, top, left, first_h, first_w, length, phases_w, images, tiles_m,
    stride_xb, stride_xc, stride_xh, stride_xw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):
    """Writes a tile of `sum clamp(w - x, -1, 1) dy`, `[pixels, channels]`, for pixels of x that meet the same taps.

    dy_ptr: `[B, N, LH, LW]`, from row first_h and column first_w of dy on. dy_sum_ptr: its sums over N.
    w_ptr: `[R * S, N, LC]`.
    """
    programs = images * tiles_m * tl.cdiv(C, BLOCK_N)
    phase = tl.program_id(0) // programs
    phase_h, phase_w = phase // phases_w, phase % phases_w
    image, offs_m, offs_n = _place(tl.program_id(0) % programs, C, length, tiles_m, 1, False, BLOCK_M, BLOCK_N)
    h, w = offs_m // LW * STRIDE_H + phase_h, offs_m % LW * STRIDE_W + phase_w
    mask = (offs_n < C)[:, None] & ((h < H) & (w < W))[None, :]
    offs_x = h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    x_ptr += image * stride_xb
    x = tl.load(x_ptr + (offs_n.to(tl.int64) * stride_xc)[:, None] + offs_x[None, :], mask=mask, other=0.0)
    x = 0.5 - 0.5 * x.to(tl.float32)

    PIXELS = LH * LW
    dy_ptrs = dy_ptr + image * N * PIXELS + offs_m[None, :]
    dy_sum_ptrs = dy_sum_ptr + image * PIXELS + offs_m
    w_ptrs = w_ptr + offs_n[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole = N // UNROLL * UNROLL
    for tap in range(R * S):
        from_h, from_w = phase_h + top - tap // S * DILATION_H, phase_w + left - tap % S * DILATION_W
        if (from_h % STRIDE_H == 0) & (from_w % STRIDE_W == 0):
            start = (from_h // STRIDE_H - first_h) * LW + (from_w // STRIDE_W - first_w)
            total += tl.load(dy_sum_ptrs + start)
            dys, ws = dy_ptrs + start, w_ptrs + tl.cast(tap, tl.int64) * N * LC
            for _ in range(0, whole, UNROLL):
                acc = _add_gradients(acc, x, dys, ws, PIXELS, LC, UNROLL)
                dys += UNROLL * PIXELS
                ws += UNROLL * LC
            for _ in range(whole, N):
                acc = _add_gradients(acc, x, dys, ws, PIXELS, LC, 1)
                dys += PIXELS
                ws += LC
    dx = 2.0 * acc - total[None, :]
    dx = tl.where(x == x, dx, x)
    offs_dx = (offs_n.to(tl.int64) * H * W)[:, None] + (h * W + w)[None, :]
    tl.store(dx_ptr + image * C * H * W + offs_dx, dx.to(dx_ptr.dtype.element_ty), mask=mask)


LAID = 1024  # elements of a program that copies
BEHIND = 256  # elements that may be read behind an image that was laid out


class Laid(NamedTuple):
    """Holds an image whose pixels of y lie side by side.

    length: of them, with those between rows, which are none of y. pitch: from row to row.
    strides: between images, channels, and the phases of rows and columns.
    is_copy: whether BEHIND elements follow.
    """

    image: Tensor
    length: int
    pitch: int
    strides: tuple[int, int, int, int]
    is_copy: bool


def _copy(
    x: Tensor, channels: int, phases: tuple[int, int], rows: int, columns: int, stride: tuple[int, int], top: int,
    left: int, zero: Tensor | None = None,
) -> Tensor:
    """Copies x into planes of `rows * columns` pixels, and BEHIND elements; of int8, words of four codes."""
    words = x.dtype == torch.int8
    planes = x.shape[0] * channels * phases[0] * phases[1]
    to = fresh(x.new_empty(planes * rows * columns + BEHIND, dtype=torch.int32 if words else x.dtype))
    tiles = triton.cdiv(rows * columns, LAID)
    launch(
        _lay_image_kernel, (planes * tiles,),
        to, x, zero, *x.shape[1:], channels, rows, columns, *phases, *stride, top, left, tiles, *x.stride(),
        WORDS=words, BLOCK=LAID,
    )
    return to


def _lay_image(x: Tensor, p: int, q: int, geometry: ConvGeometry, zero: Tensor | None = None) -> Laid:
    """Lays out x for a product with P * Q pixels; floats that are so already are taken as they are."""
    g, (_, c, h, w) = geometry, x.shape
    dense = x.stride(3) == 1 and (h == 1 or x.stride(2) == w)
    if x.dtype != torch.int8 and dense and g.stride == (1, 1) and not any(g.sides):
        length = (p - 1) * w + q
        if length >= BEHIND:
            return Laid(x, length, w, (x.stride(0), x.stride(1), 0, 0), False)
    down = forward_axis(g.r, g.stride_h, g.dilation_h, g.top, p)
    across = forward_axis(g.s, g.stride_w, g.dilation_w, g.left, q)
    phases = 1 + max(down.phases), 1 + max(across.phases)
    channels = triton.cdiv(c, 4) if x.dtype == torch.int8 else c
    plane = down.pixels * across.pixels
    to = _copy(x, channels, phases, down.pixels, across.pixels, g.stride, g.top, g.left, zero)
    row = phases[1] * plane
    strides = channels * phases[0] * row, phases[0] * row, row, plane
    return Laid(to, (p - 1) * across.pixels + q, across.pixels, strides, True)


def _lay_filters(weight: Tensor, block_n: int, transposed: bool = False, factor: float = 1.0) -> Tensor:
    """Copies filters into `[R * S, C, O up to whole blocks]` or, transposed, `[R * S, O, C up to whole blocks]`."""
    words = weight.dtype == torch.int8
    w = weight.transpose(0, 1) if transposed else weight
    n, k, r, s = w.shape
    columns = triton.cdiv(n, block_n) * block_n
    rows = triton.cdiv(k, 4) if words else k
    to = fresh(weight.new_empty((r * s, rows, columns), dtype=torch.int32 if words else torch.float32))
    launch(
        _lay_filters_kernel, (r * s * rows * triton.cdiv(columns, LAID),),
        to, w, n, k, s, columns, factor, *w.stride(), WORDS=words, BLOCK=LAID,
    )
    return to


def _flags(geometry: ConvGeometry) -> dict[str, int]:
    """Returns the constants of a geometry that kernels take."""
    g = geometry
    return {
        "R": g.r, "S": g.s, "STRIDE_H": g.stride_h, "STRIDE_W": g.stride_w,
        "DILATION_H": g.dilation_h, "DILATION_W": g.dilation_w,
    }


def _multiply(y: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> None:
    """Writes y `[B, O, P, Q]`, of any strides."""
    b, o, p, q = y.shape
    laid = _lay_image(x, p, q, geometry)
    tile = choose_tile(laid.length, o)
    filters = _lay_filters(weight, tile.block_n)
    tiles_m = triton.cdiv(laid.length, tile.block_m)
    places = (laid.length, laid.pitch, *laid.strides)
    launch(
        _adder_kernel, (b * tiles_m * triton.cdiv(o, tile.block_n),),
        y, laid.image, filters,
        o, p, q, x.shape[1], filters.shape[2], laid.length, laid.pitch, tiles_m, *y.stride(), *laid.strides,
        **_flags(geometry), ALIGN=math.gcd(16, *places), BACK=not laid.is_copy,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, UNROLL=tile.unroll, num_warps=tile.warps,
    )


def adder_conv2d_triton(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    y = fresh(x.new_empty(x.shape[0], weight.shape[0], *geometry.output(*x.shape[2:])))
    if y.numel():
        _multiply(y, x, weight, geometry)
    return y


def adder_linear_triton(x: Tensor, weight: Tensor) -> Tensor:
    y = fresh(x.new_empty(x.shape[0], weight.shape[0]))
    if y.numel():
        _multiply(y.mT[None, :, None], x.mT[None, :, None], weight[:, :, None, None], ConvGeometry(1, 1))
    return y


def adder_conv2d_dx_triton(dy: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    (b, c, h, w), n, g = x.shape, dy.shape[1], geometry
    dx = fresh(x.new_empty(x.shape))
    if not dx.numel():
        return dx
    down, rows, top = gradient_axis(g.r, g.stride_h, g.dilation_h, g.top, h)
    across, columns, left = gradient_axis(g.s, g.stride_w, g.dilation_w, g.left, w)
    dys = _copy(dy, n, (1, 1), rows, columns, (1, 1), top, left)
    sums = fresh(dy.new_empty(b * rows * columns + BEHIND, dtype=torch.float32))
    tiles = triton.cdiv(rows * columns, LAID)
    launch(_sum_channels_kernel, (b * tiles,), sums, dys, n, rows * columns, tiles, BLOCK=LAID)
    heights, widths = (max(phase.pixels for phase in axis) for axis in (down, across))
    length = (heights - 1) * columns + widths
    tile = choose_gradient_tile(length)
    filters = _lay_filters(weight, tile.block_n, transposed=True, factor=0.5)
    tiles_m = triton.cdiv(length, tile.block_m)
    launch(
        _adder_dx_kernel, (len(down) * len(across) * b * tiles_m * triton.cdiv(c, tile.block_n),),
        dx, x, dys, sums, filters,
        c, h, w, n, filters.shape[2], rows, columns,
        g.top, g.left, -top, -left, length, len(across), b, tiles_m, *x.stride(),
        **_flags(g), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, UNROLL=tile.unroll, num_warps=tile.warps,
    )
    return dx


def adder_int8_triton(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, geometry: ConvGeometry, zero: Tensor | None,
    residual: Tensor | None, residual_scale: Tensor | None, residual_zero: Tensor | None,
    out_scale: Tensor | None, out_zero: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:
    made = torch.int32 if scale is None else dtype if out_scale is None else torch.int8
    y = fresh(empty_image(x, weight.shape[0], geometry, made))
    if not y.numel():
        return y
    b, o, p, q = y.shape
    laid = _lay_image(x, p, q, geometry, zero)
    tile = choose_tile(laid.length, o)
    filters = _lay_filters(weight, tile.block_n)
    tiles_m = triton.cdiv(laid.length, tile.block_m)
    launch(
        _adder_int8_kernel, (b * tiles_m * triton.cdiv(o, tile.block_n),),
        y, laid.image, filters, scale, bias, residual, residual_scale, residual_zero, out_scale, out_zero,
        o, p, q, triton.cdiv(x.shape[1], 4), filters.shape[2], laid.length, laid.pitch, tiles_m,
        0 if scale is None or scale.numel() == 1 else scale.stride(0), *laid.strides, *strides_of(residual),
        **_flags(geometry), ASM=device_of(x)[0], ACTIVATION=activation,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, UNROLL=tile.unroll, num_warps=tile.warps,
    )
    return y
