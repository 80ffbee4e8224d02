"""Writes and reads quantized keys and values on a GPU: a program has some tokens of one head, and their whole rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.fake_quant.tiles import power_of_two
from gs_kernels.kv_cache.ref import LIMITS, OFFSET
from gs_kernels.observe.ref import SCALE_FLOOR
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import clamp, inverse, round_half_even

ELEMENTS = 4096  # of a program: 16 tokens of 256
EIGHT = tl.constexpr(OFFSET)
FLOOR = tl.constexpr(SCALE_FLOOR)


@triton.jit
def _tokens(H, T, BLOCK_T: tl.constexpr):
    """Returns the batch row and head of this program, its tokens and which of them exist."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(T, BLOCK_T)
    row = pid // blocks
    offs_t = pid % blocks * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T] int64
    return row // H, row % H, offs_t, offs_t < T


@triton.jit
def _kv_write_kernel(
    codes_ptr, scale_ptr,
    x_ptr, position_ptr,
    H, T, C,
    stride_cb, stride_ch, stride_ct, stride_sb, stride_sh, stride_st, stride_xb, stride_xh, stride_xt,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    WIDTH: tl.constexpr, PLANES: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
):
    b, h, offs_t, mask_t = _tokens(H, T, BLOCK_T)
    offs_w = tl.arange(0, BLOCK_W)
    plane = tl.arange(0, PLANES)
    offs_d = plane[:, None] * WIDTH + offs_w[None, :]  # [PLANES, BLOCK_W]
    inside = (offs_w < WIDTH)[None, :] & (offs_d < SIZE)
    x_ptr += b * stride_xb + h * stride_xh
    x = tl.load(
        x_ptr + (offs_t * stride_xt)[:, None, None] + offs_d[None, :, :],
        mask=mask_t[:, None, None] & inside[None, :, :], other=0.0,
    ).to(tl.float32)  # [BLOCK_T, PLANES, BLOCK_W]

    to = offs_t if position_ptr is None else offs_t + tl.load(position_ptr)
    mask_t = mask_t & (to >= 0) & (to < C)
    scale_ptr += b * stride_sb + h * stride_sh
    owner = offs_d // (SIZE // GROUPS)
    inv = tl.zeros([BLOCK_T, PLANES, BLOCK_W], tl.float32)
    for g in tl.static_range(GROUPS):
        own = inside & (owner == g)
        size = tl.where(own[None, :, :], tl.abs(x), 0.0)
        nan = tl.max(tl.max(tl.where(size == size, 0, 1), 2), 1) > 0
        most = tl.where(nan, float("nan"), tl.max(tl.max(size, 2), 1))  # [BLOCK_T]
        span = most + most
        scale = tl.div_rn(span, tl.full(span.shape, -2 * QMIN, tl.float32))
        scale = tl.where(span == 0.0, 1.0, tl.maximum(scale, FLOOR, propagate_nan=tl.PropagateNan.ALL))
        sign = 1.0
        if QMAX < -QMIN:  # the largest in size gets the lowest code
            top = tl.max(tl.max(tl.where(own[None, :, :], x, 0.0), 2), 1)
            sign = tl.where((top == most) & (most > 0.0), -1.0, 1.0)
        tl.store(scale_ptr + to * stride_st + g, scale * sign, mask=mask_t)
        inv = tl.where(own[None, :, :], (inverse(scale, scale * 0.0) * sign)[:, None, None], inv)

    level = clamp(round_half_even(clamp(x * inv, QMIN - 2, QMAX + 2)), QMIN, QMAX)
    code = tl.where(level == level, level, QMIN).to(tl.int32)
    if PLANES == 2:
        code = tl.sum((tl.where(inside[None, :, :], code, 0) + EIGHT) << (4 * plane)[None, :, None], 1)
    else:
        code = tl.sum(code, 1)  # [BLOCK_T, BLOCK_W]
    codes_ptr += b * stride_cb + h * stride_ch
    tl.store(
        codes_ptr + (to * stride_ct)[:, None] + offs_w[None, :], code.to(codes_ptr.dtype.element_ty),
        mask=mask_t[:, None] & (offs_w < WIDTH)[None, :],
    )


@triton.jit
def _kv_read_kernel(
    y_ptr,
    codes_ptr, scale_ptr,
    H, T,
    stride_cb, stride_ch, stride_ct, stride_sb, stride_sh, stride_st,
    SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, PLANES: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
):
    b, h, offs_t, mask_t = _tokens(H, T, BLOCK_T)
    offs_w = tl.arange(0, BLOCK_W)
    codes_ptr += b * stride_cb + h * stride_ch
    scale_ptr += b * stride_sb + h * stride_sh + offs_t * stride_st
    y_ptr += (b * H + h) * T * SIZE + offs_t * SIZE
    code = tl.load(
        codes_ptr + (offs_t * stride_ct)[:, None] + offs_w[None, :],
        mask=mask_t[:, None] & (offs_w < WIDTH)[None, :], other=0,
    ).to(tl.int32)  # [BLOCK_T, BLOCK_W]
    for plane in tl.static_range(PLANES):
        level = code if PLANES == 1 else ((code >> (4 * plane)) & 15) - EIGHT
        offs_d = plane * WIDTH + offs_w
        mask = mask_t[:, None] & ((offs_w < WIDTH) & (offs_d < SIZE))[None, :]
        scale = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
        for g in tl.static_range(GROUPS):
            first = g * (SIZE // GROUPS)
            if first < (plane + 1) * WIDTH and first + SIZE // GROUPS > plane * WIDTH:
                of_group = tl.load(scale_ptr + g, mask=mask_t, other=0.0)  # [BLOCK_T]
                scale = tl.where((offs_d >= first)[None, :], of_group[:, None], scale)
        y = level.to(tl.float32) * scale
        tl.store(y_ptr[:, None] + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def _rows(codes: Tensor, scale: Tensor, size: int, tokens: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Returns the grid, and what both kernels take of the form of a token."""
    width = codes.shape[-1]
    block_w = triton.next_power_of_2(width)
    planes = 1 if codes.dtype == torch.int8 else 2
    block_t = power_of_two(tokens, max(1, ELEMENTS // (planes * block_w)))
    flags = {"SIZE": size, "GROUPS": scale.shape[-1], "WIDTH": width, "PLANES": planes, "BLOCK_W": block_w}
    return (codes.shape[0] * codes.shape[1] * triton.cdiv(tokens, block_t),), flags | {"BLOCK_T": block_t}


def kv_write__triton(codes: Tensor, scale: Tensor, x: Tensor, position: Tensor | None) -> None:
    tokens, size = x.shape[2:]
    grid, flags = _rows(codes, scale, size, tokens)
    low, high = LIMITS[codes.dtype]
    launch(
        _kv_write_kernel, grid, codes, scale, x, position, codes.shape[1], tokens, codes.shape[2],
        *codes.stride()[:3], *scale.stride()[:3], *x.stride()[:3], QMIN=low, QMAX=high, **flags,
    )


def kv_read_triton(codes: Tensor, scale: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    b, h, tokens = codes.shape[:3]
    y = fresh(torch.empty((b, h, tokens, size), dtype=dtype, device=codes.device))
    if y.numel():
        grid, flags = _rows(codes, scale, size, tokens)
        launch(
            _kv_read_kernel, grid, y, codes, scale, h, tokens, *codes.stride()[:3], *scale.stride()[:3], **flags
        )
    return y
