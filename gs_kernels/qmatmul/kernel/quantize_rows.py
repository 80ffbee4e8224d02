"""Quantizes rows to 8 bits, each with a scale of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gs_kernels.qmatmul.ref import FP8_MAX, LEVELS
from gs_kernels.qmatmul.tiles import rows_tile
from gs_kernels.runtime.bound_calls import fresh
from gs_kernels.runtime.dispatch import launch
from gs_kernels.triton_lib import SCALE_FLOOR, clamp, inverse, nearest_level, qparams, reduce_range


@triton.jit
def row_codes(x, inv, zero, TOP: tl.constexpr, CODE: tl.constexpr, FP8: tl.constexpr):
    if not FP8:
        q = nearest_level(x, inv, zero, -TOP, TOP)
        codes = tl.where(q == q, q, -TOP).to(CODE)
    else:
        codes = clamp(x * inv, -TOP, TOP).to(CODE)
    return codes


@triton.jit
def _store_sums(sums_ptr, codes, mask, offs_m, mask_m, k, M, K):
    """Stores the sum of each 128 codes of a tile that begins at column k."""
    COUNT: tl.constexpr = codes.shape[1] // 128
    values = tl.where(mask, codes.to(tl.float32), 0.0)
    sums = tl.sum(tl.reshape(values, (codes.shape[0], COUNT, 128)), 2)
    offs = k // 128 + tl.arange(0, COUNT)
    mask_sums = mask_m[:, None] & (offs < tl.cdiv(K, 128))[None, :]
    tl.store(sums_ptr + offs_m[:, None] + offs.to(tl.int64)[None, :] * M, sums, mask=mask_sums)


@triton.jit
def _quantize_rows_kernel(
    codes_ptr, scale_ptr, sums_ptr,
    x_ptr,
    M, K,
    stride_xm,
    TOP: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Quantizes BLOCK_M rows. WHOLE: BLOCK_K covers a row, which is then read once; else twice, then from a cache.

    sums_ptr: None, or for the sums of each 128 codes of a row, `[ceil(K / 128), M]` fp32.
    """
    CODE: tl.constexpr = codes_ptr.dtype.element_ty
    FP8: tl.constexpr = codes_ptr.dtype.element_ty != tl.int8
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    x_ptrs = x_ptr + (offs_m * stride_xm)[:, None]
    mask = mask_m[:, None] & (offs_k < K)[None, :]
    x = tl.load(x_ptrs + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    low, high = reduce_range(x, mask, 1)
    if not WHOLE:
        for k in range(BLOCK_K, K, BLOCK_K):
            mask = mask_m[:, None] & (k + offs_k < K)[None, :]
            block = tl.load(x_ptrs + k + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            block_low, block_high = reduce_range(block, mask, 1)
            low = tl.minimum(low, block_low, propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, block_high, propagate_nan=tl.PropagateNan.ALL)
    if FP8:
        absmax = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.div_rn(absmax, tl.full(absmax.shape, TOP, tl.float32))
        scale = tl.maximum(scale, SCALE_FLOOR, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.where(absmax == 0.0, 1.0, scale)
        zero = tl.zeros(scale.shape, tl.float32)
    else:
        scale, zero = qparams(low, high, -TOP, TOP, True, 0.0)
    inv = inverse(scale, zero)
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)
    starts = (offs_m * K)[:, None]
    if WHOLE:
        codes = row_codes(x, inv[:, None], zero[:, None], TOP, CODE, FP8)
        tl.store(codes_ptr + starts + offs_k[None, :], codes, mask=mask)
        if sums_ptr is not None:
            _store_sums(sums_ptr, codes, mask, offs_m, mask_m, 0, M, K)
    else:
        for k in range(0, K, BLOCK_K):
            mask = mask_m[:, None] & (k + offs_k < K)[None, :]
            block = tl.load(x_ptrs + k + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            codes = row_codes(block, inv[:, None], zero[:, None], TOP, CODE, FP8)
            tl.store(codes_ptr + starts + k + offs_k[None, :], codes, mask=mask)
            if sums_ptr is not None:
                _store_sums(sums_ptr, codes, mask, offs_m, mask_m, k, M, K)


def quantize(x: Tensor, dtype: torch.dtype, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns codes `[M, K]` and scales `[M]` of x `[M, K]`, contiguous along K; sums of codes to `sums`, if given."""
    m, k = x.shape
    codes = fresh(x.new_empty(m, k, dtype=dtype))
    scale = fresh(x.new_empty(m, dtype=torch.float32))
    block_m, block_k, warps = rows_tile(m, k)
    launch(
        _quantize_rows_kernel, (-(-m // block_m),), codes, scale, sums, x, m, k, x.stride(0),
        TOP=float(LEVELS if dtype == torch.int8 else FP8_MAX), WHOLE=k <= block_k,
        BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps,
    )
    return codes, scale
