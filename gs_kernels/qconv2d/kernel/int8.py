"""Multiplies images of 8-bit codes with a packed weight: sums of integers, scaled once a group; 8-bit codes again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import code_block, code_factor, code_middle
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.kernel.conv import geometry_flags
from gs_kernels.qconv2d.kernel.im2col import load_im2col, place_tile, taps_inside
from gs_kernels.qmatmul.kernel.dequantize import grouping, kernel_tensors
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.bound_calls import fresh, keep
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import (
    epilogue,
    in_units,
    real_sums,
    reduce_partials,
    strides_of,
    twice,
    unit_of,
)


@triton.jit
def _qconv2d_int8_kernel(
    y_ptr,
    x_ptr, x_scale_ptr, x_zero_ptr, outside_ptr, code_sums_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr,
    residual_ptr, residual_scale_ptr, residual_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, OG, H, W, P, Q,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_sn, stride_sg, stride_rb, stride_rc, stride_rh, stride_rw,
    K: tl.constexpr, CG: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr, UNIT: tl.constexpr, UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Computes a tile of y, `[pixels, channels]`; with SPLIT_K, twice a partial sum, int32 `[SPLIT_K, M, O]`.

    outside_ptr: 128 times the zero point of x as a code, if x has one and pixels can see what is beside it.
    GROUP: 0 if there is one group, the only case that splits.
    """
    WIDTH: tl.constexpr = 8 * BITS
    MIDDLE2: tl.constexpr = int(2 * code_middle(BITS))
    FACTOR: tl.constexpr = int(code_factor(BITS, False, ASM))
    CENTRED: tl.constexpr = zero_ptr is None and 2 * ZERO == MIDDLE2
    BLOCKS: tl.constexpr = (K + 127) // 128
    TURNS: tl.constexpr = (BLOCKS + SPLIT_K - 1) // SPLIT_K
    OG = in_units(OG, UNIT_N)
    N = OG * GROUPS
    first = tl.program_id(1) * TURNS
    offs_m, image, p, q, first_h, first_w, offs_x, cols, offs_n, mask_n = place_tile(
        M, OG, P, Q, stride_xb, stride_xc, stride_xh, stride_xw,
        CG, STRIDE_H, STRIDE_W, TOP, LEFT, UNIT, BLOCK_M, BLOCK_N,
    )
    bits = taps_inside(first_h, first_w, H, W, K // CG, S, DILATION_H, DILATION_W, PADDED)
    offs_w = offs_n[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [BLOCK_N, WIDTH]
    offs_s = offs_n * stride_sn
    codes_ptr += first.to(tl.int64) * N * WIDTH
    if x_zero_ptr is None:
        x_zero = None
    else:
        x_zero = tl.load(x_zero_ptr).to(tl.int32)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    x_sums = tl.zeros((BLOCK_M,), tl.int32)
    for turn in range(tl.maximum(tl.minimum(TURNS, BLOCKS - first), 1)):
        k = (first + turn) * 128
        words = tl.load(codes_ptr + offs_w)
        x = load_im2col(
            x_ptr + offs_x, first_h, first_w, bits, k, H, W, stride_xc, stride_xh, stride_xw, outside_ptr,
            K, CG, S, DILATION_H, DILATION_W, PADDED, UNIT,
        )
        w = code_block(words, BITS, tl.int8, False, ASM, False)
        if GROUP == 0:
            part = tl.dot(w, tl.trans(x), part, out_dtype=tl.int32)
            if not CENTRED:
                x_sums += tl.sum(x.to(tl.int32), 1)
        else:
            # groups end with a block, or with a quarter of one
            PARTS: tl.constexpr = 1 if GROUP % 128 == 0 else 4
            for i in tl.static_range(PARTS):
                x_mine = x if PARTS == 1 else tl.where((tl.arange(0, 128) // 32 == i)[None, :], x, 0)
                part = tl.dot(w, tl.trans(x_mine), part, out_dtype=tl.int32)
                x_sums += tl.sum(x_mine.to(tl.int32), 1)
                end = k + 128 // PARTS * (i + 1)
                if end % GROUP == 0 and end <= K:
                    g = end // GROUP - 1
                    acc += real_sums(
                        twice(part, FACTOR), x_sums, code_sums_ptr, x_zero, GROUP, scale_ptr, zero_ptr,
                        offs_s + g * stride_sg, offs_n * (K // GROUP) + g, ZERO, MIDDLE2, 2,
                    )
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
                    x_sums = tl.zeros((BLOCK_M,), tl.int32)
        codes_ptr += N * WIDTH

    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offs_y = offs_m.to(tl.int64)[:, None] * N + cols[None, :]
    if SPLIT_K > 1:
        y_ptr += tl.program_id(1).to(tl.int64) * M * N
        sums = twice(part, FACTOR)
        if not CENTRED:
            sums += (MIDDLE2 - int(2 * ZERO)) * x_sums[None, :]
        tl.store(y_ptr + offs_y, tl.trans(sums), mask=mask)
    else:
        if GROUP == 0:
            acc = real_sums(
                twice(part, FACTOR), x_sums, code_sums_ptr, x_zero, K, scale_ptr, zero_ptr, offs_s, offs_n,
                ZERO, MIDDLE2, 2,
            )
        y = epilogue(
            tl.trans(acc), offs_m, cols, offs_m < M, mask_n, image, p, q,
            None, stride_rb, stride_rc, stride_rh, stride_rw, x_scale_ptr, bias_ptr,
            residual_ptr, residual_scale_ptr, residual_zero_ptr, out_scale_ptr, out_zero_ptr, ACTIVATION, UNIT_N,
        )
        tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)


def _pixel_of_zeros(x_zero: Tensor) -> Tensor:
    """Makes the codes of 128 channels of a pixel outside the image."""
    return x_zero.expand(128).to(torch.int8, memory_format=torch.contiguous_format)


def convolve_int8(
    y: Tensor, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, code_sums: Tensor | None,
    weight: PackedWeight, bias: Tensor | None, requant: tuple[Tensor | None, ...],
    geometry: ConvGeometry, activation: str, plan: Plan, asm: bool,
) -> None:
    """Writes y `[B, O, P, Q]`, channels-last, by the plan's tiles.

    requant: residual, its scale and zero point, scale and zero point of y.
    """
    codes, scale, zero_points, zero, _ = kernel_tensors(weight)
    k, group = weight.shape[1], grouping(weight.shape[1], weight.group_size)
    b, o, p, q = y.shape
    m, og = b * p * q, o // geometry.groups
    split = plan.partials(-(-k // 128))
    sums = y if split == 1 else fresh(x.new_empty(split, m, o, dtype=torch.int32))
    tiles = -(-m // plan.block_m) * geometry.groups * -(-og // plan.block_n)
    outside = None
    if x_zero is not None and any(geometry.sides):
        outside = keep(_pixel_of_zeros, x_zero)
    launch(
        _qconv2d_int8_kernel, (tiles, split),
        sums, x, x_scale, x_zero, outside, code_sums, codes, scale, zero_points, bias, *requant,
        m, og, *x.shape[2:], p, q,
        *x.stride(), *scale.stride(), *strides_of(requant[0]),
        K=k, CG=k // geometry.taps, GROUPS=geometry.groups, **geometry_flags(geometry),
        BITS=weight.bits, GROUP=0 if scale.shape[1] == 1 else group, ZERO=zero, ASM=asm, ACTIVATION=activation,
        SPLIT_K=split, UNIT=unit_of(x), UNIT_N=unit_of(requant[0], og), BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        num_warps=plan.warps, num_stages=plan.stages,
    )
    if split > 1:
        reduce_partials(
            y, sums, bias, activation,
            weight=(scale, zero, k), x_zero=x_zero, code_sums=code_sums, x_scale=x_scale, requant=requant,
        )
