"""Convolves groups of one channel of x each: bound by memory, without matrix products."""

import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import load_grid
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.kernel.conv import geometry_flags
from gs_kernels.qconv2d.kernel.im2col import is_inside
from gs_kernels.qconv2d.tiles import depthwise_tile
from gs_kernels.qmatmul.kernel.dequantize import kernel_tensors
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import epilogue, in_units, is_whole, pixels, split_zero, strides_of, unit_of


@triton.jit
def _depthwise_kernel(
    y_ptr,
    x_ptr, x_scale_ptr, x_zero_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, bias_ptr,
    residual_ptr, residual_scale_ptr, residual_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, N, OG, H, W, P, Q,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_sn, stride_sg, stride_rb, stride_rc, stride_rh, stride_rw,
    K: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Computes a tile of y, `[pixels, channels]`, a tap at a time.

    Of float x, weights are not rounded; of int8, sums are exact.
    OG: channels of y for each of x.
    """
    WIDTH: tl.constexpr = 8 * BITS
    WHOLE: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if WHOLE else tl.float32
    HALVES: tl.constexpr = zero_ptr is None and is_whole(2 * ZERO)  # zero points in half steps are part of exact sums
    N = in_units(N, UNIT_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    offs_m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_o < N)[None, :]
    offs_n = tl.minimum(offs_o, N - 1)
    image, p, q = pixels(offs_m, M, P, Q)
    first_h, first_w = p * STRIDE_H - TOP, q * STRIDE_W - LEFT
    stride_xh, stride_xw = in_units(stride_xh, UNIT), in_units(stride_xw, UNIT)
    rows = image.to(tl.int64) * in_units(stride_xb, UNIT)
    rows += first_h.to(tl.int64) * stride_xh + first_w.to(tl.int64) * stride_xw
    # not the clamped ones, whose neighbourhood in memory the compiler cannot see
    x_ptrs = x_ptr + rows[:, None] + ((offs_o // OG).to(tl.int64) * stride_xc)[None, :]
    if x_zero_ptr is not None:
        x_zero = tl.load(x_zero_ptr).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    x_sums = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for k in range(K):
        r, s = k // S * DILATION_H, k % S * DILATION_W
        inside = (offs_o < N)[None, :]
        if PADDED:
            inside = inside & (is_inside(first_h + r, H) & is_inside(first_w + s, W))[:, None]
        mask_x = inside & tl.full((BLOCK_M, 1), True, tl.int1)
        x = tl.load(x_ptrs + (r * stride_xh + s * stride_xw), mask=mask_x, other=0)
        word = tl.load(codes_ptr + (k // 128 * N + offs_n) * WIDTH + k % 128 % WIDTH)
        code = (word >> (k % 128 // WIDTH * BITS)).to(tl.int32) & ((1 << BITS) - 1)
        g = k // GROUP
        scale, zero = load_grid(scale_ptr, zero_ptr, offs_n * stride_sn + g * stride_sg, ZERO)
        if WHOLE:
            x = x.to(tl.int32)
            if x_zero_ptr is not None:
                x = tl.where(inside, x - x_zero, 0)
            near2, fraction = split_zero(zero, 2)
            part += x * (2 * code - near2)[None, :]
            if not HALVES:
                x_sums += x
            if (k + 1) % GROUP == 0:
                sums = part.to(tl.float32) * 0.5
                if not HALVES:
                    sums -= fraction[None, :] * x_sums.to(tl.float32)
                    x_sums = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                acc += sums * scale[None, :]
                part = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        elif levels_ptr is not None:
            acc += x.to(tl.float32) * (tl.load(levels_ptr + code) * scale)[None, :]
        else:
            acc += x.to(tl.float32) * ((code.to(tl.float32) - zero) * scale)[None, :]

    y = epilogue(
        acc, offs_m, offs_o, offs_m < M, offs_o < N, image, p, q, None, stride_rb, stride_rc, stride_rh, stride_rw,
        x_scale_ptr, bias_ptr, residual_ptr, residual_scale_ptr, residual_zero_ptr,
        out_scale_ptr, out_zero_ptr, ACTIVATION, UNIT_N,
    )
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_o[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def convolve_depthwise(
    y: Tensor, x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None,
    weight: PackedWeight, bias: Tensor | None, requant: tuple[Tensor | None, ...], geometry: ConvGeometry,
    activation: str,
) -> None:
    """Writes y `[B, O, P, Q]`, channels-last.

    requant: residual, its scale and zero point, scale and zero point of y.
    """
    codes, scale, zero_points, zero, levels = kernel_tensors(weight)
    k = weight.shape[1]
    b, o, p, q = y.shape
    m = b * p * q
    block_m, block_n, warps = depthwise_tile(o)
    flags = geometry_flags(geometry)
    launch(
        _depthwise_kernel, (-(-m // block_m) * -(-o // block_n),),
        y, x, x_scale, x_zero, codes, scale, zero_points, levels, bias, *requant,
        m, o, o // geometry.groups, *x.shape[2:], p, q,
        *x.stride(), *scale.stride(), *strides_of(requant[0]),
        K=k, **flags, BITS=weight.bits, GROUP=k // scale.shape[1], ZERO=zero, ACTIVATION=activation,
        UNIT=unit_of(x), UNIT_N=unit_of(requant[0], o), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
    )
