"""Multiplies float images with a packed weight, as a matrix product that gathers its right operand."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.pack.layouts import PackedWeight
from gs_kernels.pack.triton_unpack import dequantize_block, weight_unit
from gs_kernels.qconv2d.geometry import ConvGeometry
from gs_kernels.qconv2d.kernel.im2col import load_im2col, place_tile, taps_inside
from gs_kernels.qmatmul.kernel.dequantize import grouping, kernel_tensors
from gs_kernels.qmatmul.tiles import Plan
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_epilogue import epilogue, in_units, reduce_partials, strides_of, unit_of


@triton.jit
def _qconv2d_kernel(
    y_ptr,
    x_ptr, codes_ptr, scale_ptr, zero_ptr, levels_ptr, bias_ptr, residual_ptr,
    M, OG, H, W, P, Q,
    stride_xb, stride_xc, stride_xh, stride_xw, stride_sn, stride_sg, stride_rb, stride_rc, stride_rh, stride_rw,
    K: tl.constexpr, CG: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr, SCALE_PARTS: tl.constexpr,
    UNIT: tl.constexpr, UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Computes a tile of y, `[pixels, channels]`; with SPLIT_K, a partial sum over K, fp32 `[SPLIT_K, M, O]`.

    y^T = W x^T, for the reasons that gs_kernels/qmatmul/kernel/matmul.py gives: this is its loop, with another x.
    """
    WIDTH: tl.constexpr = 8 * BITS
    T: tl.constexpr = x_ptr.dtype.element_ty
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

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for turn in range(tl.maximum(tl.minimum(TURNS, BLOCKS - first), 1)):
        k = (first + turn) * 128
        words = tl.load(codes_ptr + offs_w)
        x = load_im2col(
            x_ptr + offs_x, first_h, first_w, bits, k, H, W, stride_xc, stride_xh, stride_xw, None,
            K, CG, S, DILATION_H, DILATION_W, PADDED, UNIT,
        )
        grid = (scale_ptr, zero_ptr, levels_ptr, offs_s, stride_sg, k, (K + GROUP - 1) // GROUP)
        w, scale = dequantize_block(words, grid, BITS, GROUP, ZERO, T, ASM, not SCALE_PARTS)
        if SCALE_PARTS:
            part = tl.dot(w, tl.trans(x), input_precision="ieee")
            acc = tl.fma(part, tl.broadcast_to(scale, part.shape), acc)
        else:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        codes_ptr += N * WIDTH

    UNIT_W: tl.constexpr = weight_unit(ZERO, zero_ptr is None and levels_ptr is None, T, ASM, not SCALE_PARTS)
    y = tl.trans(acc) * UNIT_W
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if SPLIT_K > 1:
        y_ptr += tl.program_id(1).to(tl.int64) * M * N
    else:
        y = epilogue(
            y, offs_m, cols, offs_m < M, mask_n, image, p, q, None, stride_rb, stride_rc, stride_rh, stride_rw,
            None, bias_ptr, residual_ptr, None, None, None, None, ACTIVATION, UNIT_N,
        )
    offs_y = offs_m.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)


def geometry_flags(geometry: ConvGeometry) -> dict[str, int]:
    """Returns the constants of a geometry that every kernel takes."""
    return {
        "S": geometry.s, "STRIDE_H": geometry.stride_h, "STRIDE_W": geometry.stride_w,
        "TOP": geometry.top, "LEFT": geometry.left,
        "DILATION_H": geometry.dilation_h, "DILATION_W": geometry.dilation_w, "PADDED": any(geometry.sides),
    }


def convolve(
    y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None,
    geometry: ConvGeometry, activation: str, plan: Plan, asm: bool,
) -> None:
    """Writes y `[B, O, P, Q]`, channels-last, by the plan's tiles."""
    codes, scale, zero_points, zero, levels = kernel_tensors(weight)
    k, group = weight.shape[1], grouping(weight.shape[1], weight.group_size)
    b, o, p, q = y.shape
    m, og = b * p * q, o // geometry.groups
    split = plan.partials(-(-k // 128))
    sums = y if split == 1 else fresh(x.new_empty(split, m, o, dtype=torch.float32))
    tiles = -(-m // plan.block_m) * geometry.groups * -(-og // plan.block_n)
    launch(
        _qconv2d_kernel, (tiles, split),
        sums, x, codes, scale, zero_points, levels, bias, residual,
        m, og, *x.shape[2:], p, q,
        *x.stride(), *scale.stride(), *strides_of(residual),
        K=k, CG=k // geometry.taps, GROUPS=geometry.groups, **geometry_flags(geometry),
        BITS=weight.bits, GROUP=group, ZERO=zero, ASM=asm, ACTIVATION=activation,
        SPLIT_K=split, SCALE_PARTS=plan.scale_parts and group % 128 == 0,
        UNIT=unit_of(x), UNIT_N=unit_of(residual, og), BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        num_warps=plan.warps, num_stages=plan.stages,
    )
    if split > 1:
        reduce_partials(y, sums, bias, activation, requant=(residual, None, None, None, None))
